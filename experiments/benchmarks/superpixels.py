"""What superpixels cost: images per second of each engine, and their share of a training step.

    python experiments/benchmarks/superpixels.py
    python experiments/benchmarks/superpixels.py --device cuda

Contenders run interleaved, in a random order in each round; shown are the best round and the quartiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import skimage.data
import skimage.segmentation
import torch
from rich.table import Table
from timing import CONSOLE, interleaved, print_machine, spread
from torch import Tensor
from torchvision.transforms import v2

from distill.heads import KD, Head, SeRKD
from distill.networks import FrozenTeacher
from distill.networks.timm import Timm
from distill.superpixels import fast, slic

SIZES = [(64, 32, 16), (64, 32, 64), (16, 224, 196)]
"""Images, side, segments."""


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="where torch computes; the others are for the CPU")
    parser.add_argument("--rounds", type=int, default=9, help="how often each contender runs")
    parser.add_argument("--batch", type=int, default=16, help="images of a training step")
    given = parser.parse_args()
    device = torch.device(given.device)
    print_machine(device)
    for images, side, segments in SIZES:
        CONSOLE.print(engines(photos(images, side).to(device), segments, given.rounds))
    CONSOLE.print(step(photos(given.batch, 224).to(device), given.rounds))


def photos(count: int, side: int) -> Tensor:
    """Random crops of scikit-image's photos, `[count, 3, side, side]` in [0, 1]."""
    sources = [v2.functional.to_image(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "rocket")]
    crop = v2.RandomResizedCrop(side, scale=(0.25, 1.0), ratio=(1.0, 1.0), antialias=True)
    torch.manual_seed(0)
    return torch.stack([crop(sources[number % len(sources)]) for number in range(count)]).float() / 255


def engines(images: Tensor, segments: int, rounds: int) -> Table:
    """Images per second of each engine."""
    threads = torch.get_num_threads()
    contenders: dict[str, Callable[[], object]] = {}
    for number in sorted({1, threads}) if images.device.type == "cpu" else []:
        if fast.is_installed():
            contenders[_threads("fast-slic", number)] = partial(_slic, images, segments, "fast_slic", number)
        contenders[_threads("torch SLIC", number)] = partial(_slic, images, segments, "torch", number)
    if images.device.type == "cpu":
        arrays = images.permute(0, 2, 3, 1).double().numpy()
        contenders[_threads("scikit-image", 1)] = partial(_scikit_image, arrays, segments)
    else:
        contenders[f"torch SLIC on {images.device.type}"] = partial(slic, images, segments, backend="torch")
    seconds = interleaved(contenders, rounds, images.device, f"{images.shape[-1]} pixels, {segments} segments")
    torch.set_num_threads(threads)
    table = Table(title=f"{len(images)} images of {images.shape[-1]} x {images.shape[-1]}, {segments} segments")
    table.title_justify = "left"
    for column in ("engine", "images per second", "ms an image (best)", "quartiles"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name, times in seconds.items():
        best, *quarters = (1e3 * figure / len(images) for figure in spread(times))
        table.add_row(name, f"{1e3 / best:,.0f}", f"{best:.3f}", " / ".join(f"{figure:.3f}" for figure in quarters))
    return table


def step(images: Tensor, rounds: int) -> Table:
    """Time of a step of DeiT-Ti with a ViT-S teacher: KD alone, and with SeRKD."""
    student, teacher = Timm("deit_tiny_patch16_224"), Timm("vit_small_patch16_224")
    for network in (student, teacher):
        network.build(1000, (3, 224, 224))
    student.train().to(images.device)
    frozen = FrozenTeacher(teacher).to(images.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    heads: dict[str, Head] = {"soft": SeRKD(), "segments": SeRKD(superpixels="segments")}
    for head in heads.values():
        head.build(student.spec, frozen.spec)
        head.to(images.device)

    def run(extra: str | None = None, backend: str = "auto") -> None:
        batch = {"image": images}
        if extra == "segments":
            batch["segments"] = slic(images, 49, backend=backend)
        own, other = student(images), frozen(images)
        loss = KD()(own, other, batch)
        if extra is not None:
            loss = loss + heads[extra](own, other, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    contenders = {
        "KD": run,
        "and SeRKD, soft": partial(run, "soft"),
        "and SeRKD, torch SLIC": partial(run, "segments", "torch"),
    }
    if images.device.type == "cpu" and fast.is_installed():
        contenders["and SeRKD, fast-slic"] = partial(run, "segments", "fast_slic")
    seconds = interleaved(contenders, rounds, images.device, "training steps")
    table = Table(title=f"A step of DeiT-Ti with a ViT-S teacher, {len(images)} images of 224 x 224, float32")
    table.title_justify = "left"
    for column in ("terms", "ms (best)", "quartiles", "ratio to KD (best)", "median ratio"):
        table.add_column(column, justify="left" if column == "terms" else "right")
    plain = seconds["KD"]
    for name, times in seconds.items():
        best, *quarters = (1e3 * figure for figure in spread(times))
        ratio = float(np.median([own / other for own, other in zip(times, plain, strict=True)]))
        quartiles = " / ".join(f"{figure:.0f}" for figure in quarters)
        table.add_row(name, f"{best:.0f}", quartiles, f"{best / (1e3 * min(plain)):.3f}", f"{ratio:.3f}")
    return table


def _slic(images: Tensor, segments: int, backend: str, threads: int) -> None:
    torch.set_num_threads(threads)
    slic(images, segments, backend=backend)


def _scikit_image(images: np.ndarray, segments: int) -> None:
    for image in images:
        skimage.segmentation.slic(image, segments, compactness=10, max_num_iter=10, enforce_connectivity=False)


def _threads(name: str, number: int) -> str:
    return f"{name}, {number} thread{'s' if number > 1 else ''}"


if __name__ == "__main__":
    main()
