"""Correlation congruence (Peng, Jin, Liu, Zhou, Wu, Liu, Li, Zhang, 2019), in the paper's form."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.distributed import Rows
from distill.errors import require_above, require_at_least
from distill.functional import taylor_kernel
from distill.heads.base import Scope
from distill.heads.parts.feature_relation import FeatureRelation


class CC(FeatureRelation):
    """Mean squared difference between the kernel matrices of both networks: 1 / B^2 |K_s - K_t|^2.

    K is a Gaussian kernel between normalized embeddings, as a Taylor series. The loss that the CRD benchmark calls CC
    is a different one, `RepDistillerCC`.

    Args:
        gamma: the kernel's rate of decay with the squared distance; 0.4 as in the public codes of this form.
        order: P, the order of the series; 2 likewise.
        of: the features that are related: `embedding`, `logits`, `tokens` or the name of a tap.
        scope: `global` and `batch` relate images, each as one vector; `image` relates the tokens of each image.

    Raises:
        UserError: an argument out of its range.
    """

    def __init__(self, gamma: float = 0.4, order: int = 2, of: str = "embedding", scope: Scope = "global") -> None:
        super().__init__(of, scope)
        require_above(0, gamma=gamma)
        require_at_least(1, order=order)
        self.gamma, self.order = gamma, order

    def relate_rows(self, tokens: Tensor, rows: Rows) -> Tensor:
        """Return the rows of K, `[..., R, L]`."""
        return taylor_kernel(tokens, self.gamma, self.order, rows)

    def compare(self, student_relation: Tensor, teacher_relation: Tensor) -> Tensor:
        """Return the mean squared difference."""
        return F.mse_loss(student_relation, teacher_relation)
