"""Adds superpixel segments to the batch, on the fly."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from distill.errors import UserError
from distill.module import ClassificationModule
from distill.superpixels import slic
from distill.superpixels.pixels import Backend


class SuperpixelSegments(Callback):
    """Puts `segments` `[B, H, W]` into each batch where a head reads them.

    They are found on the device, in the images as the networks get to see them: after augmentation and mixing, before
    any normalisation. Without a head that reads them it does nothing. The milliseconds it takes are logged.

    Args:
        segments: how many there are at most; not more than the head's `count`.
        compactness: how much place counts against colour.
        iterations: how often the segments' centres are moved.
        connected: whether each segment is made one piece.
        backend: `auto` takes fast-slic for images in CPU memory if it is installed, and torch else.
    """

    provides = "segments"

    def __init__(
        self,
        segments: int = 49,
        compactness: float = 10.0,
        iterations: int = 10,
        connected: bool = False,
        backend: Backend = "auto",
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
        self.is_needed = False
        self._events: tuple[Any, Any] | None = None  # the CUDA events around an earlier step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out who reads segments, and try the settings on an image of the data's size."""
        assert isinstance(pl_module, ClassificationModule)
        readers = {name: term.head for name, term in pl_module.terms.items() if term.head.needs_segments}
        self.is_needed = bool(readers)
        if not self.is_needed:
            return
        for name, head in readers.items():
            count = getattr(head, "count", self.settings["segments"])
            if self.settings["segments"] > count:
                raise UserError(
                    f"trainer.callbacks: SuperpixelSegments makes {self.settings['segments']} segments, but "
                    f"model.heads.{name}.head.count is {count}: give both the same"
                )
        try:
            slic(torch.rand(1, *pl_module.image_shape, generator=torch.Generator().manual_seed(0)), **self.settings)
        except UserError as error:
            raise error.at("trainer.callbacks: SuperpixelSegments") from None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the segments of a training batch, and log what they cost."""
        if not self.is_needed:
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
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
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
        if self.is_needed:
            self._add(batch)

    def _add(self, batch: Any) -> None:
        batch["segments"] = slic(batch["image"], **self.settings)
