"""Probabilistic knowledge transfer (Passalis, Tefas, 2018)."""

from __future__ import annotations

from torch import Tensor

from distill.distributed import Rows
from distill.functional import conditional_probabilities, probability_divergence
from distill.heads.parts.feature_relation import FeatureRelation


class PKT(FeatureRelation):
    """Divergence between both networks' neighbor probabilities: mean over B^2 of p_t log(p_t / p_s).

    p(j | i) is the cosine of i and j, mapped from [-1, 1] to [0, 1] and divided by its sum over j.

    The CRD benchmark relates the pooled embeddings with weight 30000, which cancels the mean at 64 images.

    Args:
        of: the features that are related: `embedding`, `logits`, `tokens` or the name of a tap.
        scope: `global` and `batch` relate images, each as one vector; `image` relates the tokens of each image.

    Raises:
        UserError: an unsupported scope.
    """

    def relate_rows(self, tokens: Tensor, rows: Rows) -> Tensor:
        """Return the rows of p, `[..., R, L]`."""
        return conditional_probabilities(tokens, rows=rows)

    def compare(self, student_relation: Tensor, teacher_relation: Tensor) -> Tensor:
        """Return the mean of p_t log(p_t / p_s)."""
        return probability_divergence(student_relation, teacher_relation)
