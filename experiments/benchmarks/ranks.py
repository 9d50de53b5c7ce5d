"""Bytes that many ranks exchange for each head, and the work of each rank.

    python experiments/benchmarks/ranks.py

The bytes are formulas of the number of ranks and of images, held to the collectives of two processes. From them and
from published bandwidths follows a table for 8 to 1024 GPUs. Then the processor's time of one of two ranks, relative to
that of one process with the batch of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import process_time

import torch
import torch.distributed as dist
from scaling import PROCESSES, collectives, in_processes
from timing import CONSOLE, Bound, Run, command_line, table
from torch import Tensor

from distill.features import Features, FeatureSpec
from distill.heads import CC, CRD, DCD, DIST, IRG, MLKD, PKT, RKD, RRD, SP, TRG, VRM, CrossEntropy, Head, RepDistillerCC

NVLINK = 450e9
"""Bytes per second into each of eight H100 in a node: 900 GB/s in both directions together, by NVIDIA's data sheet."""
NETWORK = 50e9
"""Bytes per second into each GPU from other nodes: a DGX H100 has one 400 Gb/s InfiniBand port for each (NVIDIA's user
guide of the system)."""
NODE = 8
IMAGES = 128
"""Images of each GPU in the table."""
FLOAT, INTEGER = 4, 8


@dataclass(frozen=True)
class Shapes:
    """Widths of the embeddings and of the tokens of student and teacher, and the numbers of tokens and of classes."""

    student: int = 384
    teacher: int = 1024
    tokens: int = 196
    classes: int = 1000

    def features(self, width: int, images: int, seed: int) -> Features:
        """Return made-up features of one network."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [images, self.classes], [images, width], [images, self.tokens, width]
        logits, embedding, tokens = (torch.randn(shape, generator=generator) for shape in shapes)
        return Features(logits, embedding, tokens, grid=(2, self.tokens // 2))


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step of one head exchanges.

    Attributes:
        gathered: bytes per image that every rank gets from every other.
        scattered: bytes per image of the gradients that every rank gets from every other.
        reduced: bytes that are summed over all ranks, whatever the batch.
    """

    gathered: int
    scattered: int = 0
    reduced: int = 0

    def received(self, ranks: int, images: int) -> float:
        """Return the bytes that a rank receives in a ring of `ranks` with `images` each."""
        return (ranks - 1) * (images * (self.gathered + self.scattered) + 2 * self.reduced / ranks)


def formulas(shapes: Shapes) -> dict[str, tuple[Callable[[], Head], Traffic]]:
    """Return the heads that relate images or keep a memory, with what they exchange."""
    student, both, classes = FLOAT * shapes.student, FLOAT * (shapes.student + shapes.teacher), FLOAT * shapes.classes
    width, drawn, square = FLOAT * 128, 8, FLOAT
    return {
        "CrossEntropy": (CrossEntropy, Traffic(0, 0, FLOAT)),
        "RKD": (RKD, Traffic(both, student, 6 * FLOAT)),
        "SP (tokens)": (SP, Traffic(shapes.tokens * both, shapes.tokens * student)),
        "PKT": (PKT, Traffic(both, student)),
        "CC": (CC, Traffic(both, student)),
        "IRG": (IRG, Traffic(both + 2 * square, student + square, 8 * FLOAT)),
        "RepDistillerCC": (RepDistillerCC, Traffic(2 * width, 2 * width)),
        "DIST": (DIST, Traffic(2 * classes, classes)),
        "MLKD": (MLKD, Traffic(2 * classes + INTEGER, classes)),
        "VRM": (VRM, Traffic(2 * classes, classes)),
        "DCD": (DCD, Traffic(2 * width, 2 * width)),
        "TRG": (TRG, Traffic(drawn * both, drawn * student, 3 * FLOAT)),
        "RRD": (RRD, Traffic(width)),
        "CRD": (partial(CRD, samples=5000, negatives=64), Traffic(2 * width + 2 * INTEGER)),
    }


def measure(run: Run) -> list[Bound]:
    """Print three tables; return the bounds."""
    run = replace(run, device=torch.device("cpu"))
    return [*_counted(run), *_projected(), *_own_work(run)]


def _counted(run: Run) -> list[Bound]:
    """Hold the formulas to what two processes exchange."""
    shapes, images = Shapes(24, 40, 16, 10), 8
    counts = in_processes(_exchanged, PROCESSES, run, shapes, images)
    rows, bounds = [], []
    for name, (_, traffic) in formulas(shapes).items():
        expected = {
            "all_gather": images * traffic.gathered,
            "reduce_scatter_tensor": PROCESSES * images * traffic.scattered,
            "all_reduce": traffic.reduced,
        }
        found = counts[0][name]
        rows.append([name, *(f"{found[kind]:,}" for kind in expected), f"{sum(expected.values()):,}"])
        difference = max(abs(count[name][kind] - size) for count in counts for kind, size in expected.items())
        bounds.append(Bound(f"{name}: bytes exchanged, formula against two processes", float(difference), at_most=0))
    head = ["", "gathered", "scattered", "reduced", "by the formula"]
    title = f"Bytes that a rank puts into collectives in a step, {PROCESSES} processes, {images} images each"
    CONSOLE.print(table(title, head, rows))
    return bounds


