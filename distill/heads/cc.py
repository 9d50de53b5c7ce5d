"""Correlation congruence (Peng, Jin, Liu, Zhou, Wu, Liu, Li, Zhang, 2019), in the paper's form."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError
from distill.functional import taylor_kernel
from distill.heads.base import Scope, positive
from distill.heads.parts.feature_relation import FeatureRelation


class CC(FeatureRelation):
    """The kernel matrices of both networks are congruent: 1 / B^2 |K_s - K_t|^2.

    K is a Gaussian kernel between embeddings at length 1, by its Taylor series. What the CRD benchmark calls CC is
    another loss, `RepDistillerCC`.

    Args:
        gamma: how fast the kernel falls with the distance; 0.4 as in the public codes of this form.
        order: P, where the series ends; 2 likewise.
        of: the features that are related: `embedding`, `logits`, `tokens` or the name of a tap.
        scope: `global` and `batch` relate images, each as one vector; `image` relates the tokens of each image.

    Raises:
        UserError: an argument out of its range.
    """

    def __init__(self, gamma: float = 0.4, order: int = 2, of: str = "embedding", scope: Scope = "global") -> None:
        super().__init__(of, scope)
        positive("gamma", gamma)
        if order < 1:
            raise UserError(f"order must be at least 1, given {order}")
        self.gamma, self.order = gamma, order

    def relate(self, tokens: Tensor) -> Tensor:
        """K, `[..., L, L]`."""
        return taylor_kernel(tokens, self.gamma, self.order)

    def compare(self, student_relation: Tensor, teacher_relation: Tensor) -> Tensor:
        """The mean squared difference."""
        return F.mse_loss(student_relation, teacher_relation)
