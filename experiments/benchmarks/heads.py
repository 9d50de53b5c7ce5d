"""Cost of each head: a step with the head relative to the same step without it.

    python experiments/benchmarks/heads.py

The step without it is CE with the teacher's pass. Heads have their defaults. All steps of a pair train one student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from pairs import Pair, pairs
from timing import Bound, Run, command_line, comparison, interleaved, median_ratio
from torch.optim import Optimizer

from distill.errors import UserError
from distill.features import FeatureSpec
from distill.heads import Batch, Head, RunInfo, shipped
from distill.heads.cross_entropy import CrossEntropy
from distill.heads.kd import KD
from distill.heads.rkd import RKD
from distill.heads.rrd import RRD
from distill.heads.serkd import SeRKD
from distill.heads.trg import TRG
from distill.networks import FrozenTeacher

WITHOUT = "CE and the teacher's pass"
NODES = 512
"""Size of TRG's graph in its bound."""
TOGETHER = "all of these"
LIMITS = {"RRD, 16384 rows": 1.03, "TRG, 512 nodes": 1.05, "SeRKD, soft": 1.05, "RKD": 1.03, TOGETHER: 1.12}
"""Bounds on the first pair's step with a head, relative to the step without it."""


def measure(run: Run) -> list[Bound]:
    """Print two tables for each pair; return the bounds on the first."""
    bounds: list[Bound] = []
    for number, pair in enumerate(pairs(run)):
        bench = Bench(pair, run)
        steps = {name: bench.step(heads) for name, heads in main_heads(bench.student.spec, bench.images).items()}
        seconds = interleaved({WITHOUT: bench.step([]), **steps}, run.repeat(9), run, pair.title)
        size = f"{pair.title}, {bench.images} images, float32"
        comparison(f"The cost of a head: {size}", seconds, WITHOUT)
        if number == 0:
            bounds = [
                Bound(f"2 heads, {pair.title}: {name}", median_ratio(seconds[name], seconds[WITHOUT]), at_most=limit)
                for name, limit in LIMITS.items()
            ]
        steps, failed = bench.remaining()
        seconds = interleaved({WITHOUT: bench.step([]), **steps}, run.repeat(3 if number == 0 else 5), run, pair.title)
        comparison(f"The cost of the other heads: {size}", seconds, WITHOUT, failed=failed)
    return bounds


class Bench:
    """Training steps of one pair.

    Args:
        pair: the networks.
        run: the device.
    """

    def __init__(self, pair: Pair, run: Run) -> None:
        self.pair, self.run = pair, run
        self.batch = pair.batch(run)
        self.images = len(self.batch["image"])
        student, teacher = pair.networks()
        self.student = student.train().to(run.device)
        self.teacher = FrozenTeacher(teacher).to(run.device)
        self.optimizer = pair.make_optimizer(self.student.parameters())
        self.cross_entropy = CrossEntropy()

    @property
    def specs(self) -> tuple[FeatureSpec, FeatureSpec]:
        """The shapes of both networks' features."""
        return self.student.spec, self.teacher.spec

    def step(self, heads: Iterable[Head]) -> Callable[[], None]:
        """Return the step with CE and these heads, whose parameters are trained with the student's.

        A head that compares two views gets the halves of the batch as such.

        Raises:
            UserError: a head does not fit the networks.
        """
        heads, specs = list(heads), self.specs
        more: Batch = {}
        if any("view" in head.batch_needs for head in heads):
            more["view"] = torch.arange(2, device=self.run.device).repeat_interleave(self.images // 2)
        for head in heads:
            head.check(*specs)
            head.build(*specs)
            head.prepare(RunInfo(batch_size=self.images))
            head.to(self.run.device).train()
        optimizers: list[Optimizer] = [self.optimizer]
        if learned := [parameter for head in heads for parameter in head.parameters() if parameter.requires_grad]:
            optimizers.append(self.pair.make_optimizer(learned))

        def step() -> None:
            student, teacher = self.student(self.batch["image"]), self.teacher(self.batch["image"])
            batch = {**self.batch, **more}
            loss = torch.stack([head(student, teacher, batch) for head in (self.cross_entropy, *heads)]).sum()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()

        return step

    def remaining(self) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
        """Return the steps of all other heads with their defaults, and the reasons why some do not fit."""
        steps: dict[str, Callable[[], None]] = {}
        failed: dict[str, str] = {}
        for name, kind in shipped().items():
            if kind in (CrossEntropy, KD, RKD, RRD, SeRKD, TRG):
                continue
            try:
                steps[name] = self.step([kind()])
            except UserError as error:
                failed[name] = str(error)
        return steps, failed


def main_heads(student: FeatureSpec, images: int) -> dict[str, list[Head]]:
    """Return the heads that this project is about, each alone and all together, for batches of `images`."""
    tokens, _ = student["tokens"]

    def make() -> dict[str, Head]:
        return {
            "KD": KD(),
            "RKD": RKD(),
            "RRD, 16384 rows": RRD(size=16384),
            "SeRKD, soft": SeRKD(),
            "TRG, 512 nodes": TRG(tokens_per_image=min(NODES // images, tokens)),
        }

    return {**{name: [head] for name, head in make().items()}, TOGETHER: list(make().values())}


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
