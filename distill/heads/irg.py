"""Edges of the instance relationship graph (Liu, Cao, Li, Yuan, Hu, Li, Duan, 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.distributed import Rows
from distill.functional import relative_squared_distances
from distill.heads.parts.feature_relation import FeatureRelation


class IRG(FeatureRelation):
    """Mean squared difference between both networks' squared distances of images, divided by the largest of each.

    These are the graph's edges at one layer; configure one term per layer. The method's other two parts are not
    implemented: its vertices, a mean squared error of the features themselves, and its transformations, the distance
    that each image moves between two layers.

    The value is that of the authors' code (Caffe). Its gradient is not: theirs holds the largest distance constant, and
    counts each pair for one of its two images, which makes it half as large; here it is the derivative of the value, as
    in the ports to torch.

    Args:
        of: the features that are related: `embedding`, `logits`, `tokens` or the name of a tap.
        scope: `global` and `batch` relate images, each as one vector; `image` relates the tokens of each image.

    Raises:
        UserError: an unsupported scope.
    """

    def relate_rows(self, tokens: Tensor, rows: Rows) -> Tensor:
        """Return the rows of the edges, `[..., R, L]`."""
        return relative_squared_distances(tokens, rows)

    def compare(self, student_relation: Tensor, teacher_relation: Tensor) -> Tensor:
        """Return the mean squared difference."""
        return F.mse_loss(student_relation, teacher_relation)
