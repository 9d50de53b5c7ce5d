"""Similarity-preserving knowledge distillation (Tung, Mori, 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.distributed import Rows
from distill.functional import normalized_gram
from distill.heads.base import Scope
from distill.heads.parts.feature_relation import FeatureRelation


class SP(FeatureRelation):
    """Mean squared difference between both networks' similarities of images: 1 / B^2 |G_s - G_t|^2.

    G has the inner products of the flattened features of all pairs of images, each row normalized to length 1. The two
    networks may have any channels and grids.

    The CRD benchmark relates the last map (`tokens` of a CNN), with weight 3000.

    Args:
        of: the features that are related: `tokens`, `embedding`, `logits` or the name of a tap.
        scope: `global` and `batch` relate images (`global` sends the flattened features of all ranks to each);
            `image` relates the tokens of each image.

    Raises:
        UserError: an unsupported scope.
    """

    def __init__(self, of: str = "tokens", scope: Scope = "global") -> None:
        super().__init__(of, scope)

    def relate_rows(self, tokens: Tensor, rows: Rows) -> Tensor:
        """Return the rows of G, `[..., R, L]`."""
        return normalized_gram(tokens, rows)

    def compare(self, student_relation: Tensor, teacher_relation: Tensor) -> Tensor:
        """Return the mean squared difference."""
        return F.mse_loss(student_relation, teacher_relation)
