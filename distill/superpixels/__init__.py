"""Superpixels: soft association on token grids, SLIC on pixels, and pooling of tokens by segments."""

from distill.superpixels.association import soft_association, soft_superpixels, superpixel_grid
from distill.superpixels.batch import add_segments
from distill.superpixels.pixels import slic
from distill.superpixels.pooling import segment_tokens

__all__ = ["add_segments", "segment_tokens", "slic", "soft_association", "soft_superpixels", "superpixel_grid"]
