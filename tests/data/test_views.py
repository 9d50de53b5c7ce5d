"""Several views of a training image: their keys, their order in a batch, and what follows them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torchvision.transforms import v2

from distill.data import (
    ArraySource,
    Digits,
    ImageData,
    ImageDataset,
    Mixing,
    RandAugment,
    Split,
    TimmAugmentation,
    as_batch,
    small_image_transform,
)
from distill.data.mixing import mix
from distill.data.samplers import ShuffledSampler
from distill.data.views import View
from distill.distributed import own_rows
from distill.errors import UserError
from distill.given import Writer
from distill.randomness import seeded_by
from tests.two_ranks import RankPool

TWO = ["weak", "strong"]


class Colored(ImageData):
    """Sixteen pictures of random colors."""

    num_classes = 4
    image_shape = (3, 16, 16)

    def samples(self, split: Split) -> ImageDataset:
        """Return the same pictures as every split."""
        pixels = torch.randint(256, (16, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return ImageDataset(ArraySource(pixels.numpy(), [0, 1, 2, 3] * 4), small_image_transform(16, split == "train"))


def batch(data: ImageData, epoch: int = 0) -> dict[str, Any]:
    loader: Any = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    found: dict[str, Any] = next(iter(loader))
    return found


@pytest.mark.parametrize("views", [None, ["weak"]])
def test_one_view_is_augmented_by_seed_draw_and_index_alone(views: Any) -> None:
    data = Colored(batch_size=8, train_views=views)
    found, samples = batch(data, epoch=3), Colored().samples("train")
    assert list(found) == ["image", "label", "index", "draw"], "and says nothing of views"
    for image, index in zip(found["image"], found["index"].tolist(), strict=True):
        with seeded_by("augmentation", samples.seed, 3, index):
            assert torch.equal(image, samples.transform(samples.source[index][0]))


def test_a_batch_holds_view_after_view_and_the_first_is_that_of_one_view() -> None:
    alone, found = batch(Colored(batch_size=8)), batch(Colored(batch_size=8, train_views=["weak", "strong", "weak"]))
    assert found["view"].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    for key in ("label", "index", "draw"):
        assert torch.equal(found[key], alone[key].repeat(3)), key
    views = found["image"].split(8)
    assert torch.equal(views[0], alone["image"])
    assert not torch.equal(views[2], alone["image"]), "the same augmentation under another key is another draw"
    assert found["image"].min() >= 0
    assert found["image"].max() <= 1


def test_the_strong_view_is_torchvisions_randaugment_after_the_weak_one() -> None:
    data = Colored(batch_size=8, train_views=["weak", RandAugment(operations=3, magnitude=20)])
    found, samples = batch(data), Colored().samples("train")
    for image, index in zip(found["image"][8:], found["index"].tolist(), strict=False):
        with seeded_by("augmentation", samples.seed, 0, index, 1):
            weak = samples.transform(samples.source[index][0])
            expected = v2.RandAugment(3, 20)((255 * weak).round().byte()).float() / 255
        assert torch.equal(image, expected)


def test_gray_pictures_are_moved_alone_unless_one_asks_for_more() -> None:
    flat = torch.full((3, 32, 32), 0.5)
    samples = {
        geometric: Digits(train_views=["weak", RandAugment(6, 30, geometric)])._cached("train")
        for geometric in (None, False)
    }
    shades: dict[bool | None, set[int]] = {}
    for geometric, dataset in samples.items():
        strong: Any = dataset.views[1]
        object.__setattr__(strong, "weak", lambda image: flat)
        values: set[int] = set()
        for seed in range(20):
            with seeded_by(seed):
                values |= set((255 * strong(None)).round().int().flatten().tolist())
        shades[geometric] = values
    assert shades[None] <= {0, 128}, "no operation but the black that moves in changes a pixel"
    assert len(shades[False]) > 2


def test_an_augmentation_of_timm_is_a_view_of_its_own() -> None:
    found = batch(Colored(batch_size=8, train_views=["weak", TimmAugmentation("rand-m9-mstd0.5-inc1", erasing=0.25)]))
    assert found["image"].shape == (16, 3, 16, 16)
    assert torch.equal(found["image"][:8], batch(Colored(batch_size=8))["image"])


def test_a_configuration_can_say_the_views_of_an_object() -> None:
    written = Writer().write(Digits(train_views=["weak", RandAugment(3), TimmAugmentation(erasing=0.2)]), "data")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--views", type=list[View] | None)
    parsed = parser.parse_object({"views": written["init_args"]["train_views"]})
    assert parser.instantiate_classes(parsed).views == ["weak", RandAugment(3), TimmAugmentation(erasing=0.2)]


def test_workers_and_resuming_change_no_view() -> None:
    settings: dict[str, Any] = {"batch_size": 4, "train_views": TWO}
    alone, helped = (list(Colored(num_workers=workers, **settings).train_dataloader()) for workers in (0, 2))
    assert len(alone) == 4, "a batch counts images, not views"
    for first, second in zip(alone, helped, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
    loader: Any = Colored(**settings).train_dataloader()
    iterator = iter(loader)
    next(iterator)
    resumed: Any = Colored(**settings).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(next(iter(resumed))["image"], alone[1]["image"])


def test_the_views_of_two_ranks_are_dealt_from_the_batch_of_one_process() -> None:
    dataset = Colored(train_views=TWO)._cached("train")
    whole = dataset.__getitems__(list(ShuffledSampler(dataset, 1, 0, seed=0))[:8])
    images = torch.stack([sample["image"] for sample in whole])
    for rank in range(2):
        own = dataset.__getitems__(list(ShuffledSampler(dataset, 2, rank, seed=0))[:4])
        assert torch.equal(torch.stack([sample["image"] for sample in own]), images[rank::2])


def test_a_key_with_a_view_asks_for_that_view_alone() -> None:
    dataset = Colored(train_views=TWO)._cached("train")
    both = dataset.__getitems__([(2, 5), (2, 6)])
    alone = dataset.__getitems__([(2, 5, 1), (2, 6, 1)])
    assert [sample["index"] for sample in both] == [5, 6, 5, 6]
    for one, other in zip(both[2:], alone, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert "view" not in other


def test_evaluation_and_the_neighbors_of_a_probe_have_one_view() -> None:
    data = Digits(batch_size=8, train_views=TWO)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        found = next(iter(loader))
        assert len(found["image"]) == 8
        assert "view" not in found
    assert len(data.samples("train").__getitems__([0, 1])) == 2, "of which a probe embeds the images"


def test_further_fields_and_stored_rows_follow_each_view() -> None:
    dataset = Colored(train_views=TWO)._cached("train")
    dataset.extra_fields = lambda image: {"mean": image.mean()}
    asked: list[Any] = []

    def stored(keys: Any) -> list[dict[str, Any]]:
        asked.extend(keys)
        return [{"row": key} for key in keys]

    dataset.stored = stored
    found = dataset.__getitems__([(3, 5), (3, 6)])
    assert all(torch.equal(sample["mean"], sample["image"].mean()) for sample in found)
    assert asked == [(6, 5), (6, 6), (7, 5), (7, 6)], "two views of draw 3"
    assert [sample["stored"]["row"] for sample in found] == asked


def test_a_dataset_with_views_is_pickled_for_workers() -> None:
    dataset = Colored(train_views=[*TWO, RandAugment()])._cached("train")
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[(0, 1, 2)]["image"], dataset[(0, 1, 2)]["image"])


def mixed(image: Tensor, label: Tensor, segments: Tensor, mixing: Mixing, views: int) -> dict[str, Any]:
    """A rank's part of a batch of whole views, mixed."""
    own = {"image": own_rows(image), "label": own_rows(label), "segments": own_rows(segments)}
    own |= {"view": torch.arange(len(own["image"])) * views // len(own["image"])} if views > 1 else {}
    return mix(own, 5, mixing, seed=3, views=views)


def views_to_mix(images: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2 * images, 3, 8, 8, generator=generator)
    label = torch.randint(5, (images,), generator=generator).repeat(2)
    return image, label, torch.randint(4, (2 * images, 8, 8), generator=generator)


KINDS = pytest.mark.parametrize("mixing", [Mixing(mixup=0.4), Mixing(cutmix=1.0)], ids=["mixup", "cutmix"])


@KINDS
@pytest.mark.parametrize("images", [8, 5])
def test_each_view_is_mixed_as_it_would_be_alone(mixing: Mixing, images: int) -> None:
    whole = views_to_mix(images)
    found = mixed(*whole, mixing, 2)
    for view in range(2):
        rows = slice(view * images, (view + 1) * images)
        alone = mixed(*(part[rows] for part in whole), mixing, 1)
        for key in alone:
            assert torch.equal(found[key][rows], alone[key]), key


@pytest.mark.slow
def test_two_ranks_mix_the_views_of_one_process() -> None:
    pool = RankPool(timeout=240.0)  # its first call loads Lightning
    try:
        for mixing, images in ((Mixing(mixup=0.4), 8), (Mixing(cutmix=1.0), 6)):  # 3 images each: partners elsewhere
            whole = views_to_mix(images)
            found = mixed(*whole, mixing, 2)
            for rank, part in enumerate(pool.run(mixed, *whole, mixing, 2)):
                assert all(torch.equal(part[key], found[key][rank::2]) for key in ("image", "label"))
    finally:
        pool.close()


def test_mixing_whose_views_would_get_other_partners_is_refused() -> None:
    images = {"image": torch.rand(6, 3, 8, 8), "label": torch.zeros(6, dtype=torch.int64)}
    numbered = {**images, "view": torch.arange(6) // 3}
    for raw, views in ((numbered, 1), (images, 2), (numbered, 4)):
        with pytest.raises(UserError, match="would not be mixed alike"):
            mix(raw, 5, Mixing(mixup=1.0), 0, views)


@pytest.mark.parametrize(
    ("views", "sentence"),
    [
        ([], "must list one or more views, such as"),
        ("strong", r"must list one or more views, such as \[weak, strong\], given 'strong'"),
        (["weak", "srong"], "there is no view 'srong': did you mean 'strong'"),
    ],
)
def test_views_that_are_none_are_refused(views: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Digits(train_views=views)
    with pytest.raises(UserError, match="magnitude must be from 0 to 30, given 31"):
        RandAugment(magnitude=31)


def test_views_of_different_sizes_are_refused() -> None:
    dataset = Colored(train_views=TWO)._cached("train")
    dataset.views = [*dataset.views[:1], small_image_transform(12, augment=False)]
    with pytest.raises(UserError, match="view 1 of an image is 3 x 12 x 12, but view 0 is 3 x 16 x 16"):
        dataset.__getitems__([(0, 1)])


def test_the_views_of_a_users_batch_are_numbered_by_row() -> None:
    found = as_batch({"image": torch.rand(4, 3, 8, 8), "view": [0, 0, 1, 1]})
    assert found["view"].dtype == torch.int64
    with pytest.raises(UserError, match=r"view has the shape \[2\]"):
        as_batch({"image": torch.rand(4, 3, 8, 8), "view": [0, 1]})
