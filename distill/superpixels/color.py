"""Conversion of colors to CIELAB, the space in which superpixels are computed and evaluated."""

from __future__ import annotations

import torch
from torch import Tensor

# Linear sRGB to XYZ, each row divided by that of the white point D65.
TO_XYZ = (
    (0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883),
)


def rgb_to_lab(images: Tensor) -> Tensor:
    """Convert sRGB images to CIELAB, for illuminant D65 and the 2 degree observer.

    Args:
        images: `[B, 3, H, W]` in [0, 1], or gray, `[B, 1, H, W]`.

    Returns:
        `[B, 3, H, W]`, L from 0 to 100, in float32 (float64 stays).
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32)).expand(-1, 3, -1, -1)
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055).clamp_min(0) ** 2.4, images / 12.92)
    red, green, blue = linear.unbind(dim=1)
    # Sums instead of a matrix product, which may use reduced precision and would copy the matrix to the device.
    xyz = torch.stack([r * red + g * green + b * blue for r, g, b in TO_XYZ], dim=1)
    curved = torch.where(xyz > 0.008856, xyz.clamp_min(0) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = curved.unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
