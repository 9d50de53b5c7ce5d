"""Two pairs of networks, on which the steps are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from timing import Run
from torch import nn
from torch.optim import Optimizer

from distill.heads import Batch
from distill.networks.timm import Timm


@dataclass(frozen=True)
class Pair:
    """A teacher, a student and their training.

    Attributes:
        title: title in tables.
        student: name of the student in timm.
        teacher: name of the teacher in timm.
        side: side of the images, in pixels.
        classes: number of classes.
        images: images per step on a CPU.
        images_on_gpu: images per step on a GPU.
        optimizer: its name in `torch.optim`, and its arguments.
        options: options of both networks.
    """

    title: str
    student: str
    teacher: str
    side: int
    classes: int
    images: int
    images_on_gpu: int
    optimizer: tuple[str, dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)

    def networks(self) -> tuple[Timm, Timm]:
        """Return student and teacher, built, with the same weights each time."""
        torch.manual_seed(0)
        networks = Timm(self.student, options=self.options), Timm(self.teacher, options=self.options)
        for network in networks:
            network.build(self.classes, (3, self.side, self.side))
        return networks

    def batch(self, run: Run) -> Batch:
        """Return random images, labels and indices, the same each time."""
        count = self.images_on_gpu if run.on_gpu else self.images
        generator = torch.Generator().manual_seed(0)
        batch = {
            "image": torch.rand(count, 3, self.side, self.side, generator=generator),
            "label": torch.randint(self.classes, (count,), generator=generator),
            "index": torch.arange(count),
        }
        return {name: tensor.to(run.device) for name, tensor in batch.items()}

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return the optimizer of these parameters."""
        name, arguments = self.optimizer
        maker: Callable[..., Optimizer] = getattr(torch.optim, name)
        return maker(parameters, **arguments)


ADAMW = ("AdamW", {"lr": 1e-4, "weight_decay": 0.05})
SGD = ("SGD", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 5e-4})
VIT = Pair("ViT-S -> ViT-Ti at 224", "vit_tiny_patch16_224", "vit_small_patch16_224", 224, 1000, 8, 128, ADAMW)
CIFAR = Pair("resnet32x4 -> resnet8x4 at 32", "resnet8x4_cifar", "resnet32x4_cifar", 32, 100, 16, 64, SGD)
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY = (
    Pair("tiny ViTs at 32", VIT.student, VIT.teacher, 32, 10, 4, 4, ADAMW, SMALL),
    Pair("resnet8x4 -> resnet8x4 at 32", CIFAR.student, CIFAR.student, 32, 10, 4, 4, SGD),
)


def pairs(run: Run) -> tuple[Pair, Pair]:
    """Return the pair of vision transformers and the pair of the CRD benchmark."""
    return TINY if run.tiny else (VIT, CIFAR)
