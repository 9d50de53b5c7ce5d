"""Stanford Cars as its devkit describes it, written small."""

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision.transforms.functional import to_pil_image

from distill.data import StanfordCars, TimmAugmentation
from distill.errors import UserError

FIELDS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")


def write_cars(root, train=8, test=4):
    """MATLAB's files with one record an image, classes from 1 to 196; photos of one color."""
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.empty((1, 196), dtype=object)
    names[0] = [f"Car {number}" for number in range(196)]
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    for split, count, table in (
        ("train", train, "devkit/cars_train_annos.mat"),
        ("test", test, "cars_test_annos_withlabels.mat"),
    ):
        (folder / f"cars_{split}").mkdir()
        records = np.empty((1, count), dtype=[(field, object) for field in FIELDS])
        for number in range(count):
            name = f"{number + 1:05}.jpg"
            records[0, number] = (1, 1, 60, 40, 25 * number + 1, name)
            to_pil_image(torch.full((3, 40, 60), number / 10)).save(folder / f"cars_{split}" / name)
        savemat(folder / table, {"annotations": records})
    return root


def test_cars_are_read_by_their_annotations(tmp_path):
    data = StanfordCars(str(write_cars(tmp_path)), image_size=32, augment=False, num_workers=0)
    train, test = data.samples("train"), data.samples("test")
    assert (len(train), len(test), len(data.samples("val"))) == (8, 4, 4)
    assert (data.num_classes, data.image_shape) == (196, (3, 32, 32))
    for samples in (train, test):
        for index in range(len(samples)):
            assert samples[index]["label"] == 25 * index
            assert torch.allclose(samples[index]["image"], torch.tensor(index / 10), atol=0.01)


def test_training_images_are_augmented_by_crops_or_as_timm_does(tmp_path):
    root = str(write_cars(tmp_path))
    augment = TimmAugmentation(auto_augment="rand-m9-mstd0.5-inc1")
    images = StanfordCars(root, image_size=32, augment=augment, interpolation="bicubic").samples("train")
    drawn = torch.stack([images[(draw, 5)]["image"] for draw in range(8)])
    assert drawn.shape == (8, 3, 32, 32)
    assert len({image.mean().item() for image in drawn}) > 2, "the policy changes colors"
    assert StanfordCars(root, image_size=48).samples("train")[(0, 5)]["image"].shape == (3, 48, 48)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: folder.rename(folder.with_name("cars")), "lacks 'devkit/cars_meta.mat'; .*issues/7545"),
        (lambda folder: (folder / "cars_test_annos_withlabels.mat").unlink(), "lacks 'cars_test_annos_withlabels.mat'"),
        (lambda folder: (folder / "devkit/cars_train_annos.mat").write_bytes(b"MATLAB"), "is incomplete or corrupt"),
    ],
    ids=["another folder", "no labels of the test images", "annotations are cut short"],
)
def test_what_cannot_be_read_is_told_in_one_sentence(spoil, message, tmp_path):
    spoil(write_cars(tmp_path) / "stanford_cars")
    with pytest.raises(UserError, match=message) as caught:
        StanfordCars(str(tmp_path)).samples("train")
    assert "\n" not in str(caught.value)
