"""Relations among the tokens of one network, from their Gram matrix: no `[L, L, d]` tensor is built.

With `rows`, a function returns this rank's rows `[R, L]` of the relation among the L tokens of all ranks, and all ranks
call it together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.distributed import ALL_ROWS, Rows


def pair_distances(x: Tensor, present: Tensor | None = None, rows: Rows = ALL_ROWS) -> Tensor:
    """Return Euclidean distances between all pairs of tokens.

    >>> pair_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([[0., 5.],
            [5., 0.]])

    Indistinguishable tokens (squared distance below 1e-12 or within the rounding error of the Gram matrix) have
    distance exactly 0, with gradient 0.

    Args:
        x: `[..., L, d]`.
        present: bool `[..., L]`, by default all; an absent token has distance 0 to every other.
        rows: the rows to compute, by default all.

    Returns:
        `[..., L, L]`, symmetric, 0 on the diagonal; or `[R, L]`.
    """
    return gram_distances(centered_gram(x, rows), present, rows)


def normalized_distances(x: Tensor, present: Tensor | None = None, rows: Rows = ALL_ROWS) -> Tensor:
    """Return pair distances divided by the mean of the non-zero distances among the same L tokens.

    Args:
        x: `[..., L, d]`.
        present: bool `[..., L]`, by default all; an absent token has distance 0 and is left out of the mean.
        rows: the rows to compute, by default all; the mean runs over all.

    Returns:
        `[..., L, L]`, or `[R, L]`; all 0 if all tokens are equal.
    """
    return divided_by_mean(pair_distances(x, present, rows), rows)


def divided_by_mean(distances: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
    """Return distances, or the own rows of them, divided by the mean of all that are not 0."""
    pairs, total = (part.sum(dim=(-2, -1), keepdim=True) for part in (distances != 0, distances))
    if rows.ranks > 1:
        total, pairs = rows.sum(torch.stack([total, pairs.to(total)]))
    mean = total / pairs.clamp_min(1)
    return distances / mean.masked_fill(mean == 0, 1.0)


def relative_squared_distances(x: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
    """Return squared pair distances divided by the largest among the same L tokens.

    Args:
        x: `[..., L, d]`.
        rows: the rows to compute, by default all.

    Returns:
        `[..., L, L]`, or `[R, L]`, between 0 and 1; all 0 if all tokens are equal.
    """
    squared = pair_distances(x, rows=rows).square()
    largest = rows.amax(squared)
    return squared / largest.masked_fill(largest == 0, 1.0)


def angle_cosines(x: Tensor, present: Tensor | None = None) -> Tensor:
    """Return the cosines of the angles in all triangles of tokens.

    Args:
        x: `[..., L, d]`.
        present: bool `[..., L]`, by default all; cosines that involve an absent token are 0.

    Returns:
        `[..., L, L, L]`; entry `[i, j, k]` is the cosine at vertex `i` between the edges to `j` and `k`, 0 if an edge
        has no length, in particular if `i = j` or `i = k`.
    """
    gram = centered_gram(x)
    distances = gram_distances(gram, present)
    inverse = distances.masked_fill(distances == 0, math.inf).reciprocal()
    # (x_j - x_i)(x_k - x_i) = G_jk - (G_ij - G_ii / 2) - (G_ik - G_ii / 2)
    offset = gram - gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) / 2
    products = gram.unsqueeze(-3) - offset.unsqueeze(-1) - offset.unsqueeze(-2)
    return products * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)


def centered_gram(x: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
    """Return the Gram matrix `[..., L, L]`, or its rows, of tokens `[..., L, d]` centered on their mean."""
    x = x - x.mean(dim=-2, keepdim=True)  # a distant origin would cost digits of the differences
    return x[..., rows.index, :] @ x.mT


def gram_distances(gram: Tensor, present: Tensor | None = None, rows: Rows = ALL_ROWS) -> Tensor:
    """Return the distances of `pair_distances` from the Gram matrix, as `centered_gram` returns it."""
    # The squares come from the products themselves: computed otherwise, their rounding would part equal tokens.
    own_squares = gram[..., rows.index].diagonal(dim1=-2, dim2=-1)
    return distances_of_products(gram, own_squares, rows.gather(own_squares), present, rows)


def row_distances(gram: Tensor, present: Tensor | None = None, rows: Rows = ALL_ROWS) -> Tensor:
    """Return the own rows of the distances of `pair_distances` from the whole Gram matrix."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    return distances_of_products(gram[..., rows.index, :], squares[..., rows.index], squares, present, rows)


def distances_of_products(
    products: Tensor, own_squares: Tensor, squares: Tensor, present: Tensor | None = None, rows: Rows = ALL_ROWS
) -> Tensor:
    """Return distances from inner products.

    Args:
        products: of the tokens of the own rows with all, `[..., R, L]`.
        own_squares: squared lengths of the tokens of the own rows, `[..., R]`.
        squares: squared lengths of all tokens, `[..., L]`.
        present: bool `[..., L]`, by default all.
        rows: the own rows.

    Returns:
        `[..., R, L]`.
    """
    sums = own_squares.unsqueeze(-1) + squares.unsqueeze(-2)
    squared = sums - 2 * products
    noise = (4 * torch.finfo(products.dtype).eps * sums.detach()).clamp_min(1e-12)
    equal = squared <= noise  # False for NaN, which must not turn into a distance of 0
    if present is not None:
        equal = equal | ~(present[..., rows.index].unsqueeze(-1) & present.unsqueeze(-2))
    return squared.masked_fill(equal, 1.0).sqrt().masked_fill(equal, 0.0)


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Return the lower triangles of symmetric matrices `[..., L, L]`, row by row: `[..., L (L + 1) / 2]`.

    >>> pack_symmetric(torch.tensor([[1, 2], [2, 3]]))
    tensor([1, 2, 3])
    """
    size = matrix.shape[-1]
    row, column = torch.tril_indices(size, size, device=matrix.device)
    return matrix[..., row, column]


def unpack_symmetric(packed: Tensor) -> Tensor:
    """Return the symmetric matrices `[..., L, L]` whose lower triangles are given.

    >>> unpack_symmetric(torch.tensor([1, 2, 3]))
    tensor([[1, 2],
            [2, 3]])
    """
    size = (math.isqrt(8 * packed.shape[-1] + 1) - 1) // 2
    index = torch.arange(size, device=packed.device)
    row, column = torch.maximum(index.unsqueeze(1), index), torch.minimum(index.unsqueeze(1), index)
    return packed[..., row * (row + 1) // 2 + column]
