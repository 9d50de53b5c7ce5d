"""Time of a step with CE + KD (T = 4): a plain loop, this project in Lightning's Trainer, and three peers.

    python experiments/benchmarks/step.py
    python experiments/benchmarks/step.py --device cuda

All run in one process, round after round, in a random order in each. The Trainer asks its loader for a batch once
per step: there the peers' steps are run, so that the Trainer's step lasts from a batch to the next request, with all
that Lightning does in between.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles

import torch
from contenders import Setting, Step, make_steps, this_project
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from pairs import Pair, pairs
from timing import Bound, Run, Seconds, command_line, comparison, median_ratio, now, peak_bytes, ratios, start_of_peak

from distill.heads import Batch

OURS = "this project (Lightning)"
BASE = "plain loop"
AGREEMENT = {False: 1e-4, True: 1e-2}
"""Largest relative difference of the first losses, in float32 and in bfloat16."""

ON_GPU = [(False, False), (True, False), (False, True), (True, True)]
"""Pairs of (bfloat16, compiled); on a CPU only the first."""


def measure(run: Run) -> list[Bound]:
    """Print a table for each pair and precision; return the bounds."""
    bounds: list[Bound] = []
    for number, pair in enumerate(pairs(run)):
        for bfloat16, compiled in ON_GPU if run.on_gpu else ON_GPU[:1]:
            setting = Setting(pair, run, bfloat16, compiled)
            bounds += _race(setting, rounds=run.repeat(15 if number == 0 else 30), against_plain=number == 0)
    return bounds


class Turns:
    """Loader of one batch for the Trainer, which runs the peers' steps between the Trainer's.

    Args:
        batch: the batch.
        peers: steps of the peers, by name.
        run: the device, and the number of warm-up rounds.
        rounds: the number of rounds that count.

    Attributes:
        seconds: seconds of each contender's steps, without the warm-up.
        losses: loss of each contender's first step.
        trainer: the Trainer whose steps are measured; to be set.
    """

    trainer: Trainer

    def __init__(self, batch: Batch, peers: dict[str, Step], run: Run, rounds: int) -> None:
        self.batch, self.peers, self.run = batch, peers, run
        self.counted = range(run.warm_up, run.warm_up + rounds)
        self.seconds = Seconds((BASE, OURS, *peers))
        self.losses: dict[str, float] = {}

    def __len__(self) -> int:
        return self.counted.stop + 1  # the last step that counts ends with the request for another

    def __iter__(self) -> Iterator[Batch]:
        order = random.Random(0)
        for number in range(self.counted.stop):
            turns = order.sample([OURS, *self.peers], len(self.peers) + 1)
            turn = turns.index(OURS)
            self._run_peers(turns[:turn], number)
            is_measured = self.run.on_gpu and number == self.counted.stop - 1
            before = start_of_peak(self.run.device) if is_measured else 0
            started = now(self.run.device)
            yield self.batch
            self._note(OURS, number, now(self.run.device) - started)
            if is_measured:
                self.seconds.peaks[OURS] = torch.cuda.max_memory_allocated(self.run.device) - before
            if number == 0:
                self.losses[OURS] = float(self.trainer.callback_metrics["train/loss"])
            self._run_peers(turns[turn + 1 :], number)
        yield self.batch

    def _run_peers(self, names: list[str], number: int) -> None:
        for name in names:
            started = now(self.run.device)
            loss = self.peers[name]()
            self._note(name, number, now(self.run.device) - started)
            if number == 0:
                self.losses[name] = loss.item()

    def _note(self, name: str, number: int, seconds: float) -> None:
        if number in self.counted:
            self.seconds[name].append(seconds)


def trainer_for(setting: Setting, folder: Path, steps: int) -> Trainer:
    """Return a Trainer like the command line's, without progress bar and validation."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return Trainer(
        accelerator="gpu" if setting.run.on_gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if setting.bfloat16 else "32-true",
        max_steps=steps,
        max_epochs=-1,
        logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _race(setting: Setting, rounds: int, against_plain: bool) -> list[Bound]:
    run, pair = setting.run, setting.pair
    peers, failed = make_steps(setting)
    turns = Turns(setting.batch, peers, run, rounds)
    module = this_project(setting)
    with tempfile.TemporaryDirectory() as folder:
        turns.trainer = trainer_for(setting, Path(folder), len(turns))
        turns.trainer.fit(module, turns)
    _require_agreement(turns.losses, AGREEMENT[setting.bfloat16])
    if run.on_gpu:
        turns.seconds.peaks |= {name: peak_bytes(step, run.device) for name, step in peers.items()}
    kinds = f"{'bfloat16' if setting.bfloat16 else 'float32'}, {'compiled' if setting.compiled else 'eager'}"
    title = f"The step: {pair.title}, {len(setting.batch['image'])} images, {kinds}, CE + KD"
    columns = {"first loss": {name: f"{loss:.5f}" for name, loss in turns.losses.items()}}
    comparison(title, turns.seconds, BASE, columns, failed)
    return _bounds(pair, kinds, turns.seconds, against_plain)


def _require_agreement(losses: dict[str, float], tolerance: float) -> None:
    expected = losses[BASE]
    apart = [name for name, loss in losses.items() if abs(loss - expected) > tolerance * abs(expected)]
    if apart:
        raise RuntimeError(f"no timing counts: the first losses differ by more than {tolerance}: {losses}")


def _bounds(pair: Pair, kinds: str, seconds: Seconds, against_plain: bool) -> list[Bound]:
    """Bounds relative to the plain loop, and to each peer within half the quartiles' distance of the ratios."""
    what = f"1 step, {pair.title}, {kinds}: this project /"
    bounds = []
    if against_plain:
        bounds.append(Bound(f"{what} plain loop", median_ratio(seconds[OURS], seconds[BASE]), at_most=1.03))
    for name in seconds.keys() - {OURS, BASE}:
        each = ratios(seconds[OURS], seconds[name])
        first, middle, third = quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
        bounds.append(Bound(f"{what} {name}", middle, at_most=1 + (third - first) / 2))
    return sorted(bounds, key=lambda bound: bound.what)


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
