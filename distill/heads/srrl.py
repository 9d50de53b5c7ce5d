"""Softmax regression representation learning: SRRL (Yang, Martinez, Bulat, Tzimiropoulos, 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from distill import functional
from distill.errors import require_at_least
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch
from distill.heads.parts.adapters import conv_norm
from distill.heads.parts.classifier import MapClassifierHead, classifier_of


class SRRL(MapClassifierHead):
    """`alpha` L_FM + `beta` L_SR: match the teacher's pooled features, and its logits through its own classifier.

    The student's map goes through a 1 x 1 convolution, batch normalization and a ReLU to h, on the teacher's channels.
    L_FM is the mean squared difference of the means over the cells of h and of the teacher's map; L_SR that of the
    teacher's classifier on the mean of h and of the teacher's logits. The classifier is not trained; the gradient
    passes through it. Labels are not read. The grids may differ.

    Args:
        of: the layer that the teacher's embedding is the mean of: `tokens`; or `embedding` for the form on pooled
            features of SimKD's and CTKD's code, whose batch normalization sees one value per image and channel.
        alpha: weight of L_FM; 1 as in the authors' code.
        beta: weight of L_SR; 1 likewise.
        relu: whether the projection ends in a ReLU, as there; `False` for teachers whose maps can be negative, such as
            a transformer's tokens.

    Raises:
        UserError: a negative weight.
    """

    classifiers = frozenset({"teacher"})

    def __init__(self, of: str = "tokens", alpha: float = 1.0, beta: float = 1.0, relu: bool = True) -> None:
        super().__init__(of)
        require_at_least(0, alpha=alpha, beta=beta)
        self.needs = frozenset({of, "logits"})
        self.alpha, self.beta, self.relu = alpha, beta, relu

    def needs_of(self, side: Literal["student", "teacher"]) -> AbstractSet[str]:
        """Return the layer, and of the teacher also the logits."""
        return frozenset({self.of}) if side == "student" else self.needs

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the projection, with He's normal initialization as in the authors' code.

        Raises:
            UserError: the teacher's layer is not the one that its classifier reads.
        """
        super().build(student, teacher)
        self.project = conv_norm(self.student_map.width, self.teacher_map.width)
        nn.init.kaiming_normal_(self.project[0].weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        """Return the teacher's logits, and the mean of its layer over the cells, `[B, d_t]`."""
        pooled = self.teacher_map(teacher).mean(dim=(2, 3))
        return Features(logits=teacher["logits"], maps={"pooled": pooled}, classify=teacher.classify)

    def summary_key(self) -> Mapping[str, Any]:
        """Return the layer that is averaged."""
        return {"of": self.teacher_map.of}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the student's map `[B, d_s, h, w]` with the teacher's pooled map and its logits `[B, K]`."""
        projected: Tensor = self.project(self.student_map(student))
        pooled = (F.relu(projected) if self.relu else projected).mean(dim=(2, 3))
        feature = functional.squared_difference(pooled, teacher["pooled"])
        return self.alpha * feature + self.beta * functional.squared_difference(
            classifier_of(teacher)(pooled), teacher["logits"]
        )
