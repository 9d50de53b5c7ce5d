"""The path of pixels from the source to the device: in bytes, with the images of torchvision's own transforms."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from distill.data import ArraySource, ImageData, ImageDataset, small_image_transform
from distill.data.augmentation import in_unit_range, photo_transform
from distill.data.views import RandAugment
from distill.randomness import derive_seed

KEYS = [(draw, index) for draw in range(4) for index in range(8)]


def pixels(*shape: int) -> Tensor:
    """Bytes that are the same on any machine: the highest of multiples of a number."""
    numbers = torch.arange(int(np.prod(shape))) * 2654435761 % 2**32
    return (numbers // 2**24).to(torch.uint8).view(shape)


def literal(side: int, augment: bool) -> Any:
    crops = [v2.RandomCrop(side, padding=side // 8), v2.RandomHorizontalFlip()] if augment else []
    resize = v2.Resize((side, side), antialias=True)
    return v2.Compose([v2.ToImage(), resize, *crops, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


SOURCES = {
    "tensors": pixels(8, 1, 28, 28).expand(-1, 3, -1, -1),
    "arrays": pixels(8, 32, 32, 3).numpy(),
    "pictures": [Image.fromarray(array) for array in pixels(8, 32, 32, 3).numpy()],
    "wide pictures": [Image.fromarray(array) for array in pixels(8, 30, 50, 3).numpy()],
    "floats": pixels(8, 3, 32, 32) / 255,
    "deep": pixels(8, 3, 32, 32).to(torch.int32) * 2**20,
}


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("side", [28, 32, 9])
@pytest.mark.parametrize("source", SOURCES)
def test_small_images_are_those_of_torchvisions_transforms_bit_for_bit(source: str, side: int, augment: bool) -> None:
    samples = ImageDataset(ArraySource(SOURCES[source], [0] * 8), small_image_transform(side, augment))
    transform = literal(side, augment)
    for (draw, index), sample in zip(KEYS, samples.__getitems__(KEYS), strict=True):
        torch.manual_seed(derive_seed("augmentation", samples.seed, draw, index))
        assert torch.equal(sample["image"], transform(SOURCES[source][index]))
        assert sample["image"].dtype == torch.float32


@pytest.mark.parametrize(
    ("source", "side", "digest"),
    [
        ("tensors", 28, "72bf2193782f4683"),
        ("arrays", 32, "1d007ef763d1b925"),
        ("pictures", 32, "1d007ef763d1b925"),
    ],
)
def test_small_images_are_those_recorded_before_shift_and_flip_were_written_anew(
    source: str, side: int, digest: str
) -> None:
    samples = ImageDataset(ArraySource(SOURCES[source], [0] * 8), small_image_transform(side, True))
    found = hashlib.sha256()
    for sample in samples.__getitems__(KEYS):
        found.update(sample["image"].contiguous().numpy().tobytes())
    assert found.hexdigest()[:16] == digest


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Drawing:
    """A source that draws random numbers, as one of a user's may."""

    labels = [0] * 40

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Any, int]:
        drawn = random.random() + np.random.rand() + torch.rand(()).item()
        return torch.full((3, 8, 8), drawn), 0


def test_reading_and_augmenting_do_not_touch_each_others_random_numbers() -> None:
    samples = ImageDataset(Drawing(), lambda image: image + torch.rand(()) + np.random.randn() + random.random())
    samples.extra_fields = lambda image: {"drawn": torch.rand(())}
    seed_all(1)
    np.random.randn()  # leaves a second number waiting
    together = samples.__getitems__([(0, index) for index in range(40)])
    after = random.random(), np.random.randn(), torch.rand(()).item()
    seed_all(1)
    np.random.randn()
    for index, sample in enumerate(together):
        read, _ = samples.source[index]
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seed = derive_seed("augmentation", samples.seed, 0, index)
        seed_all(seed)
        assert torch.equal(sample["image"], samples.transform(read))
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if index % 16 == 15 or index == 39:  # the further fields come after the images that are read together
            for other in together[index - index % 16 : index + 1]:
                assert torch.equal(other["drawn"], torch.rand(()))
    assert after == (random.random(), np.random.randn(), torch.rand(()).item())


