"""Tokens of pixel segments: means of the patch tokens that a segment covers."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.errors import UserError, require_at_least
from distill.superpixels.association import Grid, check_grid


def segment_tokens(tokens: Tensor, grid: Grid, segments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of the patch tokens, weighted by the fraction of each segment's pixels in each patch.

    A pixel belongs to the patch that contains its center, for any sizes of image and grid, so that networks with
    different grids can share a segmentation.

    Args:
        tokens: `[B, N, d]`, row by row.
        grid: `(h, w)` of the tokens, `h * w = N`.
        segments: integers `[B, H, W]`; a pixel whose label is not in `0 .. count - 1` belongs to no segment.
        count: K, the maximum number of segments.

    Returns:
        The tokens of the segments `[B, K, d]`, 0 for segments without a pixel, and bool `[B, K]`, true for segments
        with a pixel.

    Raises:
        UserError: shapes do not match, or labels are not integers.
    """
    _check(tokens, grid, segments, count)
    batch, patches = len(tokens), grid[0] * grid[1]
    within = (segments >= 0) & (segments < count)
    columns = segments.long().where(within, count)  # an additional column for the pixels of no segment
    rows = _patches(grid, segments) + patches * torch.arange(batch, device=segments.device).view(-1, 1, 1)
    cells = (rows * (count + 1) + columns).flatten()
    # A sum of integers, which does not depend on the order of additions on a GPU.
    pixels = torch.zeros(batch * patches * (count + 1), dtype=torch.int32, device=segments.device)
    pixels = pixels.index_add(0, cells, torch.ones_like(cells, dtype=torch.int32))
    pixels = pixels.view(batch, patches, count + 1)[..., :count].mT.to(tokens.dtype)
    sizes = pixels.sum(dim=-1, keepdim=True)
    return pixels / sizes.clamp_min(1) @ tokens, sizes.squeeze(-1) > 0


def _patches(grid: Grid, segments: Tensor) -> Tensor:
    """Return the patch of each pixel, `[H, W]`."""
    row, column = (
        (2 * torch.arange(pixels, device=segments.device) + 1) * n // (2 * pixels)
        for n, pixels in zip(grid, segments.shape[1:], strict=True)
    )
    return row.unsqueeze(1) * grid[1] + column


def _check(tokens: Tensor, grid: Grid, segments: Tensor, count: int) -> None:
    check_grid(tokens, grid)
    if segments.ndim != 3 or len(segments) != len(tokens) or segments.is_floating_point():
        raise UserError(
            f"segments must be integers [B, H, W] for {len(tokens)} images, given {segments.dtype} of shape "
            f"{tuple(segments.shape)}"
        )
    require_at_least(1, count=count)
