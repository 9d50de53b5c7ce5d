"""Adds superpixel segments to the batch, on the fly."""

from __future__ import annotations

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
from distill.training.classification import ClassificationModule


class SuperpixelSegments(Callback):
    """Puts `segments` `[B, H, W]` into each batch where a head reads them.

    They are found on the device, in the images as the networks get to see them: after augmentation and mixing, before
    any normalization. Without a head that reads them it does nothing. The milliseconds it takes are logged.

    With many CPU cores, the data's workers can find them instead, after augmentation. Then CutMix pastes segments with
    the pixels, which can double their number, and for batches that mixup has blended they are found here all the same.

    Args:
        segments: how many there are at most; not more than the head's `count`.
        compactness: how much place counts against color.
        iterations: how often the segments' centers are moved.
        connected: whether each segment is made one piece.
        backend: `auto` takes fast-slic for images in CPU memory if it is installed, and torch else.
        in_workers: whether the data's workers find them.
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
        self.is_needed = False
        self._events: tuple[Any, Any] | None = None  # the CUDA events around an earlier step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out who reads segments, and try the settings on an image of the data's size."""
        assert isinstance(pl_module, ClassificationModule)
        readers = {name: term.head for name, term in pl_module.terms.items() if "segments" in term.head.batch_needs}
        self.is_needed = bool(readers)
        if not self.is_needed:
            return
        most = self._prepare_workers(trainer) if self.in_workers else self.settings["segments"]
        for name, head in readers.items():
            count = getattr(head, "count", most)
            if most > count:
                twice = ", twice as many after CutMix" if most > self.settings["segments"] else ""
                raise UserError(
                    f"trainer.callbacks: SuperpixelSegments makes {self.settings['segments']} segments{twice}, but "
                    f"model.heads.{name}.head.count is {count}: give it {most}"
                )
        try:
            slic(torch.rand(1, *pl_module.image_shape, generator=torch.Generator().manual_seed(0)), **self.settings)
        except UserError as error:
            raise error.at("trainer.callbacks: SuperpixelSegments") from None

    def _prepare_workers(self, trainer: Trainer) -> int:
        """Let the data's workers find segments; returns how many there may be in a batch."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageData):
            raise UserError(
                f"trainer.callbacks: SuperpixelSegments.in_workers needs a data module of distill, given is {data!r}"
            )
        data.extra_fields = partial(_segments_of, settings=self.settings)
        pasted = data.mixing is not None and data.mixing.cutmix > 0
        return (2 if pasted else 1) * int(self.settings["segments"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the segments of a training batch, and log what they cost."""
        if not self.is_needed or "segments" in batch:
            return
        if batch["image"].device.type != "cuda":
            started = perf_counter()
            self._add(batch)
            pl_module.log("train/superpixels_ms", 1e3 * (perf_counter() - started), batch_size=len(batch["image"]))
            return
        if self._events is not None and self._events[1].query():  # of an earlier step: nothing waits
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
        batch["segments"] = add_segments(batch, **self.settings)["segments"]


def _segments_of(image: Tensor, settings: dict[str, Any]) -> dict[str, Tensor]:
    """What a worker adds to a sample."""
    return {"segments": slic(image.unsqueeze(0), **settings).squeeze(0)}
