"""Virtual relation matching: VRM (Zhang, Xie, Cai, Ma, 2025), an interpretation."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from distill import functional
from distill.distributed import ALL_ROWS, gather, rows_of_this_rank
from distill.errors import one_of, require_above, require_at_least, require_between
from distill.features import Features, FeatureSpec
from distill.functional.virtual_relations import Classes, Edges, Huber
from distill.heads.base import Batch, LogitHead, RunInfo, Scope, require_scope
from distill.heads.parts.labeled import require_other_classes
from distill.heads.parts.two_views import both_views, require_two_views


class VRM(LogitHead):
    """Relations among samples and among classes, across a real and a virtual view of each image, compared by Huber.

    **An interpretation**: neither the authors' code nor the whole text of the paper was at hand, only what others
    report of it. Reported are a second view of each image, edges that are the normalized differences of logits (between
    samples) and of their columns (between classes), the pruning of redundant and of unreliable edges, the latter by the
    joint entropy of the student's two predictions, and a Huber loss. All numbers, and how edges are counted and
    averaged, are choices of this project, which the arguments name. So no figure of the paper is expected.

    View 0 is real, view 1 virtual. With z the logits, an edge between the samples m and n is (z_m - z_n) / |z_m - z_n|.
    The loss is `sample_weight` times the mean Huber loss over the kept edges between samples and their entries, plus
    `class_weight` times that over all edges between classes. Labels are not read. Both parts are logged, without their
    weights. The edges of a few vertices exist at a time: memory grows with B^2 + K^2, time with B^2 K + K^2 B. Each of
    W ranks computes a W-th of the edges between samples, and all of those between classes.

    Args:
        sample_weight: weight of the edges between samples.
        class_weight: weight of the edges between classes.
        prune: the share of the edges between samples, those whose two predictions of the student have the greatest sum
            of entropies, that is left out.
        delta: the largest difference with a squared loss.
        huber: beyond `delta`, `huber` goes on as a line, and `discard` leaves an entry out, as one report has it.
        edges: between samples: of the real with the virtual ones, `cross`, or between each two of both, `all`.
        classes: between classes: of the real columns with the virtual ones, `cross`, or between each two columns of
            both views together, `stacked`.
        standardize: whether each sample's logits are standardized before, in both networks; entropies are of the logits
            as they are.
        scope: the samples that a batch consists of: those of this process, `batch`, or of all ranks, `global`.
        chunk: vertices whose edges are computed at a time; by default as many as give 4 million numbers, 32 on a GPU.

    Raises:
        UserError: an argument out of its range.
    """

    batch_needs = frozenset({"view"})
    scopes: ClassVar[tuple[Scope, ...]] = ("batch", "global")

    def __init__(
        self,
        sample_weight: float = 128.0,
        class_weight: float = 32.0,
        prune: float = 0.25,
        delta: float = 1.0,
        huber: Huber = "huber",
        edges: Edges = "cross",
        classes: Classes = "cross",
        standardize: bool = True,
        scope: Scope = "global",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        require_between(0, 1, prune=prune)
        require_above(0, delta=delta)
        require_at_least(1, chunk=chunk)
        self.sample_weight, self.class_weight, self.prune, self.delta = sample_weight, class_weight, prune, delta
        one_of("huber", huber, ("huber", "discard"))
        one_of("edges", edges, ("cross", "all"))
        one_of("classes", classes, ("cross", "stacked"))
        self.huber: Huber = huber
        self.edges: Edges = edges
        self.classes: Classes = classes
        self.standardize, self.chunk = standardize, chunk
        self.scope = require_scope(self, scope, self.scopes)
        self._parts: dict[str, Tensor] = {}

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Check the numbers of classes.

        Raises:
            UserError: they differ, or there is only one.
        """
        super().build(student, teacher)
        require_other_classes(self, student)

    def prepare(self, run: RunInfo) -> None:
        """Check the number of views.

        Raises:
            UserError: it is not two.
        """
        super().prepare(run)
        require_two_views(self, run)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare logits `[2 B, K]` with logits `[2 B, K]`, view after view."""
        logits = [part["logits"] for part in (student, teacher)]
        rows = ALL_ROWS
        if self.scope == "global":
            logits, rows = [gather(part) for part in logits], rows_of_this_rank()
        log_probability = logits[0].detach().log_softmax(-1)
        entropies = both_views(self, -(log_probability.exp() * log_probability).sum(-1))
        scores = [both_views(self, functional.standardize(part) if self.standardize else part) for part in logits]
        samples = functional.sample_edge_difference(
            scores[0], scores[1], entropies, self.edges, self.prune, self.delta, self.huber, self.chunk, rows
        )
        classes = functional.class_edge_difference(
            scores[0], scores[1], self.classes, self.delta, self.huber, self.chunk
        )
        self._parts = {"samples": samples.detach(), "classes": classes.detach()}
        return self.sample_weight * samples + self.class_weight * classes

    def diagnostics(self) -> dict[str, Tensor]:
        """Return the parts of the last call."""
        return self._parts
