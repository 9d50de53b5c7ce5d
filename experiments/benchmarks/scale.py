"""Cost of the relations against the size of what they relate: time, peak memory, and the power of the size of each.

    python experiments/benchmarks/scale.py

Forward and backward pass of a head alone. Each series has its bounds from the arithmetic of its formula, stated before
it runs, and stops at the first point that takes ten seconds. Times on a CPU are those of the processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import process_time

import torch
from timing import CONSOLE, Bound, Run, command_line, megabytes, milliseconds, now, peak_bytes, table
from torch import Tensor

from distill.features import Features, FeatureSpec
from distill.heads import CRD, RKD, RRD, SP, TRG, Head, SeRKD

PATIENCE = 10.0
"""Seconds of a point at which a series stops."""
SHORT = 1.0
"""Seconds up to which a point is timed several times."""
SLACK = 0.25
"""Of a power, left for caches, which large sizes miss."""
WIDTHS = 192, 384
"""Widths of student and teacher."""
Work = Callable[[], None]


@dataclass(frozen=True)
class Series:
    """A head over one size.

    Attributes:
        name: of the head.
        what: the size.
        sizes: its values, the smallest first.
        make: returns the forward and backward pass at a size.
        time: the power of the size with which time may grow.
        memory: likewise, peak memory.
        why: the arithmetic.
    """

    name: str
    what: str
    sizes: Sequence[int]
    make: Callable[[int, Run], Work]
    time: float
    memory: float
    why: str


@dataclass(frozen=True)
class Point:
    """A size with its best seconds and its peak bytes; none where the series stopped."""

    size: int
    seconds: float
    bytes: int | None


def measure(run: Run) -> list[Bound]:
    """Print what is expected, and a table for each series; return the bounds."""
    rows = [[f"{item.name}, {item.what}", f"{item.time:g}", f"{item.memory:g}", item.why] for item in SERIES]
    CONSOLE.print(table("Powers of the size, from the arithmetic", ["", "time", "memory", "because"], rows))
    bounds: list[Bound] = []
    for series in SERIES:
        points = _points(series, run)
        shown = []
        for point, smaller in zip(points, [None, *points], strict=False):
            power = "" if smaller is None else f"{_power([smaller, point], 'seconds'):.2f}"
            peak = "" if point.bytes is None else megabytes(point.bytes)
            shown.append([f"{point.size}", milliseconds(point.seconds), peak, power])
        head = [series.what, "ms (best)", "peak MB", "power to here"]
        CONSOLE.print(table(f"{series.name}, forward and backward", head, shown))
        for what, limit in (("seconds", series.time), ("bytes", series.memory)):
            name = "time" if what == "seconds" else "peak memory"
            text = f"{series.name}: power of {series.what} with which {name} grows"
            bounds.append(Bound(text, _power(points, what), at_most=limit + SLACK))
    return bounds


def _points(series: Series, run: Run) -> list[Point]:
    clock = partial(now, run.device) if run.on_gpu else process_time
    points = []
    for size in series.sizes[:2] if run.tiny else series.sizes:
        work = series.make(size, run)
        seconds = _seconds(work, clock)
        if seconds < SHORT:  # the first call made what is made once
            seconds = min(_seconds(work, clock) for _ in range(run.repeat(5)))
        peak = peak_bytes(work, run.device) if seconds < PATIENCE else None
        points.append(Point(size, seconds, peak))
        del work
        if seconds >= PATIENCE:
            CONSOLE.print(f"{series.name} stops: {series.what} = {size} took {seconds:.0f} s")
            break
    return points


def _seconds(work: Work, clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started


def _power(points: Sequence[Point], what: str) -> float:
    """Return the slope of the line that fits the logarithms of a figure over those of the size; NaN of one point."""
    found = [(point.size, getattr(point, what)) for point in points if getattr(point, what) is not None]
    if len(found) < 2:
        return math.nan
    x, y = (torch.tensor(column, dtype=torch.float64).log() for column in zip(*found, strict=True))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def _rkd(size: int, run: Run, distance: float = 25.0, angle: float = 50.0) -> Work:
    return _work(RKD(distance, angle), _embeddings(size, run), run)


def _sp(size: int, run: Run) -> Work:
    return _work(SP(of="embedding"), _embeddings(size, run), run)


def _trg(size: int, run: Run) -> Work:
    features = [Features(tokens=_draw([size // 8, 8, width], run), grid=(2, 4)) for width in WIDTHS]
    return _work(TRG(contextual_weight=0, tokens_per_image=None), features, run)


def _rrd(size: int, run: Run) -> Work:
    head = RRD(size=size)
    features = _embeddings(64, run)
    work = _work(head, features, run)
    head.queue.enqueue(torch.nn.functional.normalize(_draw([size, head.width], run), dim=1))
    return work


def _crd(size: int, run: Run) -> Work:
    return _work(CRD(samples=size, negatives=256), _embeddings(64, run), run)


def _serkd(size: int, run: Run) -> Work:
    side = 2 * math.isqrt(size)
    features = [Features(tokens=_draw([8, side * side, width], run), grid=(side, side)) for width in WIDTHS]
    return _work(SeRKD(), features, run)


def _embeddings(images: int, run: Run) -> list[Features]:
    return [Features(embedding=_draw([images, width], run)) for width in WIDTHS]


def _draw(shape: list[int], run: Run) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).to(run.device)


def _work(head: Head, features: Sequence[Features], run: Run) -> Work:
    torch.manual_seed(0)
    student, teacher = features
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    head.to(run.device).train()
    images = len(next(tensor for tensor in (student.embedding, student.tokens) if tensor is not None))
    index = torch.arange(images, device=run.device)

    def work() -> None:
        leaves = student.apply(lambda tensor: tensor.detach().requires_grad_())
        head(leaves, teacher, {"index": index}).backward()

    return work


BATCHES = [64, 128, 256, 512, 1024, 2048]
SERIES = [
    Series("RKD's distances", "B", BATCHES, partial(_rkd, angle=0.0), 2, 2, "B x B pairs"),
    Series(
        "RKD's angles", "B", BATCHES, partial(_rkd, distance=0.0), 3, 2, "B x B x B triples, a few vertices at once"
    ),
    Series("SP", "B", BATCHES, _sp, 2, 2, "B x B pairs"),
    Series("TRG", "M", [512, 1024, 2048, 4096, 8192, 16384], _trg, 2, 1, "M x M pairs, a fixed number at a time"),
    Series("RRD", "K", [4096, 16384, 65536, 262144], _rrd, 1, 1, "K rows, a fixed number of similarities at a time"),
    Series("CRD", "n", [10_000, 100_000, 1_000_000], _crd, 0, 0, "256 negatives an image, of n rows"),
    Series("SeRKD", "L", [16, 49, 100, 196, 400], _serkd, 3, 2, "L x L x L triples, few vertices at a time"),
]


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
