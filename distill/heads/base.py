"""The interface of a loss term and the pattern of a relation loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from distill.configurable import Configurable
from distill.distributed import ALL_ROWS, Rows, gather, rows_of_this_rank
from distill.errors import UserError, did_you_mean
from distill.features import Features, FeatureSpec, Summary
from distill.precision import at_least_float32, at_least_float32_after, full_precision
from distill.schedules import Progress, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = dict[str, Any]
"""`image` `[B, C, H, W]`; where there are any, `label` `[B]` or `[B, K]`, `index` `[B]` and `segments` `[B, H, W]`.

With V views of each image, all have V B rows, view after view, and `view` int64 `[V B]` numbers them.
"""

Scope = Literal["image", "batch", "global", "memory"]
"""The range of a relation: one image, this process's batch (whose value depends on the ranks), all ranks', a memory."""


@dataclass(frozen=True)
class RunInfo:
    """Facts about a run that heads are prepared with before step 0; unknown ones are `None`.

    Attributes:
        progress: progress at step 0, with the length of the run.
        batch_size: the smallest training batch per process, in images.
        world_size: number of processes that train together.
        samples: number of training images.
        class_counts: returns the labeled training images per class, int64 `[K]`; called by heads that need it.
        views: number of views of each image in a training batch, of those that the head gets.
        provides: keys that batches will have: `image`, `label`, `index`, `draw`, `view`, `segments`.
    """

    progress: Progress = field(default_factory=Progress)
    batch_size: int | None = None
    world_size: int = 1
    samples: int | None = None
    class_counts: Callable[[], Tensor] | None = None
    views: int | None = None
    provides: frozenset[str] = frozenset({"image", "label", "index"})


class Head(Configurable, nn.Module, ABC):
    """One loss term, comparing the student's features with the teacher's or with labels.

    A subclass names the features it reads in `needs`, builds its projections and memory in `build`, and returns a
    scalar from `forward`. It has and gets tensors of at least float32, outside autocast, and teacher features without
    gradient. Every argument of its `__init__` has a default.

    Attributes:
        needs: names of the `Features` it reads from both networks (`logits`, `embedding`, `tokens` or a tap's name),
            checked before step 0. An instance may set its own.
        needs_teacher: whether it compares with a teacher; a loss on labels does not.
        batch_needs: keys of the batch that it cannot do without, besides `image`: `label`, `index`, `segments`, `view`.
            An instance may set its own.
        scope: the range of its relation; `image`, the default, is also the scope of a loss on each image by itself.
        progress: progress of the training, for schedules inside the head; kept up to date by whoever trains.
    """

    needs: AbstractSet[str] = frozenset()
    needs_teacher: ClassVar[bool] = True
    batch_needs: AbstractSet[str] = frozenset()
    scope: Scope = "image"

    def __init__(self) -> None:
        super().__init__()
        self.progress = Progress()

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build projections and memory from the shapes of both networks. The default builds nothing.

        Raises:
            UserError: the shapes do not fit this head.
        """

    @abstractmethod
    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Return the loss, a scalar."""

    def __call__(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        """Run `forward` on the teacher's summary in float32 (float64 stays), outside autocast.

        Raises:
            UserError: the batch lacks what the head needs.
        """
        if missing := self.batch_needs - batch.keys():
            raise UserError(f"{type(self).__name__} needs {min(missing)!r}, but a batch has {', '.join(batch)}")
        teacher = None if teacher is None else self.summary(teacher, batch)
        with full_precision(student):
            loss: Tensor = super().__call__(student.apply(at_least_float32), teacher, batch)
        return loss

    def summary(self, teacher: Features, batch: Batch) -> Summary:
        """Run `summarize_teacher` in float32 (float64 stays), outside autocast and without gradient.

        A `Summary` is not summarized again. Its tensors are contiguous, as stored ones are, so that sums round alike.
        """
        teacher = teacher.apply(lambda tensor: at_least_float32(tensor.detach()))
        if isinstance(teacher, Summary):
            return teacher
        with full_precision(teacher), torch.no_grad():
            return Summary(**vars(self.summarize_teacher(teacher, batch))).apply(Tensor.contiguous)

    @property
    def is_pure(self) -> bool:
        """Whether the loss depends on features and batch alone: by default without a memory and without a schedule."""
        return not list(self.buffers()) and not self.is_scheduled

    @property
    def is_scheduled(self) -> bool:
        """Whether the loss changes with the progress of training, by a schedule of the head."""
        return any(isinstance(value, Schedule) for module in self.modules() for value in vars(module).values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the head or change its type as torch does, but keep float32 where half precision is asked for."""
        super()._apply(at_least_float32_after(fn), recurse)  # type: ignore[no-untyped-call]  # torch has no types there
        return self

    def prepare(self, run: RunInfo) -> None:
        """Check the head against the run, or take from it what the head needs, before step 0. The default does nothing.

        Raises:
            UserError: the head cannot work in this run.
        """

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        """Return the part of a teacher's features that this head compares with; by default the features it needs.

        The summary is computed row by row: it depends on no trained parameter, no progress, no other row and no rank.
        So it may also be computed once and stored.
        """
        return Summary.of(teacher, self.needs_of("teacher"))

    def summary_key(self) -> Mapping[str, Any]:
        """Return what the summary depends on besides the teacher and the batch, as JSON values, once built.

        A head that overrides `summarize_teacher` names here the settings and grids that it reads there.
        """
        return {}

    def summary_state(self) -> Mapping[str, Tensor]:
        """Return the head's tensors that the summary depends on, by default none; a store keeps and restores them."""
        return {}

    def diagnostics(self) -> dict[str, Tensor]:
        """Return scalars of the last call worth logging, by name, without gradient. The default has none."""
        return {}

    def filled(self) -> Tensor | None:
        """Return the filled share of the head's memory, a scalar in [0, 1] on its device; `None` without a memory."""
        return None

    def plot(self, student: Features, teacher: Features, batch: Batch, images: int = 4) -> Figure | None:
        """Draw what the head compares on the first `images` of a batch. The default draws nothing."""
        return None

    def needs_of(self, side: Literal["student", "teacher"]) -> AbstractSet[str]:
        """Return the names of the features that the head reads from one network; by default `needs` for both."""
        return self.needs

    def check(self, student: FeatureSpec, teacher: FeatureSpec | None) -> None:
        """Check what the head needs against the features of both networks.

        Raises:
            UserError: a network has no features of that name.
        """
        if self.needs_teacher and teacher is None:
            raise UserError(f"{type(self).__name__} compares with a teacher, but model.teacher is not given")
        sides: dict[Literal["student", "teacher"], FeatureSpec] = {"student": student}
        if self.needs_teacher and teacher is not None:
            sides["teacher"] = teacher
        for side, spec in sides.items():
            for name in sorted(self.needs_of(side)):
                try:
                    spec[name]
                except UserError as error:
                    raise UserError(f"{type(self).__name__} needs {name!r} of the {side}, but {error}") from None


class LogitHead(Head):
    """A loss that compares the class logits of both networks, class by class."""

    needs = frozenset({"logits"})

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Check that both networks have the same number of classes.

        Raises:
            UserError: they differ.
        """
        (student_classes,), (teacher_classes,) = student["logits"], teacher["logits"]
        if student_classes != teacher_classes:
            raise UserError(
                f"{type(self).__name__} compares class by class, but the student has {student_classes} classes and the "
                f"teacher {teacher_classes}: give both the same classes"
            )


class RelationHead(Head):
    """A loss that compares a relation within the student with the same relation within the teacher.

    A subclass defines what is related, how it is related, and how two relations are compared::

        class CosineRelation(RelationHead):
            needs = {"embedding"}

            def tokens(self, features, batch):
                return features.embedding

            def relate(self, tokens):
                tokens = normalize(tokens, dim=-1)
                return tokens @ tokens.T

            def compare(self, student_relation, teacher_relation):
                return mse_loss(student_relation, teacher_relation)

    At scope `global` every rank then computes the whole relation among the images of all ranks. A head whose relation
    can be computed row by row overrides `relate_rows` too, so that each rank computes the rows of its own images only.

    Args:
        scope: `image` and `batch` relate the tokens of this process; `global` first gathers the tokens of all ranks,
            with gradient, so that the value does not depend on the number of ranks.

    Attributes:
        scopes: the supported scopes; a subclass with a memory adds `memory`.

    Raises:
        UserError: the scope is not supported.
    """

    scopes: ClassVar[tuple[Scope, ...]] = ("image", "batch", "global")

    def __init__(self, scope: Scope = "global") -> None:
        super().__init__()
        self.scope = require_scope(self, scope, self.scopes)

    @abstractmethod
    def tokens(self, features: Features, batch: Batch) -> Tensor:
        """Return the tokens to relate: `[B, d]` or `[B, N, d]`."""

    @abstractmethod
    def relate(self, tokens: Tensor) -> Any:
        """Return the relation among one network's tokens: a tensor or several."""

    def relate_rows(self, tokens: Tensor, rows: Rows) -> Any:
        """Return this rank's rows of the relation among the tokens `[W B, d]` of all W ranks; by default, all rows.

        The mean over the ranks of `compare` of these rows must be `compare` of all.
        """
        return self.relate(tokens)

    @abstractmethod
    def compare(self, student_relation: Any, teacher_relation: Any) -> Tensor:
        """Return the distance between two relations, a scalar."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Relate the tokens of each network and compare the two relations."""
        tokens = [self.tokens(features, batch) for features in (student, teacher)]
        rows = rows_of_this_rank() if self.scope == "global" else ALL_ROWS
        if rows.ranks == 1:
            return self.compare(self.relate(tokens[0]), self.relate(tokens[1]))
        return self.compare(*(self.relate_rows(gather(part), rows) for part in tokens))


def require_scope(head: Head, scope: Scope, supported: Sequence[Scope]) -> Scope:
    """Return `scope` if it is among the supported ones.

    Raises:
        UserError: it is not.
    """
    if scope not in supported:
        raise UserError(f"{type(head).__name__} has no scope {scope!r}: {did_you_mean(scope, supported)}")
    return scope


def require_several_images(head: Head, run: RunInfo) -> None:
    """Require batches of more than one image for a relation among the images of a batch, which is constant otherwise.

    Raises:
        UserError: a batch may have only one image.
    """
    if run.batch_size == 1 and (run.world_size == 1 or head.scope == "batch"):
        raise UserError(
            f"{type(head).__name__} relates the images of a batch, but data.batch_size is 1, so that there is nothing "
            "to relate: give 2 or more"
        )
