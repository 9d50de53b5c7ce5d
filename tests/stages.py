"""Weights and metrics by step of a run in two stages."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor


def every_step(folder: Path) -> list[str]:
    """Return options for two epochs of two steps, with a checkpoint and a row of metrics at each step."""
    return [
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=1",
        f"--trainer.default_root_dir={folder}/run",
        "--checkpoint.every_n_train_steps=1",
        "--checkpoint.monitor=null",
        "--checkpoint.save_top_k=-1",
        "--checkpoint.filename={step}",
    ]


def weights_by_step(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Return the module's state after each of the four steps."""
    paths = {step: folder / f"run/checkpoints/step={step}.ckpt" for step in range(1, 5)}
    return {step: torch.load(path, weights_only=True)["state_dict"] for step, path in paths.items()}


def curves(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of each of the four steps."""
    with (folder / "run/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Return the names of the tensors that changed."""
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
