"""The decoders of image files give the same pixels and refuse the same files."""

import io
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms.functional import pil_to_tensor

from distill.data import ImageFolder, TimmAugmentation, photo_transform, read_image
from distill.data.decoders import READERS, read_tensor
from distill.errors import UserError
from distill.randomness import seeded_by
from tests.data.test_image_files import BROKEN, SEEN

PHOTO = Image.fromarray(load_sample_images().images[0])


def jpeg(size, mode="RGB", **options):
    stream = io.BytesIO()
    PHOTO.resize(size).convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


def difference(content):
    """The largest difference of the two decoders in levels of 255."""
    expected = pil_to_tensor(read_image(content))
    found = read_tensor(content)
    assert found.shape == expected.shape
    assert found.dtype == torch.uint8
    return (found.int() - expected.int()).abs().max().item()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(500, 375), (17, 23), (1, 1), (33, 7)])
def test_the_pixels_of_a_photo_are_equal(size, mode):
    for quality in (30, 95):
        for progressive in (False, True):
            for subsampling in (0, 1, 2):
                content = jpeg(size, mode, quality=quality, progressive=progressive, subsampling=subsampling)
                assert difference(content) <= 1


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_orientation_is_applied(mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert difference(jpeg((31, 14), mode, exif=exif)) <= 1


def test_of_several_pictures_in_a_file_the_first_is_taken():
    stream = io.BytesIO()
    PHOTO.resize((40, 30)).save(stream, "MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    assert Image.open(stream).format == "MPO"
    assert difference(stream.getvalue()) <= 1


@pytest.mark.parametrize("name", SEEN)
def test_all_other_files_are_read_alike(name):
    assert difference(SEEN[name][0]) == 0


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_the_same_words(name, tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(BROKEN[name][0])
    messages = []
    for read in READERS.values():
        for file in (str(path), path.read_bytes()):
            with pytest.raises(UserError) as caught:
                read(file, "data: row 7 of train")
            messages.append(str(caught.value))
    assert len(set(messages)) == 1
    assert messages[0].startswith("data: row 7 of train ")


def outcome(read, content):
    try:
        found = read(content)
    except UserError as error:
        return str(error)
    return found if isinstance(found, torch.Tensor) else pil_to_tensor(found)


WHOLE = [jpeg((48, 40)), jpeg((48, 40), progressive=True), jpeg((48, 40), "L"), jpeg((48, 40), subsampling=0)]


@settings(max_examples=200)
@given(st.data())
def test_damaged_photos_are_read_or_refused_alike(data):
    content = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    expected, found = (outcome(read, content) for read in READERS.values())
    if isinstance(expected, str) or isinstance(found, str):
        assert expected == found
    else:
        assert expected.shape == found.shape
        assert (expected.int() - found.int()).abs().max() <= 1


AUGMENTATIONS = [False, True, TimmAugmentation(auto_augment="rand-m9-mstd0.5-inc1", erasing=0.5)]


@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_transformed_photo_is_the_same(augment, interpolation):
    transform = photo_transform(64, augment, interpolation)
    content = jpeg((200, 150))
    results = []
    for read in READERS.values():
        with seeded_by(3):
            results.append(transform(read(content)))
    assert torch.allclose(*results, rtol=0, atol=1.01 / 255)


def test_a_folder_is_read_by_either(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                (tmp_path / split / name / f"{number}.jpg").write_bytes(jpeg((50 + 3 * number, 40)))
    images = {}
    for decoder in READERS:
        data = ImageFolder(str(tmp_path), image_size=32, batch_size=4, num_workers=0, decoder=decoder)
        assert isinstance(data.samples("train").source[0][0], torch.Tensor if decoder == "torchvision" else Image.Image)
        images[decoder] = next(iter(data.train_dataloader()))["image"]
    assert torch.equal(*images.values())


def test_another_decoder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.decoder cannot be 'cv2'"):
        ImageFolder(str(tmp_path), decoder="cv2")


@pytest.mark.slow
def test_torchvision_decodes_large_photos_faster():
    content = jpeg((1600, 1200), quality=90)
    assert np.asarray(read_image(content)).shape == (1200, 1600, 3)
    transform = photo_transform(224, False, "bilinear")
    best = dict.fromkeys(READERS, float("inf"))
    for _ in range(20):
        for decoder, read in READERS.items():
            start = time.process_time()
            transform(read(content))
            best[decoder] = min(best[decoder], time.process_time() - start)
    assert best["torchvision"] < best["pil"]
