"""Superpixels: soft ones on token grids, hard ones on pixels, and the tokens that lie under them."""

from distill.superpixels.association import soft_association, soft_superpixels, superpixel_grid
from distill.superpixels.batch import add_segments
from distill.superpixels.pixels import slic
from distill.superpixels.pooling import segment_tokens

__all__ = ["add_segments", "segment_tokens", "slic", "soft_association", "soft_superpixels", "superpixel_grid"]