def _exchanged(run: Run, shapes: Shapes, images: int) -> dict[str, dict[str, int]]:
    """Count the bytes that each head puts into collectives in its second step."""
    found: dict[str, dict[str, int]] = {}
    for name, (make, _) in formulas(shapes).items():
        features = [shapes.features(width, images, dist.get_rank()) for width in (shapes.student, shapes.teacher)]
        step = _step(make(), features[0], features[1], _batch(images, dist.get_rank()))
        step()  # a memory may do in its first step what it never does again
        with collectives() as calls:
            step()
        sizes = dict.fromkeys(("all_gather", "reduce_scatter_tensor", "all_reduce"), 0)
        for call in calls:
            if not call.is_check:
                sizes[call.kind] += call.bytes
        found[name] = sizes
    return found


def _projected() -> list[Bound]:
    """Print bytes and milliseconds for 8 to 1024 GPUs, and what is computed."""
    shapes, counts = Shapes(), [8, 64, 256, 1024]
    rows = []
    for name, (_, traffic) in formulas(shapes).items():
        row = [name, f"{(traffic.gathered + traffic.scattered) / 1e3:,.1f}"]
        for ranks in counts:
            received = traffic.received(ranks, IMAGES)
            row.append(f"{received / 1e6:,.1f} ({1e3 * _seconds(received, ranks):,.3f})")
        rows.append(row)
    head = ["", "KB an image", *(f"{ranks} GPUs: MB (ms)" for ranks in counts)]
    title = f"What each GPU receives in a step of {IMAGES} images a GPU, ViT-L -> ViT-S, 1000 classes"
    CONSOLE.print(table(title, head, rows))
    CONSOLE.print(
        f"ms: at {NVLINK / 1e9:.0f} GB/s within a node of {NODE} and {NETWORK / 1e9:.0f} GB/s a GPU between nodes, "
        "what enters a node spread over its ports; without latencies, and as if nothing else travelled"
    )
    return []


def _seconds(received: float, ranks: int) -> float:
    """Return the least time for bytes that each rank receives from all others in equal parts."""
    from_other_nodes = received * max(ranks - NODE, 0) / max(ranks - 1, 1)
    return max(received / NVLINK, from_other_nodes / (NODE * NETWORK))


OWN: Mapping[str, tuple[Callable[[], Head], int]] = {
    "RKD's distances": (partial(RKD, angle=0.0), 2048),
    "RKD's angles": (partial(RKD, distance=0.0), 512),
    "SP": (partial(SP, of="embedding"), 2048),
    "PKT": (PKT, 2048),
    "CC": (CC, 2048),
    "IRG": (IRG, 2048),
    "DCD": (DCD, 2048),
    "TRG": (partial(TRG, contextual_weight=0.0), 512),
}
"""Heads with the size of the batch of all ranks."""


def _own_work(run: Run) -> list[Bound]:
    """Compare a rank's processor time with that of one process."""
    whole, shared = (in_processes(_times, count, run)[0] for count in (1, PROCESSES))
    rows, bounds = [], []
    for name, (_, images) in OWN.items():
        ratio = shared[name] / whole[name]
        times = f"{1e3 * whole[name]:.0f}", f"{1e3 * shared[name]:.0f}", f"{ratio:.2f}"
        rows.append([f"{name}, {images} images", *times])
        bounds.append(
            Bound(f"{name}: processor time of one of {PROCESSES} ranks / of one process", ratio, at_most=0.75)
        )
    head = ["", "one process, ms (best)", "a rank, ms (best)", "ratio"]
    CONSOLE.print(table(f"Processor time for the same batch of all ranks, {PROCESSES} ranks, one thread", head, rows))
    return [] if run.tiny else bounds


def _times(run: Run) -> dict[str, float]:
    """Return the best processor seconds of each head on this rank's part of the batch."""
    shapes, found = Shapes(student=192, teacher=384, tokens=16, classes=10), {}
    for name, (make, whole) in OWN.items():
        images = (32 if run.tiny else whole) // dist.get_world_size()
        features = [shapes.features(width, images, dist.get_rank()) for width in (shapes.student, shapes.teacher)]
        step = _step(make(), features[0], features[1], _batch(images, dist.get_rank()))
        step()
        seconds = []
        for _ in range(run.repeat(5)):
            dist.barrier()
            started = process_time()
            step()
            seconds.append(process_time() - started)
        found[name] = min(seconds)
    return found


def _batch(images: int, rank: int) -> dict[str, Tensor]:
    index = torch.arange(images) + rank * images
    return {"index": index, "label": index % 5, "view": torch.arange(images) * 2 // images}


def _step(head: Head, student: Features, teacher: Features, batch: dict[str, Tensor]) -> Callable[[], None]:
    torch.manual_seed(0)
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))

    def step() -> None:
        head(student.apply(lambda tensor: tensor.detach().requires_grad_()), teacher, batch).backward()

    return step


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
