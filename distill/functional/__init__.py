"""Pure functions of tensors in the style of `torch.nn.functional`, one file per family; inputs set the dtype."""

from distill.functional.angles import angle_difference, edges, edges_of
from distill.functional.channels import channel_correlation_difference
from distill.functional.contrast import info_nce, memory_relation, noise_contrast, softmax_over_memory
from distill.functional.correlations import adjacent_congruence, correlation_distance, pearson
from distill.functional.cross_view import crld
from distill.functional.divergences import huber, kl_divergence, probability_divergence
from distill.functional.graphs import (
    adjacency_divergence,
    context_difference,
    nearest_neighbors,
    neighbor_distances,
    neighbor_divergence,
    node_contrast,
)
from distill.functional.kernels import channel_discrepancy, conditional_probabilities, normalized_gram, taylor_kernel
from distill.functional.logits import dkd, kd, mcd, nckd, nkd, rld, scd, standardize, tckd
from distill.functional.longtail import effective_number_weights, label_margins, log_priors, with_margins
from distill.functional.maps import (
    activation_boundaries,
    attention_map,
    attention_transfer,
    factor_transfer,
    flow_matrix,
    fsp,
    hierarchical_context_loss,
    pool,
    to_common_grid,
    vid,
)
from distill.functional.moments import cell_moments, gaussian_distance, moment_difference
from distill.functional.multilevel import mlkd
from distill.functional.regions import class_activation_difference, region_means, region_weights
from distill.functional.regression import cosine_distance, resize, squared_difference
from distill.functional.relations import (
    angle_cosines,
    centered_gram,
    divided_by_mean,
    normalized_distances,
    pack_symmetric,
    pair_distances,
    relative_squared_distances,
    row_distances,
    unpack_symmetric,
)
from distill.functional.transport import (
    class_cosines,
    class_costs,
    linear_cka,
    target_cross_entropy,
    transport_among_others,
)
from distill.functional.virtual_relations import class_edge_difference, edge_difference, sample_edge_difference
from distill.functional.votes import neighbor_votes

__all__ = [
    "activation_boundaries",
    "adjacency_divergence",
    "adjacent_congruence",
    "angle_cosines",
    "angle_difference",
    "attention_map",
    "attention_transfer",
    "cell_moments",
    "centered_gram",
    "channel_correlation_difference",
    "channel_discrepancy",
    "class_activation_difference",
    "class_cosines",
    "class_costs",
    "class_edge_difference",
    "conditional_probabilities",
    "context_difference",
    "correlation_distance",
    "cosine_distance",
    "crld",
    "divided_by_mean",
    "dkd",
    "edge_difference",
    "edges",
    "edges_of",
    "effective_number_weights",
    "factor_transfer",
    "flow_matrix",
    "fsp",
    "gaussian_distance",
    "hierarchical_context_loss",
    "huber",
    "info_nce",
    "kd",
    "kl_divergence",
    "label_margins",
    "linear_cka",
    "log_priors",
    "mcd",
    "memory_relation",
    "mlkd",
    "moment_difference",
    "nckd",
    "nearest_neighbors",
    "neighbor_distances",
    "neighbor_divergence",
    "neighbor_votes",
    "nkd",
    "node_contrast",
    "noise_contrast",
    "normalized_distances",
    "normalized_gram",
    "pack_symmetric",
    "pair_distances",
    "pearson",
    "pool",
    "probability_divergence",
    "region_means",
    "region_weights",
    "relative_squared_distances",
    "resize",
    "rld",
    "row_distances",
    "sample_edge_difference",
    "scd",
    "softmax_over_memory",
    "squared_difference",
    "standardize",
    "target_cross_entropy",
    "taylor_kernel",
    "tckd",
    "to_common_grid",
    "transport_among_others",
    "unpack_symmetric",
    "vid",
    "with_margins",
]
