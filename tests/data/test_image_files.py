"""All modes and depths of image files give the picture that a person sees, or are refused by name."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageCms
from torchvision.datasets.folder import pil_loader

from distill.data import read_image
from distill.errors import UserError
from tests.data.image_bytes import png, tiff, words

WHITE, BLACK, RED, GREEN = [255] * 3, [0] * 3, [255, 0, 0], [0, 255, 0]
GRAY = [0x40] * 3


def saved(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def of(mode, *pixels, palette=None):
    """An image of one row."""
    image = Image.new(mode, (len(pixels), 1))
    if palette:
        image.putpalette(palette)
    image.putdata(list(pixels))
    return image


def with_palette(*pixels):
    return of("P", *pixels, palette=[255, 0, 0, 0, 255, 0])


def animation(format):
    frames = [Image.new("RGB", (2, 1), color) for color in ("red", "lime")]
    return saved(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)


LAB = ImageCms.profileToProfile(
    Image.new("RGB", (1, 1), "red"), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
)

SEEN = {
    "1 bit": (saved(of("1", 0, 255), "PNG"), [BLACK, WHITE]),
    "1 bit, black transparent": (png(1, 0, [b"\x40"], words(0)), [WHITE] * 8),
    "2 bits": (png(2, 0, [b"\x1b"]), [[85 * value] * 3 for value in range(4)]),
    "2 bits, one transparent": (png(2, 0, [b"\x1b"], words(1)), [BLACK, WHITE, [170] * 3, WHITE]),
    "4 bits, one transparent": (png(4, 0, [b"\x12"], words(1)), [WHITE, [34] * 3]),
    "8 bits": (saved(of("L", 0, 64, 255), "PNG"), [BLACK, GRAY, WHITE]),
    "8 bits, one transparent": (png(8, 0, [b"\x10\x40"], words(0x10)), [WHITE, GRAY]),
    "16 bits": (png(16, 0, [words(0, 0x4040, 0xFFFF)]), [BLACK, GRAY, WHITE]),
    "16 bits of Pillow": (saved(of("I;16", 0, 0x4000, 0xFF00), "PNG"), [BLACK, GRAY, WHITE]),
    "16 bits, one transparent": (png(16, 0, [words(4000, 0x4000)], words(4000)), [WHITE, GRAY]),
    "16 bits of gray and alpha": (png(16, 4, [words(0x4000, 0xFFFF, 0x4000, 0)]), [GRAY, WHITE]),
    "16 bits of color": (png(16, 2, [words(0xFFFF, 0, 0, 0, 0xFFFF, 0)]), [RED, GREEN]),
    "16 bits of color, one transparent": (
        png(16, 2, [words(4000, 0, 0, 0, 0xFFFF, 0)], words(4000, 0, 0)),
        [WHITE, GREEN],
    ),
    "16 bits of color and alpha": (png(16, 6, [words(0xFFFF, 0, 0, 0xFFFF, 0, 0, 0, 0)]), [RED, WHITE]),
    "8 bits of color, one transparent": (png(8, 2, [bytes([1, 2, 3, 255, 0, 0])], words(1, 2, 3)), [WHITE, RED]),
    "palette": (saved(with_palette(0, 1), "PNG"), [RED, GREEN]),
    "palette, one transparent": (saved(with_palette(0, 1), "PNG", transparency=0), [WHITE, GREEN]),
    "palette with alpha": (png(8, 3, [b"\0\1"], b"\xff\x00"), [RED, WHITE]),
    "palette and alpha": (saved(of("PA", (0, 255), (1, 0), palette=[255, 0, 0, 0, 255, 0]), "TIFF"), [RED, WHITE]),
    "gray and alpha": (saved(of("LA", (64, 255), (64, 0)), "PNG"), [GRAY, WHITE]),
    "half transparent": (saved(of("RGBA", (255, 0, 0, 128)), "PNG"), [[255, 127, 127]]),
    "premultiplied gray": (tiff(2, bytes([64, 255, 0, 0]), 8, alpha=1), [GRAY, WHITE]),
    "color and alpha": (saved(of("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)), "WEBP", lossless=True), [RED, WHITE]),
    "CMYK": (saved(of("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), "TIFF"), [RED, WHITE]),
    "YCbCr": (saved(of("RGB", (255, 0, 0)).convert("YCbCr"), "TIFF"), [[254, 0, 0]]),
    "LAB": (saved(LAB, "TIFF"), [[251, 5, 4]]),  # red, rounded in LAB
    "16 bits, least byte first": (tiff(2, words(0x4000, 0xFFFF, order="<"), 16), [GRAY, WHITE]),
    "16 bits, most byte first": (tiff(2, words(0x4000, 0xFFFF), 16, ">"), [GRAY, WHITE]),
    "16 bits, compressed": (saved(of("I;16", 0x4000, 0xFFFF), "TIFF", compression="tiff_lzw"), [GRAY, WHITE]),
    "16 bits, white is 0": (tiff(2, words(0xBFFF, 0, order="<"), 16, photometric=0), [GRAY, WHITE]),
    "8 bits, white is 0": (tiff(2, b"\xbf\x00", 8, photometric=0), [GRAY, WHITE]),
    "12 bits": (tiff(2, b"\x40\x0f\xff", 12), [GRAY, WHITE]),
    "portable gray map of 16 bits": (b"P5 2 1 65535\n" + words(0x4040, 0xFFFF), [GRAY, WHITE]),
    "portable gray map up to 1000": (b"P5 2 1 1000\n" + words(0, 1000), [BLACK, WHITE]),
    "animated GIF": (animation("GIF"), [RED, RED]),
    "animated PNG": (animation("PNG"), [RED, RED]),
    "animated WebP": (animation("WEBP"), [RED, RED]),
    "pages of a TIFF": (animation("TIFF"), [RED, RED]),
}


@pytest.mark.parametrize("name", SEEN)
def test_an_image_is_read_as_a_person_sees_it(name, tmp_path):
    content, expected = SEEN[name]
    path = tmp_path / "image.png"
    path.write_bytes(content)
    image = read_image(str(path))
    assert image.mode == "RGB"
    assert np.asarray(image)[0].tolist() == expected


@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_a_depth_of_16_bits_shows_what_8_bits_show(tmp_path_factory, gray):
    path = str(tmp_path_factory.mktemp("image") / "deep.png")
    for deep in (gray.astype(np.uint16) * 257, gray.astype(np.uint16) << 8):
        Image.fromarray(deep).save(path)
        assert np.array_equal(np.asarray(read_image(path)), np.repeat(gray[..., None], 3, 2))


@pytest.mark.parametrize(
    ("mode", "format"), [("RGB", "PNG"), ("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "GIF")]
)
def test_ordinary_images_are_read_as_torchvision_reads_them(mode, format, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    path = tmp_path / "image"
    path.write_bytes(saved(Image.fromarray(noise).convert(mode), format))
    assert np.array_equal(np.asarray(read_image(str(path))), np.asarray(pil_loader(path)))


CORNERS = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
UPRIGHT = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.T,
    6: np.rot90(CORNERS, -1),
    7: CORNERS[::-1, ::-1].T,
    8: np.rot90(CORNERS),
}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_orientation_is_applied(orientation, format, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    path = tmp_path / "turned"
    path.write_bytes(saved(Image.fromarray(CORNERS).convert("RGB"), format, exif=exif, **options))
    assert np.array_equal(np.asarray(read_image(str(path)))[..., 0], UPRIGHT[orientation])


def test_deep_images_are_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(CORNERS.astype(np.uint16) << 8).save(path, exif=exif)
    assert np.array_equal(np.asarray(read_image(str(path)))[..., 0], UPRIGHT[6])


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_broken_exif_data_do_not_matter(exif, tmp_path):
    path = tmp_path / "image.jpg"
    Image.new("RGB", (8, 8), "white").save(path, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.asarray(read_image(str(path))).min() == 255


TEXT = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 * 2**20)))
PICTURE = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "PNG")
HUGE = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d))
    for n, d in [(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
)

BROKEN = {
    "cut short": (PICTURE[:200], "image file is truncated"),
    "cut at its beginning": (PICTURE[:20], "cannot be read"),
    "a long text": (png(8, 0, [b"\0"], chunks=[TEXT]), "Decompressed data too large"),
    "a text after the pixels": (PICTURE[:-12] + png(8, 0, [b"\0"], chunks=[TEXT])[33:], "cannot be read"),
    "wrong pixels": (PICTURE[:60] + b"wrong" + PICTURE[65:], "cannot be read"),
    "a transparent color cut short": (png(8, 2, [b"\0\0\0"], b"\0"), "Truncated tRNS chunk"),
    "empty": (b"", "it is empty"),
    "a text file": (b"this is no image", "it is no image that Pillow can read"),
    "a web page": (b"<!DOCTYPE html><html>", "it is no image that Pillow can read"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a Git LFS pointer"),
    "a JPEG cut short": (saved(Image.open(io.BytesIO(PICTURE)), "JPEG")[:900], "truncated"),
    "a GIF cut short": (saved(Image.new("P", (64, 64)), "GIF")[:30], "cannot be read"),
    "a TIFF without tags": (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "cannot be read"),
    "a BMP without size": (b"BM" + bytes(60), "cannot be read"),
    "a portable map without a maximum": (b"P5 2 1 0\n\0\0", "cannot be read"),
    "a decompression bomb": (HUGE, r"exceeds limit of \d+ pixels.*: shrink it"),
    "floating-point numbers": (saved(of("F", 0.0, 1.0), "TIFF"), "range from black to white is not defined"),
    "32 bits": (tiff(2, struct.pack("<2I", 0, 2**32 - 1), 32), r"pixels of 32 bits \(mode I\), whose range"),
    "signed 16 bits": (tiff(2, struct.pack("<2h", -1, 1), 16, sample_format=2), "pixels with a sign or a fraction"),
    "signed 8 bits": (tiff(2, struct.pack("<2b", -1, 1), 8, sample_format=2), "pixels with a sign or a fraction"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_told_in_one_sentence_that_names_the_file(name, tmp_path):
    content, message = BROKEN[name]
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_image(str(path))
    assert str(caught.value).startswith(f"data.root: {path} ")
    assert "\n" not in str(caught.value)


@given(st.data())
def test_damaged_files_raise_nothing_else(tmp_path_factory, data):
    content = bytearray(data.draw(st.sampled_from([content for content, _ in SEEN.values()])))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("image") / "image"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = read_image(str(path)).mode
        except UserError as error:
            result = str(error)
    assert result == "RGB" or str(path) in result


def test_missing_files_and_those_of_others_are_told(tmp_path):
    with pytest.raises(UserError, match=r"gone.png cannot be read \(it is missing\)"):
        read_image(str(tmp_path / "gone.png"))
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_image(str(tmp_path))
