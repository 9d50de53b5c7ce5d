"""Time and peak memory of the relations alone, forward and backward, over batch and width.

    python experiments/benchmarks/kernels.py

Three tables: RKD against torchdistill's on the same embeddings, whose value and gradient must agree; RRD over the rows
of its queue; TRG over the nodes of its graph, with the power of the size that the time grows with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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

from distill.features import Features, FeatureSpec
from distill.heads import Head
from distill.heads.rkd import RKD
from distill.heads.rrd import RRD
from distill.heads.trg import TRG

BATCHES, WIDTHS = [64, 128, 256, 512], [192, 384, 768]
BOUNDED = 256, 384
"""Batch and width of the bounds on RKD."""
QUEUES = [4096, 16384, 65536]
GRAPHS = [512, 1024, 2048, 4096]
PEER_LIMIT = 1e9
"""Bytes of torchdistill's `[B, B, d]` and `[B, B, B]` tensors above which it is left out on a CPU."""
Kernel = Callable[[], Tensor]


def measure(run: Run) -> list[Bound]:
    """Print three tables; return the bounds."""
    return [*_rkd(run), *_rrd(run), *_trg(run)]


def _rkd(run: Run) -> list[Bound]:
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


def _rrd(run: Run) -> list[Bound]:
    batch, widths = (4, (8, 8)) if run.tiny else (64, (192, 384))
    works = {}
    for size in [64, 128] if run.tiny else QUEUES:
        head = RRD(size=size)
        student, teacher = (
            Features(embedding=_features([batch, width], run, number)) for number, width in enumerate(widths)
        )
        _build(head, student, teacher, run)
        head.queue.enqueue(torch.nn.functional.normalize(_features([size, head.width], run, 2), dim=1))
        works[size] = partial(_run_head, head, student, teacher)
    return _growth("RRD", f"rows, {batch} images", works, run, arithmetic=1)


def _trg(run: Run) -> list[Bound]:
    works = {}
    for nodes in [16, 32] if run.tiny else GRAPHS:
        images, grid = nodes // 8, (2, 4)
        student, teacher = (
            Features(tokens=_features([images, 8, width], run, number), grid=grid)
            for number, width in enumerate((192, 384))
        )
        head = TRG(contextual_weight=0, tokens_per_image=None)
        _build(head, student, teacher, run)
        works[nodes] = partial(_run_head, head, student, teacher)
    return _growth("TRG", "nodes", works, run, arithmetic=2)


def _growth(name: str, what: str, works: Mapping[int, Callable[[], None]], run: Run, arithmetic: int) -> list[Bound]:
    """Print time and memory over the size; bound the time's power of the size by the arithmetic's.

    The bound leaves a quarter of a power for caches, which large sizes miss.
    """
    named = {f"{size}": work for size, work in works.items()}
    seconds = interleaved(named, run.repeat(5), run, name)
    sizes = list(works)
    rows, powers = [], []
    for size, smaller in zip(sizes, [None, *sizes], strict=False):
        best, *quarters = spread(seconds[f"{size}"])
        power = ""
        if smaller is not None:
            grown = median_ratio(seconds[f"{size}"], seconds[f"{smaller}"])
            powers.append(math.log(grown) / math.log(size / smaller))
            power = f"{powers[-1]:.2f}"
        memory = megabytes(peak_bytes(works[size], run.device))
        rows.append([f"{size}", milliseconds(best), " / ".join(map(milliseconds, quarters)), memory, power])
    head = [what, "ms (best)", "quartiles", "peak MB", "power of the size"]
    CONSOLE.print(table(f"{name}, forward and backward", head, rows))
    whole = math.log(median_ratio(seconds[f"{sizes[-1]}"], seconds[f"{sizes[0]}"])) / math.log(sizes[-1] / sizes[0])
    return [Bound(f"3 {name}: time grows with this power of {what}", whole, at_most=arithmetic + 0.25)]


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


def _build(head: Head, student: Features, teacher: Features, run: Run) -> None:
    torch.manual_seed(0)
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    head.to(run.device).train()


def _run_head(head: Head, student: Features, teacher: Features) -> None:
    leaves = student.apply(lambda tensor: tensor.detach().requires_grad_())
    tensor = next(tensor for tensor in (leaves.embedding, leaves.tokens) if tensor is not None)
    head(leaves, teacher, {"index": torch.arange(len(tensor), device=tensor.device)}).backward()


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
