"""Time of a step with compiled networks, and with compiled heads besides, relative to eager code.

python experiments/benchmarks/compilation.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from time import perf_counter
from typing import Any

from contenders import Setting
from pairs import Pair, pairs
from timing import CONSOLE, Bound, Run, Seconds, command_line, comparison, interleaved

from distill.heads import KD, RKD, SP
from distill.networks.timm import Timm
from distill.objective import Term
from distill.schedules import Progress
from distill.training.distillation import DistillationModule

EAGER = "eager"
WAYS = {EAGER: "none", "networks compiled": "both", "networks and heads compiled": "all"}
TOLERANCE = 1e-3
"""Largest relative difference of the first loss from that of eager code."""


def measure(run: Run) -> list[Bound]:
    """Print a table for each pair; return the bounds on the losses."""
    if not run.on_gpu and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        CONSOLE.print("there is no C++ compiler, which torch needs to compile for a CPU")
        return []
    bounds: list[Bound] = []
    for pair in pairs(run):
        bounds += _pair(pair, run)
    return bounds


def _pair(pair: Pair, run: Run) -> list[Bound]:
    setting = Setting(pair, run)
    steps: dict[str, Callable[[], float]] = {}
    first: dict[str, float] = {}
    compiling: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, which in WAYS.items():
        step = _step(setting, which)
        started = perf_counter()
        try:
            first[name] = step()
        except Exception as error:  # of the compiler, for example
            failed[name] = (str(error).splitlines() or [type(error).__name__])[0]
        else:
            compiling[name] = f"{perf_counter() - started:.1f}"
            steps[name] = step
    seconds: Seconds = interleaved(steps, run.repeat(7), run, pair.title)
    title = f"The step, compiled: {pair.title}, {len(setting.batch['image'])} images, float32, CE + KD + RKD + SP"
    comparison(title, seconds, EAGER, {"first step, s": compiling}, failed)
    return [
        Bound(
            f"compilation, {pair.title}, {name}: difference of the first loss",
            abs(first[name] - first[EAGER]) / abs(first[EAGER]),
            at_most=TOLERANCE,
        )
        for name in steps
        if name != EAGER
    ]


def _step(setting: Setting, which: Any) -> Callable[[], float]:
    pair = setting.pair
    module = DistillationModule(
        student=Timm(pair.student, options=pair.options),
        teacher=Timm(pair.teacher, options=pair.options),
        heads={"kd": Term(KD()), "rkd": Term(RKD()), "sp": Term(SP())},
        optimizer=pair.make_optimizer,
        num_classes=pair.classes,
        image_shape=(3, pair.side, pair.side),
        compile=which,
    )
    assert module.teacher is not None
    for network, original in zip((module.student, module.teacher.network), setting.originals, strict=True):
        network.model.load_state_dict(original.model.state_dict())
    module.train().to(setting.run.device)
    optimizer = pair.make_optimizer(module.parameters())

    def step() -> float:
        loss = module.distiller(setting.batch, Progress()).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
