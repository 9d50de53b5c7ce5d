"""DIST: distillation from a stronger teacher by correlation (Huang, You, Wang, Qian, Xu, 2022)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from distill import functional
from distill.features import Features
from distill.heads.base import Batch, RelationHead, Scope
from distill.heads.parts.softened_logits import SoftenedLogitHead
from distill.heads.parts.temperature import Temperature


class DIST(RelationHead, SoftenedLogitHead):
    """Correlation distance between both networks' probabilities, T^2 (`beta` (1 - inter) + `gamma` (1 - intra)).

    inter is the Pearson correlation over the classes of a sample, mean over the samples; intra is the correlation over
    the samples of a class, mean over the classes. Labels are not read.

    The authors' code for ImageNet has temperature 1. For CIFAR-100, temperature 4 and a weight of 2 for the term are
    reported as theirs.

    Args:
        beta: weight of the relation between the classes of a sample.
        gamma: weight of the relation between the samples of a class.
        temperature: T, a number, a schedule or a learned temperature; 1 as in the authors' code for ImageNet.
        scope: the samples over which a class is correlated: those of this process, `batch`, or of all ranks, `global`.
        standardize: whether each sample's logits are standardized before T, in both networks.

    Raises:
        UserError: a temperature not above 0, or an unsupported scope.
    """

    scopes: ClassVar[tuple[Scope, ...]] = ("batch", "global")

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: Temperature = 1.0,
        scope: Scope = "global",
        standardize: bool = False,
    ) -> None:
        super().__init__(scope)
        self.beta, self.gamma = beta, gamma
        self.soften(temperature, standardize)

    def tokens(self, features: Features, batch: Batch) -> Tensor:
        """Return the logits `[B, K]`, standardized if they are to be."""
        return self.class_scores(features)

    def relate(self, tokens: Tensor) -> Tensor:
        """Return the softened class probabilities `[B, K]`."""
        return (tokens / self.temperature_now()).softmax(dim=-1)

    def compare(self, student_relation: Tensor, teacher_relation: Tensor) -> Tensor:
        """Return the correlation distance."""
        squared = self.temperature_now() ** 2
        return squared * functional.correlation_distance(student_relation, teacher_relation, self.beta, self.gamma)
