"""Superpixel segmentation of each batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from distill.data import ImageData
from distill.errors import UserError
from distill.superpixels import add_segments, slic
from distill.superpixels.pixels import Backend
from distill.training.base import DistillerModule
from distill.training.logged_losses import is_logged


class SuperpixelSegments(Callback):
    """Adds SLIC superpixels as `segments` `[B, H, W]` to each batch if a head reads them.

    Segments are computed on the device from the images that the networks receive: after augmentation and mixing,
    before normalization. The time is logged as `train/superpixels_ms`, on the steps that are logged. If no head reads
    segments, the callback does nothing.

    With many CPU cores, the data workers can compute the segments instead, after augmentation. CutMix then pastes
    segments together with the pixels, which can double their number; batches blended by mixup are still segmented on
    the device.

    Args:
        segments: maximum number of segments per image; at most the head's `count`.
        compactness: weight of the spatial distance relative to the color distance.
        iterations: number of updates of the segments' centers.
        connected: whether to enforce that each segment is connected.
        backend: `auto` uses fast-slic, if installed, for images in CPU memory and torch otherwise; see `slic`.
        in_workers: whether the data workers compute the segments.
        mean: of each channel, if the data have already normalized the images: the segments are those of image * std +
            mean, in [0, 1]. A single number applies to all channels.
        std: of each channel, likewise.

    Raises:
        UserError: a setting is out of range, or a head accepts fewer segments.
    """

    adds_to_batch = "segments"

    def __init__(
        self,
        segments: int = 49,
        compactness: float = 10.0,
        iterations: int = 10,
        connected: bool = False,
        backend: Backend = "auto",
        in_workers: bool = False,
        mean: Sequence[float] | float = 0.0,
        std: Sequence[float] | float = 1.0,
    ) -> None:
        if segments < 1:
            raise UserError(f"segments must be at least 1, given {segments}")
        self.settings: dict[str, Any] = {
            "segments": segments,
            "compactness": compactness,
            "iterations": iterations,
            "connected": connected,
            "backend": backend,
        }
        self.in_workers = in_workers
        self.normalization = (mean, std)
        self.is_needed = False
        self._events: tuple[Any, Any] | None = None  # CUDA events before and after an earlier segmentation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the heads that read segments, and try the settings on an image of the data's size."""
        assert isinstance(pl_module, DistillerModule)
        _remove_from_workers(trainer)  # whose segments may be those of an earlier run on the same data
        readers = {name: term.head for name, term in pl_module.terms.items() if "segments" in term.head.batch_needs}
        self.is_needed = bool(readers)
        if not self.is_needed:
            return
        maximum = self._prepare_workers(trainer) if self.in_workers else self.settings["segments"]
        for name, head in readers.items():
            count = getattr(head, "count", maximum)
            if maximum > count:
                twice = ", twice as many after CutMix" if maximum > self.settings["segments"] else ""
                raise UserError(
                    f"trainer.callbacks: SuperpixelSegments makes {self.settings['segments']} segments{twice}, but "
                    f"model.heads.{name}.head.count is {count}: set it to {maximum}"
                )
        try:
            image = torch.rand(1, *pl_module.image_shape, generator=torch.Generator().manual_seed(0))
            image = image if self.in_workers else image.to(trainer.strategy.root_device)
            slic(_in_unit_range(image, *self.normalization), **self.settings)
        except UserError as error:
            raise error.at("trainer.callbacks: SuperpixelSegments") from None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the data workers compute no more segments, since the next run on the same data may need others."""
        _remove_from_workers(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do what `teardown` does, which Lightning leaves out after an error."""
        _remove_from_workers(trainer)

    def _prepare_workers(self, trainer: Trainer) -> int:
        """Let the data workers compute segments; return the maximum number of segments per image."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageData):
            raise UserError(
                f"trainer.callbacks: SuperpixelSegments.in_workers needs a data module of distill, given {data!r}"
            )
        data.extra_fields = partial(_segments_of, normalization=self.normalization, settings=self.settings)
        pasted = data.mixing is not None and data.mixing.cutmix > 0
        return (2 if pasted else 1) * int(self.settings["segments"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the segments of a training batch, and log the time."""
        if not self.is_needed or "segments" in batch:
            return
        # Only on the steps that are shown: on a GPU, Lightning waits for the device to log a number.
        shown = is_logged(trainer, trainer.global_step + 1)
        if batch["image"].device.type != "cuda":
            started = perf_counter()
            self._add(batch)
            if shown:
                pl_module.log("train/superpixels_ms", 1e3 * (perf_counter() - started), batch_size=len(batch["image"]))
            return
        if shown and self._events is not None and self._events[1].query():  # an earlier step has finished
            pl_module.log(
                "train/superpixels_ms", self._events[0].elapsed_time(self._events[1]), batch_size=len(batch["image"])
            )
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
        begin.record()
        self._add(batch)
        end.record()
        self._events = begin, end

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the segments of a validation batch."""
        self._add_if_needed(batch)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the segments of a test batch."""
        self._add_if_needed(batch)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the segments of a batch to predict."""
        self._add_if_needed(batch)

    def _add_if_needed(self, batch: Any) -> None:
        if self.is_needed and "segments" not in batch:
            self._add(batch)

    def _add(self, batch: Any) -> None:
        image = _in_unit_range(batch["image"], *self.normalization)
        batch["segments"] = add_segments({"image": image}, **self.settings)["segments"]


def _remove_from_workers(trainer: Trainer) -> None:
    """Remove the segments from what the data workers compute, but no fields of a user."""
    data: Any = getattr(trainer, "datamodule", None)
    if getattr(getattr(data, "extra_fields", None), "func", None) is _segments_of:
        data.extra_fields = None


def _segments_of(image: Tensor, normalization: tuple[Any, Any], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Return the fields that a worker adds to a sample."""
    return {"segments": slic(_in_unit_range(image.unsqueeze(0), *normalization), **settings).squeeze(0)}


def _in_unit_range(image: Tensor, mean: Sequence[float] | float, std: Sequence[float] | float) -> Tensor:
    """Return images before their normalization, which is undone."""
    if (mean, std) == (0.0, 1.0):
        return image
    # Not `torch.tensor(...).to(device)`, which would wait for the device in every step.
    channels = [(values if isinstance(values, Sequence) else [values] * image.shape[1]) for values in (std, mean)]
    if any(len(values) != image.shape[1] for values in channels):
        raise UserError(
            f"trainer.callbacks: SuperpixelSegments has mean {mean} and std {std}, but the images have "
            f"{image.shape[1]} channels"
        )
    pairs = zip(image.unbind(dim=1), *channels, strict=True)
    return torch.stack([channel * scale + shift for channel, scale, shift in pairs], dim=1)
