"""Pure functions of tensors, in the manner of `torch.nn.functional`: one file a family, the dtype is the caller's."""

from distill.functional.angles import angle_difference, edges
from distill.functional.contrast import info_nce, memory_relation, noise_contrast, softmax_over_memory
from distill.functional.correlations import adjacent_congruence, dist, pearson
from distill.functional.divergences import huber, kl_divergence, probability_divergence
from distill.functional.graphs import (
    adjacency_divergence,
    context_difference,
    nearest_neighbours,
    neighbour_distances,
    neighbour_divergence,
    node_contrast,
)
from distill.functional.kernels import channel_discrepancy, conditional_probabilities, normalised_gram, taylor_kernel
from distill.functional.logits import dkd, kd, nckd, tckd
from distill.functional.longtail import effective_number_weights, label_margins, log_priors, with_margins
from distill.functional.maps import ab, at, attention_map, flow_matrix, fsp, ft, hcl, pool, to_common_grid, vid
from distill.functional.random_bits import random_bits
from distill.functional.relations import angle_cosines, normalised_distances, pair_distances, relative_squared_distances
from distill.functional.votes import neighbour_votes

__all__ = [
    "ab",
    "adjacency_divergence",
    "adjacent_congruence",
    "angle_cosines",
    "angle_difference",
    "at",
    "attention_map",
    "channel_discrepancy",
    "conditional_probabilities",
    "context_difference",
    "dist",
    "dkd",
    "edges",
    "effective_number_weights",
    "flow_matrix",
    "fsp",
    "ft",
    "hcl",
    "huber",
    "info_nce",
    "kd",
    "kl_divergence",
    "label_margins",
    "log_priors",
    "memory_relation",
    "nckd",
    "nearest_neighbours",
    "neighbour_distances",
    "neighbour_divergence",
    "neighbour_votes",
    "node_contrast",
    "noise_contrast",
    "normalised_distances",
    "normalised_gram",
    "pair_distances",
    "pearson",
    "pool",
    "probability_divergence",
    "random_bits",
    "relative_squared_distances",
    "softmax_over_memory",
    "taylor_kernel",
    "tckd",
    "to_common_grid",
    "vid",
    "with_margins",
]
