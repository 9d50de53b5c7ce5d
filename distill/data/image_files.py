"""Reading of image files, as a person sees them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy

from distill.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),  # those of torchvision's folders
    *(".avif", ".gif", ".jfif", ".jp2"),
)
"""Extensions of the files that are read as images, in lower case."""

_ORIENTATION = 0x0112  # tags of EXIF and TIFF
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339
_GRAY_SCALES = {"L;2": 85, "L;4": 17}
"""Pillow's factors from the gray values of a file with 2 or 4 bits to those of the image."""


def read_image(file: str | bytes, name: str | None = None) -> Image:
    """Read an image file as an RGB image of PIL, as a person sees it.

    Its EXIF orientation is applied, transparency is laid over white, images of more than 8 bits are scaled down to 8,
    and of an animation it is the first frame. Color profiles are not applied.

    Args:
        file: path or content of the file.
        name: of the file in messages, after the key of the configuration; by default `data.root` and its path.

    Raises:
        UserError: the file is missing, truncated or no image, or its pixels have no defined range from black to white;
            the message names the file.
    """
    with open_image(file, name) as image:
        return as_seen(image)


@contextmanager
def open_image(file: str | bytes, name: str | None = None) -> Iterator[Any]:
    """Open an image file with PIL, and report what goes wrong until it is closed by a `UserError` that names the file.

    Args:
        file: path or content of the file.
        name: of the file in messages, see `read_image`.
    """
    from PIL import Image

    name = name or f"data.root: {file if isinstance(file, str) else 'an image'}"
    try:
        # Pillow warns of broken metadata, which do not matter, and of images of half the size that it refuses.
        with warnings.catch_warnings(action="ignore"), _stream(file) as stream, Image.open(stream) as image:
            yield image
    except MemoryError:
        raise
    except _UndefinedRangeError as error:
        raise UserError(
            f"{name} has {error}, whose range from black to white is not defined: convert it to 8 or 16 bits without a "
            "sign"
        ) from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} cannot be read ({first_line(error)}): shrink it or remove it") from None
    except Exception as error:  # Pillow's decoders raise many types for broken files
        raise UserError(f"{name} cannot be read ({_reason(file, error)}): download it again or remove it") from None


def as_seen(image: Any) -> Image:
    """Return an open image of PIL as `read_image` does."""
    color = _transparent_color(image)
    image.load()
    if color is not None:
        image.info["transparency"] = color
    turn = transposition(image)
    shown = _over_white(_eight_bits(image))
    return shown if turn is None else shown.transpose(turn)


def transposition(image: Any) -> Transpose | None:
    """Return the operation that turns an image upright; none if its EXIF data cannot be read, as in a viewer."""
    from PIL.Image import Transpose

    try:
        return {
            2: Transpose.FLIP_LEFT_RIGHT,
            3: Transpose.ROTATE_180,
            4: Transpose.FLIP_TOP_BOTTOM,
            5: Transpose.TRANSPOSE,
            6: Transpose.ROTATE_270,
            7: Transpose.TRANSVERSE,
            8: Transpose.ROTATE_90,
        }.get(image.getexif().get(_ORIENTATION))
    except Exception:
        return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


class _UndefinedRangeError(Exception):
    """The kind of pixels that cannot be shown."""


def _transparent_color(image: Any) -> Any:
    """Return the transparent color on the scale of the pixels; Pillow gives a PNG's at the depth of the file."""
    color = image.info.get("transparency")
    tile = getattr(image, "tile", None)
    raw_mode = tile[0][3] if tile and isinstance(tile[0][3], str) else ""
    if raw_mode == "RGB;16B" and isinstance(color, tuple):
        return tuple(value >> 8 for value in color)
    return color * _GRAY_SCALES[raw_mode] if raw_mode in _GRAY_SCALES and color is not None else color


def _eight_bits(image: Any) -> Image:
    """Return an image with 8 bits per channel: of deeper gray images the high byte, as Pillow's of deeper colors."""
    from PIL import Image

    tags: Any = image.tag_v2 if image.format == "TIFF" else {}
    if set(_several(tags.get(_SAMPLE_FORMAT, 1))) & {2, 3, 5, 6}:
        raise _UndefinedRangeError("pixels with a sign or a fraction")
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # these two scale to 16 bits
        raise _UndefinedRangeError(f"pixels of 32 bits (mode {image.mode})")
    if not image.mode.startswith("I"):
        return image  # type: ignore[no-any-return]
    bits = _several(tags.get(_BITS, 16))[0] if image.mode != "I" else 16
    values = numpy.asarray(image).astype(numpy.int32)
    gray = values >> (bits - 8)
    shown = Image.fromarray((255 - gray if tags.get(_PHOTOMETRIC) == 0 else gray).astype(numpy.uint8))
    if "transparency" in image.info:
        shown.putalpha(Image.fromarray(numpy.where(values == image.info["transparency"], 0, 255).astype(numpy.uint8)))
    return shown


def _over_white(image: Image) -> Image:
    """Return an RGB image, with transparent pixels over white."""
    from PIL import Image

    if image.mode == "La":  # from which Pillow converts to nothing else
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    colors = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _stream(file: str | bytes) -> BinaryIO:
    return BytesIO(file) if isinstance(file, bytes) else open(file, "rb")


def _reason(file: str | bytes, error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, FileNotFoundError):
        return "it is missing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if not isinstance(error, UnidentifiedImageError):
        return first_line(error)
    with _stream(file) as stream:
        beginning = stream.read(64)
    if not beginning:
        return "it is empty"
    return (
        "it is a Git LFS pointer"
        if beginning.startswith(b"version https://git-lfs")
        else "it is no image that Pillow can read"
    )
