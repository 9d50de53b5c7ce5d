"""The interface of a loss term, and the pattern of a relation loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from distill.distributed import all_sum, gather, world_size
from distill.errors import UserError, did_you_mean
from distill.features import Features, FeatureSpec, Summary
from distill.schedules import Number, Progress, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = dict[str, Any]
"""`image` `[B, C, H, W]`, `label` `[B]` or `[B, K]`, `index` `[B]`, perhaps `segments` `[B, H, W]`."""

Scope = Literal["image", "batch", "global", "memory"]
"""Over what a relation ranges: one image, this process's batch, the batch of all ranks, or a memory.

Of these, `batch` alone makes the value depend on the number of ranks.
"""


@dataclass(frozen=True)
class RunInfo:
    """The facts of a run that heads are prepared with before step 0; `None` where they are unknown.

    Attributes:
        progress: that of step 0, with the length of the run.
        batch_size: the smallest training batch per process, in images.
        world_size: number of processes that train together.
        samples: number of training images.
        class_counts: returns the number of labeled training images per class, int64 `[K]`; called only by heads that
            need it.
        provides: keys that batches will have: `image`, `label`, `index`, `draw`, `view`, `segments`.
    """

    progress: Progress = field(default_factory=Progress)
    batch_size: int | None = None
    world_size: int = 1
    samples: int | None = None
    class_counts: Callable[[], Tensor] | None = None
    provides: frozenset[str] = frozenset({"image", "label", "index"})


class Head(nn.Module, ABC):
    """One loss term: compares what the student saw with what the teacher saw.

    A subclass names what it reads in `needs`, makes its projections and memory in `build`, and computes a scalar
    in `forward`. It is called with tensors of at least float32, outside autocast, and with a teacher that carries
    no gradient. Every argument of its `__init__` has a default.

    Attributes:
        needs: names of the `Features` it reads from both networks (`logits`, `embedding`, `tokens` or a tap's name),
            checked before step 0. An instance may set its own.
        needs_teacher: whether it compares with a teacher at all; a loss on the labels does not.
        batch_needs: keys of the batch that it reads, of those that not every batch has: `segments`, `view`. An instance
            may set its own.
        exact_gradient: arguments under which its gradient is the derivative of its value, for a head that by default
            stops a part of it; the contract's tester tries it with these.
        ordered: whether its value depends on the order of the batch, which the contract's tester otherwise refuses.
        same_widths: whether both networks must have the same channels; the contract's tester then gives the teacher the
            student's.
        scope: over what its relation ranges; a loss on each image by itself has scope `image`, as any has by default.
        progress: how far training has come, kept up to date by the module; for schedules inside the head.
    """

    needs: AbstractSet[str] = frozenset()
    needs_teacher: ClassVar[bool] = True
    batch_needs: AbstractSet[str] = frozenset()
    exact_gradient: ClassVar[Mapping[str, Any]] = {}
    ordered: ClassVar[bool] = False
    same_widths: ClassVar[bool] = False
    scope: Scope = "image"

    def __init__(self) -> None:
        super().__init__()
        self.progress = Progress()

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Make projections and memory; the shapes of both networks are known here. The default makes nothing.

        Raises:
            UserError: the shapes do not fit this head.
        """

    @abstractmethod
    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """The loss, a scalar."""

    def __call__(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        """Run `forward` in float32 (float64 stays), outside autocast, with the teacher's summary detached."""
        if teacher is not None and not isinstance(teacher, Summary):
            teacher = self.summarize_teacher(teacher, batch)
        device = next(_tensors(student)).device.type
        with torch.autocast(device, enabled=False):
            loss: Tensor = super().__call__(
                student.apply(_at_least_float32),
                None if teacher is None else teacher.apply(lambda tensor: _at_least_float32(tensor.detach())),
                batch,
            )
        return loss

    def prepare(self, run: RunInfo) -> None:
        """Check the head against the run, or learn what it must know of it, before step 0; the default does nothing.

        Raises:
            UserError: the head cannot work in this run.
        """

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        """The part of a teacher's features that this head compares with; by default what `needs` names.

        Row by row: it depends on no trained parameter, no progress, no other row and no other rank.
        """
        return Summary.of(teacher, self.needs)

    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars of the last call that are worth a curve, by name, without gradient; the default has none."""
        return {}

    def plot(self, student: Features, teacher: Features, batch: Batch, images: int = 4) -> Figure | None:
        """A picture of what the head compares on the first `images` of a batch; the default has none."""
        return None

    def check(self, student: FeatureSpec, teacher: FeatureSpec | None) -> None:
        """Hold `needs` against what the networks give.

        Raises:
            UserError: a network gives no features of that name.
        """
        if self.needs_teacher and teacher is None:
            raise UserError(f"{type(self).__name__} compares with a teacher, but model.teacher is not given")
        for side, spec in (("student", student), ("teacher", teacher if self.needs_teacher else None)):
            if spec is None:
                continue
            for name in sorted(self.needs):
                try:
                    spec[name]
                except UserError as error:
                    raise UserError(f"{type(self).__name__} needs {name!r} of the {side}, but {error}") from None


class LogitHead(Head):
    """A loss that compares the class logits of both networks, class by class."""

    needs = frozenset({"logits"})

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Hold the two numbers of classes against each other; there is nothing to make.

        Raises:
            UserError: they differ.
        """
        (own,), (other,) = student["logits"], teacher["logits"]
        if own != other:
            raise UserError(
                f"{type(self).__name__} compares class by class, but the student has {own} classes and the teacher "
                f"{other}: give both the same classes"
            )


class RelationHead(Head):
    """A loss that compares a relation within the student with the same relation within the teacher.

    A subclass says what is related, how, and how two relations are compared::

        class CosineRelation(RelationHead):
            needs = {"embedding"}

            def tokens(self, features, batch):
                return features.embedding

            def relate(self, tokens):
                tokens = normalize(tokens, dim=-1)
                return tokens @ tokens.T

            def compare(self, student_relation, teacher_relation):
                return mse_loss(student_relation, teacher_relation)

    Args:
        scope: `image` and `batch` relate what this process holds; `global` gathers the tokens of all ranks first,
            with gradient, so that the value does not depend on the number of ranks.

    Attributes:
        scopes: the scopes it can have; a subclass that makes a memory adds `memory`.

    Raises:
        UserError: it cannot have that scope.
    """

    scopes: ClassVar[tuple[Scope, ...]] = ("image", "batch", "global")

    def __init__(self, scope: Scope = "global") -> None:
        super().__init__()
        if scope not in self.scopes:
            raise UserError(f"{type(self).__name__} has no scope {scope!r}: {did_you_mean(scope, self.scopes)}")
        self.scope = scope

    @abstractmethod
    def tokens(self, features: Features, batch: Batch) -> Tensor:
        """What is related: `[B, d]` or `[B, N, d]`."""

    @abstractmethod
    def relate(self, tokens: Tensor) -> Any:
        """One network's relation among its tokens: a tensor, or several."""

    @abstractmethod
    def compare(self, student_relation: Any, teacher_relation: Any) -> Tensor:
        """The scalar that says how far two relations are apart."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Relate the tokens of each network and compare the two relations."""
        tokens = [self.tokens(features, batch) for features in (student, teacher)]
        if self.scope == "global":
            tokens = [gather(part) for part in tokens]
        return self.compare(self.relate(tokens[0]), self.relate(tokens[1]))


def positive(name: str, number: Number) -> Number:
    """`number` itself if it can be positive.

    Raises:
        UserError: it is a constant and not above 0.
    """
    if not isinstance(number, Schedule) and not number > 0:
        raise UserError(f"{name} must be above 0, given {number}")
    return number


def mean_over_ranks(total: Tensor, mass: Tensor) -> Tensor:
    """This rank's share of a weighted mean over the samples of all ranks.

    DDP takes the mean over ranks; of these shares that is the sum of all totals over the sum of all masses, however
    unevenly the ranks hold the mass (the labeled samples, say).

    Args:
        total: scalar, the weighted sum over this rank's samples.
        mass: scalar, the sum of their weights.

    Returns:
        A scalar; 0 with zero gradient if no rank holds any mass, where `total` must be 0 too.
    """
    mass = all_sum(mass.to(total)) / world_size()
    return total / mass.masked_fill(mass == 0, 1.0)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _tensors(features: Features) -> Any:
    candidates = (features.logits, features.embedding, features.tokens, *features.maps.values())
    return (tensor for tensor in candidates if tensor is not None)
