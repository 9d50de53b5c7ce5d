"""The LightningModule on a device: no wait in a step, in an evaluation or for stored rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.heads import KD, RKD, RRD
from distill.objective import Term
from distill.store import StoredTeacher
from distill.testing import no_waiting
from distill.training.distillation import DistillationModule
from tests.training.stored_runs import Pictures, fit, module, store


@contextmanager
def waiting(device: torch.device) -> Iterator[None]:
    """Allow waits within `no_waiting`."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Attentive(DistillationModule):
    """Allows no wait for the device within a step, but in Lightning's log, which copies a 0 for a new figure."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        with waiting(self.device):
            super().log(*args, **kwargs)

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        with waiting(self.device):
            super().log_dict(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with no_waiting(self.device):
            return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with no_waiting(self.device):
            super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        with no_waiting(self.device):
            super().test_step(batch, batch_idx)


def heads() -> dict[str, Term]:
    return {"kd": Term(KD()), "rkd": Term(RKD()), "rrd": Term(RRD(size=20, width=8))}


def attentive(**settings: Any) -> DistillationModule:
    made = module(heads, **settings)
    made.__class__ = Attentive
    return made


def require_no_wait(device: torch.device, precision: str) -> None:
    settings = {"accelerator": "gpu" if device.type == "cuda" else "cpu", "devices": 1, "precision": precision}
    run = fit(attentive(), Pictures(), max_epochs=2, log_every_n_steps=2, **settings)
    assert {"val/top1", "val/calibration_error", "val/agreement", "val/neighbor_agreement"} <= run.metrics.keys()
    assert all(tensor.isfinite().all() for tensor in run.state.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_neither_training_nor_evaluation_waits_for_the_device(precision: str, device: torch.device) -> None:
    require_no_wait(device, precision)


def test_neither_waits_where_gradients_are_scaled(cuda: torch.device) -> None:
    require_no_wait(cuda, "16-mixed")


def test_stored_rows_come_to_a_gpu_from_pinned_memory(cuda: torch.device, tmp_path: Path) -> None:
    store(tmp_path, module(heads), Pictures())
    stored = attentive(teacher=StoredTeacher(str(tmp_path)))
    seen: list[bool] = []

    class Watching(Attentive):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            batch = super().on_before_batch_transfer(batch, dataloader_idx)
            seen.extend(tensor.is_pinned() for tensor in tensors_of(batch))
            return batch

    stored.__class__ = Watching
    fit(stored, Pictures(), max_epochs=1, accelerator="gpu", devices=1)
    assert seen
    assert all(seen)


def tensors_of(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    inside = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else ()
    return [tensor for value in inside for tensor in tensors_of(value)]
