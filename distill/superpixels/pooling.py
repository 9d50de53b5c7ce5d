"""Tokens of pixel segments: means of the patch tokens that a segment lies on."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.errors import UserError
from distill.superpixels.association import Grid, check_grid


def segment_tokens(tokens: Tensor, grid: Grid, segments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean of the patch tokens, weighted by the share of each segment's pixels that fall in each patch.

    A pixel falls in the patch that its center lies in, whatever the sizes of image and grid: two networks share one
    segmentation, be their grids as they may.

    Args:
        tokens: `[B, N, d]`, row by row.
        grid: `(h, w)` of the tokens, `h * w = N`.
        segments: integers `[B, H, W]`; a pixel whose label is not in `0 .. count - 1` belongs to no segment.
        count: K, how many segments there may be.

    Returns:
        The segments' tokens `[B, K, d]`, 0 where a segment has no pixel, and which have one, bool `[B, K]`.

    Raises:
        UserError: shapes that do not fit each other, or labels that are no integers.
    """
    _check(tokens, grid, segments, count)
    batch, patches = len(tokens), grid[0] * grid[1]
    within = (segments >= 0) & (segments < count)
    columns = segments.long().where(within, count)  # one column more, for the pixels of no segment
    rows = _patches(grid, segments) + patches * torch.arange(batch, device=segments.device).view(-1, 1, 1)
    places = (rows * (count + 1) + columns).flatten()
    # Integers are summed: the order, which a GPU does not keep, does not matter.
    pixels = torch.zeros(batch * patches * (count + 1), dtype=torch.int32, device=segments.device)
    pixels = pixels.index_add(0, places, torch.ones_like(places, dtype=torch.int32))
    pixels = pixels.view(batch, patches, count + 1)[..., :count].mT.to(tokens.dtype)
    sizes = pixels.sum(dim=-1, keepdim=True)
    return pixels / sizes.clamp_min(1) @ tokens, sizes.squeeze(-1) > 0


def _patches(grid: Grid, segments: Tensor) -> Tensor:
    """The patch of each pixel: `[H, W]`."""
    row, column = (
        (2 * torch.arange(pixels, device=segments.device) + 1) * n // (2 * pixels)
        for n, pixels in zip(grid, segments.shape[1:], strict=True)
    )
    return row.unsqueeze(1) * grid[1] + column


def _check(tokens: Tensor, grid: Grid, segments: Tensor, count: int) -> None:
    check_grid(tokens, grid)
    if segments.ndim != 3 or len(segments) != len(tokens) or segments.is_floating_point():
        raise UserError(
            f"segments must be integers [B, H, W] for {len(tokens)} images, they are {segments.dtype} of shape "
            f"{tuple(segments.shape)}"
        )
    if count < 1:
        raise UserError(f"count must be at least 1, given {count}")
