"""Pure functions of tensors, in the manner of `torch.nn.functional`: one file a family, the dtype is the caller's."""

from distill.functional.contrast import info_nce, memory_relation, noise_contrast, softmax_over_memory
from distill.functional.divergences import huber, kl_divergence
from distill.functional.graphs import (
    adjacency_divergence,
    context_difference,
    nearest_neighbours,
    neighbour_distances,
    neighbour_divergence,
    node_contrast,
)
from distill.functional.hashing import random_bits
from distill.functional.logits import dkd, kd, nckd, tckd
from distill.functional.relations import angle_cosines, normalised_distances, pair_distances

__all__ = [
    "adjacency_divergence",
    "angle_cosines",
    "context_difference",
    "dkd",
    "huber",
    "info_nce",
    "kd",
    "kl_divergence",
    "memory_relation",
    "nckd",
    "nearest_neighbours",
    "neighbour_distances",
    "neighbour_divergence",
    "node_contrast",
    "noise_contrast",
    "normalised_distances",
    "pair_distances",
    "random_bits",
    "softmax_over_memory",
    "tckd",
]