class Photos(ImageData):
    """Eight images in memory."""

    num_classes = 2

    def __init__(self, source: Any, transform: Any, **settings: Any) -> None:
        super().__init__(batch_size=4, **settings)
        self.image_shape = (3, 24, 24)
        self._source, self._transform = source, transform

    def samples(self, split: Any) -> ImageDataset:
        return ImageDataset(ArraySource(self._source, [0, 1] * 4), self._transform)


class Hooked(Photos):
    """With a hook that expects floats."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch["seen"] = batch["image"].dtype
        return batch


class Watching(LightningModule):
    """Keeps the batches, and what the loaders yielded before the hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[Any] = []
        self.yielded: list[torch.dtype] = []

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.yielded.append(batch["image"].dtype)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Early(Watching):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "image": batch["image"] * 0.5}


def fitted(data: ImageData, module: Watching | None = None) -> Watching:
    module = module or Watching()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, enable_model_summary=False, **quiet)
    trainer.fit(module, data)
    return module


def images() -> list[Image.Image]:
    return [Image.fromarray(array) for array in pixels(8, 40, 60, 3).numpy()]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_bytes_travel_to_the_device_and_become_the_floats_of_the_loader_there(workers: int) -> None:
    data = Photos(images(), photo_transform(24, True, "bilinear"), num_workers=workers)
    module = fitted(data)
    assert module.yielded == [torch.uint8] * 4
    samples = data.samples("train")
    for batch in module.batches:
        assert batch["image"].dtype == torch.float32
        keys = list(zip(batch["draw"].tolist(), batch["index"].tolist(), strict=True))
        expected = torch.stack([sample["image"] for sample in samples.__getitems__(keys)])
        assert torch.equal(batch["image"], expected)
    # After the run and beside it, who iterates over a loader gets floats, as documented.
    for loader in (data.train_dataloader(), Photos(images(), small_image_transform(24, True)).train_dataloader()):
        assert next(iter(loader))["image"].dtype == torch.float32
    assert data.keyed_dataloader("train", [(0, 0)]).dataset[0, 0]["image"].dtype == torch.float32


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: Photos(SOURCES["floats"], small_image_transform(24, True)), "pixels that are no bytes"),
        (lambda: Photos(SOURCES["deep"], small_image_transform(24, True)), "integers that are no bytes"),
        (lambda: Photos(images(), literal(24, True)), "a transform of one's own"),
        (lambda: Photos(images(), photo_transform(24, True, "bilinear"), train_views=["weak", "strong"]), "views"),
        (lambda: Hooked(images(), photo_transform(24, True, "bilinear")), "a hook of one's own, which expects floats"),
    ],
)
def test_floats_travel_where_the_images_are_no_bytes_or_somebody_sees_them_before(data: Any, reason: str) -> None:
    module = fitted(data())
    trained = module.batches[:2]
    assert module.yielded[:2] == [torch.float32] * 2, reason
    assert all(batch.get("seen", torch.float32) == torch.float32 for batch in trained)
    assert all(batch["image"].dtype == torch.float32 for batch in trained)


def test_a_module_that_changes_images_before_they_move_gets_floats() -> None:
    module = fitted(Photos(images(), photo_transform(24, True, "bilinear")), Early())
    assert module.yielded == [torch.float32] * 4
    assert all(0.4 < batch["image"].max().item() <= 0.5 for batch in module.batches)


def test_further_entries_are_computed_from_floats() -> None:
    data = Photos(images(), photo_transform(24, True, "bilinear"))
    data.extra_fields = lambda image: {"copy": image.clone()}
    module = fitted(data)
    assert module.yielded == [torch.uint8] * 4
    assert all(torch.equal(batch["copy"], batch["image"]) for batch in module.batches)


def test_a_strong_view_starts_from_the_same_weak_one() -> None:
    weak = small_image_transform(28, True)
    samples = ImageDataset(ArraySource(SOURCES["tensors"], [0] * 8), weak)
    samples.views = [weak, RandAugment().view_transform(weak, 28, "bilinear", True)]
    assert not samples.as_bytes().in_bytes
    first = [sample["image"] for sample in samples.__getitems__(KEYS)][: len(KEYS)]
    samples.views = ()
    assert all(torch.equal(a, b["image"]) for a, b in zip(first, samples.__getitems__(KEYS), strict=True))


def test_every_byte_becomes_the_float_of_torchvision() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(in_unit_range(every), v2.functional.to_dtype(every, torch.float32, scale=True))
    assert in_unit_range(every[-1:]).item() == 1.0
