"""The teacher's share of a step in float32, bfloat16, compiled and channels-last, and the change of the losses.

python experiments/benchmarks/teacher.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from pairs import Pair, pairs
from timing import CONSOLE, Bound, Run, command_line, interleaved, median_ratio, milliseconds, spread, table
from torch import Tensor

from distill.data import FashionMNIST
from distill.features import Features, FeatureSpec
from distill.heads import Head
from distill.heads.kd import KD
from distill.heads.rkd import RKD
from distill.heads.rrd import RRD
from distill.heads.serkd import SeRKD
from distill.heads.trg import TRG
from distill.networks import FrozenTeacher, Timm

STUDENT = "the student's part of the step"
FLOAT32 = "float32"
TOLERANCE = 1e-2
"""Largest relative difference of a head's loss from that with the teacher in float32."""
WEIGHTS = Path(__file__).parents[1] / "fashion_mnist/teacher.safetensors"
IMAGES = Path("/usr/share/datasets/fashion-mnist")
"""Where `make study-data` installs Fashion-MNIST."""


def measure(run: Run) -> list[Bound]:
    """Print two tables for each pair; return the bounds on the losses."""
    bounds: list[Bound] = []
    for pair in pairs(run):
        bounds += _pair(pair, run)
    return bounds if run.tiny else [*bounds, *_trained(run)]


def make_variants(teacher: FrozenTeacher, pair: Pair, run: Run) -> dict[str, Callable[[Tensor], Features]]:
    """Return the teacher in its variants by name."""
    variants: dict[str, Callable[[Tensor], Features]] = {FLOAT32: teacher}
    channels_last = copy.deepcopy(teacher)
    channels_last.network.to(memory_format=torch.channels_last)
    variants["channels-last"] = lambda image: channels_last(image.contiguous(memory_format=torch.channels_last))
    variants["bfloat16"] = FrozenTeacher(copy.deepcopy(teacher.network), torch.bfloat16).to(run.device)
    compiled = copy.deepcopy(teacher)
    compiled.network.compile()
    variants["compiled"] = compiled
    if run.on_gpu:
        both = FrozenTeacher(copy.deepcopy(teacher.network), torch.bfloat16).to(run.device)
        both.network.compile()
        variants["bfloat16, compiled"] = both
    return variants


def _pair(pair: Pair, run: Run) -> list[Bound]:
    batch = pair.batch(run)
    image = batch["image"]
    student, network = pair.networks()
    student.train().to(run.device)
    teacher = FrozenTeacher(network).to(run.device)
    optimizer = pair.make_optimizer(student.parameters())
    features: dict[str, Features] = {}
    contenders: dict[str, Callable[[], object]] = {}
    for name, variant in make_variants(teacher, pair, run).items():
        try:
            features[name] = variant(image)
        except Exception as error:  # for lack of a compiler, for example
            CONSOLE.print(f"{name} did not run: {(str(error).splitlines() or [''])[0]}", markup=False)
        else:
            contenders[name] = partial(variant, image)

    def student_part() -> None:
        loss = F.cross_entropy(student(image)["logits"], batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    student_features = student(image).apply(Tensor.detach)
    seconds = interleaved({**contenders, STUDENT: student_part}, run.repeat(7), run, pair.title)
    rows = []
    rest = spread(seconds[STUDENT])[2]
    plain = spread(seconds[FLOAT32])[2]
    for name in contenders:
        best, *quarters = spread(seconds[name])
        middle = quarters[1]
        rows.append(
            [
                *(name, milliseconds(best), " / ".join(map(milliseconds, quarters))),
                f"{median_ratio(seconds[name], seconds[FLOAT32]):.3f}",
                *(f"{100 * middle / (middle + rest):.0f} %", f"{100 * (plain - middle) / (plain + rest):+.0f} %"),
            ]
        )
    head = ["the teacher in", "ms (best)", "quartiles", "ratio (median)", "share of the step", "saved of the step"]
    CONSOLE.print(table(f"The teacher's pass: {pair.title}, {len(image)} images", head, rows))
    return _losses(pair.title, batch, student_features, features)


def _trained(run: Run) -> list[Bound]:
    """Compare the losses with a trained teacher, whose embeddings of images differ more than an untrained one's."""
    title = "trained resnet20 -> resnet8, Fashion-MNIST"
    if not IMAGES.is_dir():
        CONSOLE.print(f"{title}: did not run, since {IMAGES} is missing (`make study-data`)", markup=False)
        return []
    data = FashionMNIST(str(IMAGES), batch_size=64, num_workers=0)
    seed_everything(0, verbose=False)
    data.setup("fit")
    given = next(iter(data.train_dataloader()))
    batch = {name: given[name].to(run.device) for name in ("image", "label", "index")}
    student, network = Timm("resnet8_cifar"), Timm("resnet20_cifar", weights=str(WEIGHTS))
    for each in (student, network):
        each.build(10, data.image_shape)
    student.train().to(run.device)
    features = {
        name: FrozenTeacher(copy.deepcopy(network), dtype).to(run.device)(batch["image"])
        for name, dtype in ((FLOAT32, None), ("bfloat16", torch.bfloat16))
    }
    return _losses(title, batch, student(batch["image"]).apply(Tensor.detach), features)


def _losses(title: str, batch: dict[str, Tensor], student: Features, teachers: dict[str, Features]) -> list[Bound]:
    """Compare each head's losses, with the same projections and draws for all teachers; return the bounds."""
    tokens = student["tokens"].shape[1]
    heads: dict[str, Callable[[], Head]] = {
        "KD": KD,
        "RKD": RKD,
        "RRD": partial(RRD, size=max(64, len(batch["image"]))),
        "SeRKD": SeRKD,
        "TRG": partial(TRG, tokens_per_image=min(tokens, 16)),
    }
    losses: dict[str, dict[str, float]] = {}
    for name, make in heads.items():
        losses[name] = {}
        for name_of_variant, teacher in teachers.items():
            torch.manual_seed(0)
            head = make()
            head.build(*map(FeatureSpec.of, (student, teacher)))
            losses[name][name_of_variant] = head.to(batch["image"].device).train()(student, teacher, batch).item()
    apart = {
        way: {name: abs(found[way] - found[FLOAT32]) / abs(found[FLOAT32]) for name, found in losses.items()}
        for way in teachers
        if way != FLOAT32
    }
    rows = [[way, *(f"{difference:.1e}" for difference in each.values())] for way, each in apart.items()]
    CONSOLE.print(table(f"How far the losses are from float32's: {title}", ["the teacher in", *heads], rows))
    return [
        Bound(f"5 teacher in {way}, {title}: largest difference of a loss", max(each.values()), at_most=TOLERANCE)
        for way, each in apart.items()
    ]


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
