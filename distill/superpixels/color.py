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


@torch.no_grad()
def rgb_to_lab(images: Tensor) -> Tensor:
    """Convert sRGB images to CIELAB, for illuminant D65 and the 2 degree observer, without a gradient.

    Args:
        images: `[B, 3, H, W]` in [0, 1], or gray, `[B, 1, H, W]`.

    Returns:
        `[B, 3, H, W]`, L from 0 to 100, in float32 (float64 stays).
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32)).contiguous()
    linear = _curved(images, 0.04045, (images + 0.055).mul_(1 / 1.055), 2.4, images * (1 / 12.92))
    red, green, blue = linear.expand(-1, 3, -1, -1).unbind(dim=1)
    # Sums instead of a matrix product, which may use reduced precision and would copy the matrix to the device.
    xyz = torch.stack([(r * red).add_(green, alpha=g).add_(blue, alpha=b) for r, g, b in TO_XYZ], dim=1)
    x, y, z = _curved(xyz, 0.008856, xyz.clone(), 1 / 3, (7.787 * xyz).add_(16 / 116)).unbind(dim=1)
    return torch.stack([(116 * y).sub_(16), (x - y).mul_(500), (y - z).mul_(200)], dim=1)


def _curved(values: Tensor, threshold: float, base: Tensor, exponent: float, line: Tensor) -> Tensor:
    """Return `base` to the power of `exponent` where `values` are above the threshold, and `line` elsewhere.

    On a CPU, `exp2` and `log2` take half the time of `pow`, and `lerp` a tenth of that of `where`. Overwrites `base`
    and `line`.
    """
    power = base.clamp_min_(0).log2_().mul_(exponent).exp2_()
    return torch.lerp(line, power, values.clone().gt_(threshold), out=line)
