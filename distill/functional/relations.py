"""Relations among the tokens of one network, read off their Gram matrix: no `[L, L, d]` tensor is built."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pair_distances(x: Tensor, present: Tensor | None = None) -> Tensor:
    """Euclidean distances between all pairs of tokens.

    Two tokens that cannot be told apart (squared distance below 1e-12 or within the rounding of the Gram matrix) are
    at distance exactly 0, with gradient 0.

    Args:
        x: `[..., L, d]`.
        present: bool `[..., L]`, without it all are; an absent token is at distance 0 from every other.

    Returns:
        `[..., L, L]`, symmetric, 0 on the diagonal.
    """
    return gram_distances(centered_gram(x), present)


def normalized_distances(x: Tensor, present: Tensor | None = None) -> Tensor:
    """Pair distances divided by the mean of the non-zero ones among the same L tokens.

    Args:
        x: `[..., L, d]`.
        present: bool `[..., L]`, without it all are; an absent token is at distance 0 and takes no part in the mean.

    Returns:
        `[..., L, L]`; all 0 where all tokens are equal.
    """
    distances = pair_distances(x, present)
    pairs = (distances != 0).sum(dim=(-2, -1), keepdim=True).clamp_min(1)
    mean = distances.sum(dim=(-2, -1), keepdim=True) / pairs
    return distances / mean.masked_fill(mean == 0, 1.0)


def relative_squared_distances(x: Tensor) -> Tensor:
    """Squared pair distances divided by the largest among the same L tokens.

    Args:
        x: `[..., L, d]`.

    Returns:
        `[..., L, L]`, between 0 and 1; all 0 where all tokens are equal.
    """
    squared = pair_distances(x).square()
    largest = squared.amax(dim=(-2, -1), keepdim=True)
    return squared / largest.masked_fill(largest == 0, 1.0)


def angle_cosines(x: Tensor, present: Tensor | None = None) -> Tensor:
    """Cosines of the angles in all triangles of tokens.

    Args:
        x: `[..., L, d]`.
        present: bool `[..., L]`, without it all are; a cosine in which an absent token takes part is 0.

    Returns:
        `[..., L, L, L]`; the entry `[i, j, k]` belongs to the angle at the vertex `i` between the edges to `j` and to
        `k`. It is 0 where an edge has no length, so wherever `i = j` or `i = k`.
    """
    gram = centered_gram(x)
    distances = gram_distances(gram, present)
    inverse = distances.masked_fill(distances == 0, math.inf).reciprocal()
    # (x_j - x_i)(x_k - x_i) = G_jk - (G_ij - G_ii / 2) - (G_ik - G_ii / 2)
    offset = gram - gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) / 2
    products = gram.unsqueeze(-3) - offset.unsqueeze(-1) - offset.unsqueeze(-2)
    return products * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)


def centered_gram(x: Tensor) -> Tensor:
    """Products of all pairs of tokens `[..., L, d]` about their mean, `[..., L, L]`."""
    x = x - x.mean(dim=-2, keepdim=True)  # a far origin would cost the differences their digits
    return x @ x.mT


def gram_distances(gram: Tensor, present: Tensor | None = None) -> Tensor:
    """The distances of `pair_distances` from the Gram matrix `[..., L, L]` of centered tokens."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    sums = squares.unsqueeze(-1) + squares.unsqueeze(-2)
    squared = sums - 2 * gram
    noise = (4 * torch.finfo(gram.dtype).eps * sums.detach()).clamp_min(1e-12)
    equal = squared <= noise  # False for NaN, which must not turn into a distance of 0
    if present is not None:
        equal = equal | ~(present.unsqueeze(-1) & present.unsqueeze(-2))
    return squared.masked_fill(equal, 1.0).sqrt().masked_fill(equal, 0.0)
