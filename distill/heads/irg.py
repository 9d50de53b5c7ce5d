"""Edges of the instance relationship graph (Liu, Cao, Li, Yuan, Hu, Li, Duan, 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.functional import relative_squared_distances
from distill.heads.parts.feature_relation import FeatureRelation


class IRG(FeatureRelation):
    """Squared distances between images, over the largest of them: mean squared difference of both networks'.

    These are the graph's edges at one layer; give one term for each layer. The method has two more parts: its vertices,
    a mean squared error of the features themselves, and its transformations, how far each image moves between two
    layers, which are not here.

    Args:
        of: the features that are related: `embedding`, `logits`, `tokens` or the name of a tap.
        scope: `global` and `batch` relate images, each as one vector; `image` relates the tokens of each image.

    Raises:
        UserError: there is no such scope.
    """

    def relate(self, tokens: Tensor) -> Tensor:
        """The edges, `[..., L, L]`."""
        return relative_squared_distances(tokens)

    def compare(self, student_relation: Tensor, teacher_relation: Tensor) -> Tensor:
        """The mean squared difference."""
        return F.mse_loss(student_relation, teacher_relation)
