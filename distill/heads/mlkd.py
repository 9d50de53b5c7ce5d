"""Multi-level logit distillation (Jin, Wang, Lin, 2023)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from distill import functional
from distill.distributed import ALL_ROWS, gather, rows_of_this_rank
from distill.errors import one_of
from distill.features import Features
from distill.functional.multilevel import TEMPERATURES, Masks
from distill.heads.base import Batch, Scope, require_scope
from distill.heads.parts.softened_logits import SoftenedLogitHead
from distill.heads.parts.temperature import Temperature


class MLKD(SoftenedLogitHead):
    """Class probabilities at five temperatures, compared by sample, by class and by batch.

    With P the probabilities `[B, K]` at one temperature and P' their transpose, the loss is the sum of::

        instances = m   sum_T  1/B sum_n T^2 KL(teacher || student)
        classes   = m_c sum_T  1/K |P_t' P_t - P_s' P_s|^2
        batch     = m   sum_T  1/B |P_t P_t' - P_s P_s'|^2

    m is the share of samples, and m_c of classes, that the teacher is least confident of, up to the median: about one
    half. Labels are not read.

    With one view of each image that is all. If the batch has two (`view`), it is the loss of the first, and instances
    gains, as in the authors' code, the divergence of the second at T, 3 and 5, and of the *first* at 2 and 6. The
    authors' tables are of two views, a weak one and a strong one, with the task on both.

    The authors give the term the weight 0.9 and the task 0.1. With standardized logits (Sun, Ren, Li, Wang, Cao, 2024)
    the weight is 9 and T 2; only the divergences see standardized logits. The three parts are logged.

    Args:
        temperature: the first of the temperatures T, 3, 5, 2, 6: a number, a schedule or a learned temperature; 4 as
            in the authors' code.
        standardize: whether each sample's logits are standardized in the divergences, in both networks.
        masks: `scale`, as in the authors' code, multiplies each part by the share m or m_c; `rows` compares
            those samples and classes alone (see `functional.mlkd`).
        scope: the samples that a batch consists of: those of this process, `batch`, or of all ranks, `global`.

    Raises:
        UserError: a temperature not above 0, or an unknown form or scope.
    """

    scopes: ClassVar[tuple[Scope, ...]] = ("batch", "global")

    def __init__(
        self,
        temperature: Temperature = 4.0,
        standardize: bool = False,
        masks: Masks = "scale",
        scope: Scope = "global",
    ) -> None:
        super().__init__()
        self.soften(temperature, standardize)
        one_of("masks", masks, ("scale", "rows"))
        self.masks = masks
        self.scope = require_scope(self, scope, self.scopes)
        self._parts: dict[str, Tensor] = {}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare logits `[B, K]` with logits `[B, K]`; with V views, both are `[V * B, K]` and `view` `[V * B]`."""
        logits, view = [student["logits"], teacher["logits"]], batch.get("view")
        rows = ALL_ROWS
        if self.scope == "global":
            logits, rows = [gather(part) for part in logits], rows_of_this_rank()
            view = None if view is None else gather(view)
        temperatures = (self.temperature_now(), *TEMPERATURES[1:])
        parts = functional.mlkd(logits[0], logits[1], view, temperatures, self.standardize, self.masks, rows)
        self._parts = {name: part.detach() for name, part in parts._asdict().items()}
        return parts.instances + parts.classes + parts.batch

    def diagnostics(self) -> dict[str, Tensor]:
        """Return the parts of the last call, and the temperature if it is learned."""
        return self._parts | super().diagnostics()
