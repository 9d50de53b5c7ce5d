import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from distill.data import ImageFolder, TimmAugmentation
from distill.errors import UserError


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                to_pil_image(torch.full((3, 40, 60), 0.25 if name == "cat" else 0.75)).save(folder / f"{number}.png")
    return tmp_path


def test_a_folder_of_classes_is_read(root):
    data = ImageFolder(str(root), image_size=32, batch_size=8, num_workers=0)
    assert data.num_classes == 2
    assert data.image_shape == (3, 32, 32)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    means = batch["image"].mean(dim=(1, 2, 3))
    assert torch.allclose(means, torch.where(batch["label"] == 0, 0.25, 0.75), atol=0.01)
    assert len(data.samples("test")) == 4, "without a test folder the validation images are the test"


def test_a_missing_folder_says_where_to_get_the_data(tmp_path):
    with pytest.raises(UserError, match=r"data.root: no class folders in .*train.*image-net.org"):
        ImageFolder(str(tmp_path / "nowhere"))


def test_class_folders_that_differ_between_the_splits_are_refused(root):
    (root / "val" / "cow").mkdir()
    with pytest.raises(UserError, match="has other class folders"):
        ImageFolder(str(root))


def test_timms_augmentation_gives_images_that_are_not_normalized(root):
    augment = TimmAugmentation(auto_augment="rand-m9-mstd0.5-inc1", erasing=0.0)
    data = ImageFolder(str(root), image_size=32, augment=augment, interpolation="bicubic", num_workers=0)
    images = torch.stack([data.samples("train")[(draw, 0)]["image"] for draw in range(8)])
    assert images.shape == (8, 3, 32, 32)
    assert images.min() >= -1e-5
    assert images.max() <= 1 + 1e-5
    assert len({image.mean().item() for image in images}) > 2, "the policy changes colors"


def test_erased_pixels_are_noise_about_the_mean_color(root):
    samples = ImageFolder(str(root), image_size=64, augment=TimmAugmentation(erasing=1.0)).samples("train")
    images = torch.stack([samples[(draw, 0)]["image"] for draw in range(20)])
    erased = (images - 0.25).abs() > 0.02  # all else has the folder's one color
    assert 0.02 < erased.float().mean() < 0.4
    red = images[:, 0][erased[:, 0]]
    assert abs(red.mean() - 0.485) < 0.02, "ImageNet's mean red, and"
    assert abs(red.std() - 0.229) < 0.02, "its deviation"


def test_a_policy_that_timm_does_not_know_is_refused(root):
    with pytest.raises(UserError, match="timm knows no policy 'magic'"):
        ImageFolder(str(root), augment=TimmAugmentation(auto_augment="magic")).samples("train")
