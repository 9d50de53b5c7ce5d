"""Cost of measuring the terms' gradients in a step: relative to the step, by place.

    python experiments/benchmarks/shares.py
    python experiments/benchmarks/shares.py --device cuda

`GradientShares` measures one step in 100 by default: the cost per term is that of a measured step beyond the plain
one, divided by the terms and by 100.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pairs import Pair, pairs
from timing import Bound, Run, command_line, comparison, interleaved, median_ratio

from distill.features import Features
from distill.gradients import gradient_shares, shared_parameters
from distill.heads import KD, RKD, SP, CrossEntropy
from distill.networks import FrozenTeacher
from distill.objective import Losses, Objective, Term
from distill.schedules import Progress

BASE = "step"
EVERY = 100
AT_MOST = {"parameters": 0.01, "embedding": 0.002}
"""Largest cost per term of a step, by place, if one step in 100 is measured."""


def measure(run: Run) -> list[Bound]:
    """Print a table for each pair; return the bounds."""
    return [bound for pair in pairs(run) for bound in _cost(pair, run)]


def _cost(pair: Pair, run: Run) -> list[Bound]:
    steps = {BASE: _step(pair, run, None)}
    names: dict[Literal["parameters", "embedding"], str] = {
        "parameters": "step, measured at the parameters",
        "embedding": "step, measured at the embedding",
    }
    steps |= {name: _step(pair, run, at) for at, name in names.items()}
    seconds = interleaved(steps, run.repeat(15), run, pair.title)
    comparison(f"Measured steps: {pair.title}, CE + KD + RKD + SP", seconds, BASE)
    return [
        Bound(
            f"gradients at the {at}, per term, 1 step in {EVERY}: {pair.title}",
            (median_ratio(seconds[name], seconds[BASE]) - 1) / 4 / EVERY,
            at_most=AT_MOST[at],
        )
        for at, name in names.items()
    ]


def _step(pair: Pair, run: Run, at: Literal["parameters", "embedding"] | None) -> Callable[[], None]:
    student, network = (built.to(run.device) for built in pair.networks())
    teacher = FrozenTeacher(network)
    terms = {"task": CrossEntropy(), "kd": KD(), "rkd": RKD(), "sp": SP()}
    objective = Objective({name: Term(head) for name, head in terms.items()}, student.spec, teacher.spec).to(run.device)
    batch = pair.batch(run)
    optimizer = pair.make_optimizer([*student.parameters(), *objective.parameters()])

    def step() -> None:
        with torch.no_grad():
            target: Features = teacher(batch["image"])
        features: Features = student(batch["image"])
        losses: Losses = objective(features, target, batch, Progress())
        if at is not None:
            tensors = shared_parameters(student) if at == "parameters" else [features["embedding"]]
            gradient_shares(losses, "task", tensors)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
