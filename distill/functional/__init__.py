"""Pure functions of tensors, in the manner of `torch.nn.functional`: one file a family, the dtype is the caller's."""

from distill.functional.divergences import huber, kl_divergence
from distill.functional.logits import dkd, kd, nckd, tckd
from distill.functional.relations import angle_cosines, normalised_distances, pair_distances

__all__ = [
    "angle_cosines",
    "dkd",
    "huber",
    "kd",
    "kl_divergence",
    "nckd",
    "normalised_distances",
    "pair_distances",
    "tckd",
]
