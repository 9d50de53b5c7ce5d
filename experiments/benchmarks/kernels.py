"""Time and peak memory of RKD alone, forward and backward, over batch and width, against torchdistill's.

    python experiments/benchmarks/kernels.py

Both get the same embeddings, and value and gradient must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timing import (
    CONSOLE,
    Bound,
    Run,
    command_line,
    interleaved,
    median_ratio,
    megabytes,
    milliseconds,
    peak_bytes,
    spread,
    table,
)
from torch import Tensor

from distill.features import Features
from distill.heads.rkd import RKD

BATCHES, WIDTHS = [64, 128, 256, 512], [192, 384, 768]
BOUNDED = 256, 384
"""Batch and width of the bounds on RKD."""
PEER_LIMIT = 1e9
"""Bytes of torchdistill's `[B, B, d]` and `[B, B, B]` tensors above which it is left out on a CPU."""
Kernel = Callable[[], Tensor]


def measure(run: Run) -> list[Bound]:
    """Print a table; return the bounds."""
    peer = _peer()
    rows: list[list[str]] = []
    bounds: list[Bound] = []
    sizes = [(batch, width) for batch in BATCHES for width in WIDTHS if batch == BOUNDED[0] or width == BOUNDED[1]]
    for batch, width in [(16, 8)] if run.tiny else sizes:
        student, teacher = _features([batch, width], run).requires_grad_(), _features([batch, width], run, 1)
        contenders: dict[str, Kernel] = {"here": partial(_rkd_here, student, teacher)}
        if peer is not None and (run.on_gpu or 4 * batch * batch * (3 * width + 3 * batch) < PEER_LIMIT):
            contenders["torchdistill"] = partial(peer, student, teacher)
            difference = _difference(contenders, student)
            bounds.append(Bound(f"3 RKD, B {batch}, d {width}: difference to torchdistill", difference, at_most=1e-5))
        works = {name: partial(_with_gradient, kernel, student) for name, kernel in contenders.items()}
        seconds = interleaved(works, run.repeat(3), run, f"RKD, B {batch}, d {width}")
        peaks = {name: peak_bytes(work, run.device) for name, work in works.items()}
        for name, times in seconds.items():
            best, *quarters = spread(times)
            rows.append(
                [
                    *(f"{batch} x {width}, {name}", milliseconds(best), " / ".join(map(milliseconds, quarters))),
                    *(f"{median_ratio(times, seconds['here']):.2f}", megabytes(peaks[name])),
                    f"{peaks[name] / peaks['here']:.2f}",
                ]
            )
        if (batch, width) == BOUNDED and "torchdistill" in seconds:
            faster, leaner = (
                median_ratio(seconds["torchdistill"], seconds["here"]),
                peaks["torchdistill"] / peaks["here"],
            )
            bounds.append(Bound(f"3 RKD, B {batch}, d {width}: times faster than torchdistill", faster, at_least=5))
            bounds.append(Bound(f"3 RKD, B {batch}, d {width}: times leaner than torchdistill", leaner, at_least=10))
    head = ["B x d", "ms (best)", "quartiles", "time / ours", "peak MB", "memory / ours"]
    CONSOLE.print(table("RKD's distances and angles, forward and backward", head, rows))
    if peer is None:
        CONSOLE.print("torchdistill is not installed")
    return bounds


def _rkd_here(student: Tensor, teacher: Tensor) -> Tensor:
    return RKD(distance=1.0, angle=2.0)(Features(embedding=student), Features(embedding=teacher), {})


def _peer() -> Callable[[Tensor, Tensor], Tensor] | None:
    try:
        from torchdistill.losses.mid_level import RKDLoss
    except ImportError:
        return None
    loss = RKDLoss("x", "x", dist_factor=1.0, angle_factor=2.0, reduction="mean")

    def compared(student: Tensor, teacher: Tensor) -> Tensor:
        value: Tensor = loss({"x": {"output": student}}, {"x": {"output": teacher}})
        return value

    return compared


def _difference(contenders: dict[str, Kernel], student: Tensor) -> float:
    """Return the larger of the relative differences of the values and of the gradients."""
    values = [kernel() for kernel in contenders.values()]
    gradients = [torch.autograd.grad(value, student)[0] for value in values]
    differences = [(here - peer).norm() / peer.norm() for here, peer in (values, gradients)]
    return max(float(difference) for difference in differences)


def _with_gradient(kernel: Kernel, student: Tensor) -> None:
    torch.autograd.grad(kernel(), student)


def _features(shape: list[int], run: Run, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(run.device)


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
