"""Real photos that libraries ship."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate


@cache
def photos(size: int, crops: int = 2) -> Tensor:
    """Random square crops of six photos, every second one mirrored: `[6 * crops, 3, size, size]` in [0, 1]."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    pictures = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    pictures += [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    generator = torch.Generator().manual_seed(0)
    found = []
    for picture in pictures:
        whole = torch.from_numpy(picture.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
        for number in range(crops):
            share, *place = torch.rand(3, generator=generator).tolist()
            side = round((0.5 + share / 2) * min(whole.shape[2:]))
            top, left = (int(part * (room - side)) for part, room in zip(place, whole.shape[2:], strict=True))
            crop = whole[:, :, top : top + side, left : left + side]
            crop = interpolate(crop, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
            found.append(crop.flip(3) if number % 2 else crop)
    return torch.cat(found)
