"""Cross-view consistency regularisation for logit distillation: CRLD (Zhang, Liu, Cai, Ma, 2024)."""

from __future__ import annotations

from torch import Tensor

from distill import functional
from distill.errors import require_between
from distill.features import Features
from distill.heads.base import Batch, RunInfo
from distill.heads.parts.softened_logits import SoftenedLogitHead
from distill.heads.parts.temperature import Temperature
from distill.heads.parts.two_views import both_views, require_two_views


class CRLD(SoftenedLogitHead):
    """KD within and across two views of each image, a weak and a strong one, where the teacher is confident.

    With k(a, b) = T^2 KL(teacher's b || student's a), and s, t for the weak and s', t' for the strong view, the loss is
    the mean over the images of::

        within_weight [max p(t)  >= weak_threshold]   (k(s, t)  + k(s', t'))
      + across_weight [max p(t') >= strong_threshold] (k(s', t) + k(s, t'))

    An image that a threshold leaves out counts as 0. As in the authors' code, the weak view's confidence also gates
    the strong view's divergence. Labels are not read. View 0 is the weak one; the batch must have two (`view`), such as
    those of `data.train_views: [weak, strong]`.

    The authors give the term the weight 1, and the task, which is the mean over the views here and their sum there, 2.
    The values of the arguments are those of their code for all pairs. Both parts are logged, without their weights.

    Args:
        within_weight: weight of the divergence in the same view.
        across_weight: weight of the divergence in different views.
        temperature: T, a number, a schedule or a learned temperature.
        weak_threshold: the teacher's least confidence in the weak view.
        strong_threshold: the teacher's least confidence in the strong view.
        standardize: whether each sample's logits are standardized in the divergences, in both networks; the authors
            do not.

    Raises:
        UserError: a temperature not above 0, or a threshold outside [0, 1].
    """

    batch_needs = frozenset({"view"})

    def __init__(
        self,
        within_weight: float = 2.0,
        across_weight: float = 0.5,
        temperature: Temperature = 4.0,
        weak_threshold: float = 0.9,
        strong_threshold: float = 0.2,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        require_between(0, 1, weak_threshold=weak_threshold, strong_threshold=strong_threshold)
        self.soften(temperature, standardize)
        self.within_weight, self.across_weight = within_weight, across_weight
        self.thresholds = weak_threshold, strong_threshold
        self._parts: dict[str, Tensor] = {}

    def prepare(self, run: RunInfo) -> None:
        """Check the number of views.

        Raises:
            UserError: it is not two.
        """
        super().prepare(run)
        require_two_views(self, run)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare logits `[2 B, K]` with logits `[2 B, K]`, view after view."""
        of_student, of_teacher = (both_views(self, self.class_scores(part)) for part in (student, teacher))
        confident = [
            (part.softmax(-1).amax(-1) >= least).to(part)
            for part, least in zip(both_views(self, teacher["logits"]), self.thresholds, strict=True)
        ]
        parts = functional.crld(of_student, of_teacher, self.temperature_now(), confident)
        within, across = (part.mean() for part in parts)
        self._parts = {"within": within.detach(), "across": across.detach()}
        return self.within_weight * within + self.across_weight * across

    def diagnostics(self) -> dict[str, Tensor]:
        """Return the parts of the last call, and the temperature if it is learned."""
        return self._parts | super().diagnostics()
