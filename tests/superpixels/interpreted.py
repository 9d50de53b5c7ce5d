"""Comparison of the Triton kernels with torch on the CPU, where Triton interprets them: run as a program.

Triton must be told by `TRITON_INTERPRET=1` before it is loaded.
"""

from __future__ import annotations

import torch

from distill.superpixels.clustering import Clustering, cell_grid
from distill.superpixels.color import rgb_to_lab
from distill.superpixels.triton_slic import triton_clustering
from tests.superpixels.photos import photos


def main() -> None:
    """Compare labels, colors and centers."""
    uneven = photos(23)[2:4]
    gray_of_two_kinds = torch.full((1, 1, 21, 21), 0.3)  # its pixels are often equally near to two centers
    gray_of_two_kinds[:, :, :, 11:] = 0.0
    with_nan = photos(16)[:1].clone()
    with_nan[0, :, 3, 3] = torch.nan
    for images, segments in ((uneven, 7), (gray_of_two_kinds, 9), (with_nan, 4), (photos(16)[:1].half(), 2)):
        size, colors = (images.shape[2], images.shape[3]), rgb_to_lab(images)
        grid = cell_grid(segments, *size)
        labels, centers = Clustering(size, grid, 10.0, 4, len(images), colors.new_empty(()))(colors)
        found = triton_clustering(images, grid, 10.0, 4)
        assert torch.equal(found[0], labels)
        torch.testing.assert_close(found[1], colors, rtol=1e-4, atol=2e-4, equal_nan=True)
        if images is not with_nan:
            torch.testing.assert_close(found[2], centers, rtol=1e-4, atol=2e-4)


if __name__ == "__main__":
    main()
