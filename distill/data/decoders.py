"""Decoders of image files, which give equal pixels at different speeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from distill.data.image_files import as_seen, open_image, read_image, transposition

if TYPE_CHECKING:
    from PIL.Image import Image

Decoder = Literal["pil", "torchvision"]


def read_tensor(file: str | bytes, name: str | None = None) -> Tensor:
    """Read an image file as a tensor, the picture of `read_image`, with torchvision's decoder where that is faster.

    That is for JPEG files of gray or RGB pixels, whose pixels are equal: both decoders are libjpeg-turbo (the test
    allows 1 of 255 levels, for builds of different versions). The header, the limit of Pillow and all other files are
    read by PIL, as are files that torchvision refuses, so that orientation, transparency, depths and messages are
    those of `read_image`.

    Args:
        file: path or content of the file.
        name: of the file in messages, see `read_image`.

    Returns:
        uint8 `[3, H, W]`.

    Raises:
        UserError: as `read_image`.
    """
    from torchvision.transforms.functional import pil_to_tensor

    with open_image(file, name) as image:
        decoded = _decoded_jpeg(image) if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") else None
        return pil_to_tensor(as_seen(image)) if decoded is None else _turned(decoded, transposition(image))


READERS: dict[Decoder, Callable[..., Image | Tensor]] = {"pil": read_image, "torchvision": read_tensor}
"""The function that reads a file, by decoder."""


def _decoded_jpeg(image: Any) -> Tensor | None:
    """Return the pixels `[3, H, W]` of an open JPEG file; none if torchvision cannot decode it."""
    from torchvision.io import ImageReadMode, decode_jpeg

    image.fp.seek(0)
    content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
    try:
        decoded: Tensor = decode_jpeg(content, mode=ImageReadMode.RGB)
    except RuntimeError:
        return None
    return decoded if decoded.shape[1:] == (image.height, image.width) else None


def _turned(pixels: Tensor, operation: int | None) -> Tensor:
    """Apply an operation of PIL's `Transpose` to pixels `[C, H, W]`."""
    from PIL.Image import Transpose

    if operation is None:
        return pixels
    dims, quarters = {
        Transpose.FLIP_LEFT_RIGHT: ([2], 0),
        Transpose.FLIP_TOP_BOTTOM: ([1], 0),
        Transpose.ROTATE_180: ([1, 2], 0),
        Transpose.ROTATE_90: ([], 1),
        Transpose.ROTATE_270: ([], 3),
        Transpose.TRANSPOSE: ([1], 1),
        Transpose.TRANSVERSE: ([1], 3),
    }[Transpose(operation)]
    return pixels.rot90(quarters, (1, 2)).flip(dims).contiguous()
