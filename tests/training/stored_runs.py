"""Small images, networks and runs with a teacher and with its stored answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn

from distill.data import ArraySource, ImageData, ImageDataset, Split
from distill.data.augmentation import small_image_transform
from distill.networks import Network, TorchModule
from distill.objective import Term
from distill.store import StoredTeacher
from distill.training.distillation import DistillationModule
from distill.training.store_plan import StorePlan, plan_store, write_states
from distill.training.storing import write_missing

COUNTS: dict[str, int] = {"train": 32, "val": 12, "test": 10}
CLASSES = 5


class Pictures(ImageData):
    """Random images, shifted and flipped by a key.

    Args:
        images: number of training images.
        seed_of_images: of pixels and labels.
        side: to which the images are resized.
        batch_size: of `ImageData`.
        draws: likewise.
        settings: arguments of `ImageData`.
    """

    def __init__(
        self,
        images: int = 32,
        seed_of_images: int = 0,
        side: int = 32,
        batch_size: int = 8,
        draws: int | None = 2,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, draws=draws, **settings)
        self.num_classes, self.image_shape = CLASSES, (3, side, side)
        self.counts = {**COUNTS, "train": images}
        self.seed_of_images = seed_of_images

    def samples(self, split: Split) -> ImageDataset:
        """Return the images of a split."""
        generator = torch.Generator().manual_seed(100 * self.seed_of_images + len(split))
        count = self.counts[split]
        images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count) % CLASSES
        transform = small_image_transform(self.image_shape[1], augment=split == "train")
        return ImageDataset(ArraySource(images, labels), transform)


class Convolutions(nn.Module):
    """Two convolutions with maps, tokens of the last one, their mean and a classifier.

    Args:
        width: channels of the first.
        dropout: probability before the classifier.
        stride: of the second, on a map of 8 x 8.
    """

    def __init__(self, width: int = 8, dropout: float = 0.0, stride: int = 2) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), nn.BatchNorm2d(width), nn.ReLU())
        self.high = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=stride, padding=1), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(2 * width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits."""
        scores: Tensor = self.classifier(self.dropout(self.high(self.low(image)).mean((2, 3))))
        return scores


def network(seed: int, **settings: Any) -> Network:
    """A network of convolutions with weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Convolutions(**settings)
    return TorchModule(module, tokens="high", taps=["low", "high"])


def student() -> Network:
    return network(1, width=6, dropout=0.3)


def teacher() -> Network:
    return network(2)


def other_teacher() -> Network:
    return network(3, width=4, stride=1)


Heads = Callable[[], Mapping[str, Term]]


def module(heads: Heads, **settings: Any) -> DistillationModule:
    """A module whose random weights are the same in every run."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "student": student(),
        "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        "num_classes": CLASSES,
        "image_shape": (3, 32, 32),
    }
    if not {"teacher", "teachers"} & settings.keys():
        defaults["teacher"] = teacher()
    return DistillationModule(heads=dict(heads()), **{**defaults, **settings})


class Curves(Callback):
    """Records all that is logged at each step, but no times."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the step."""
        self.rows.append(
            {name: float(value) for name, value in trainer.callback_metrics.items() if not name.endswith("_ms")}
        )


@dataclass
class Run:
    """What a run leaves.

    Attributes:
        state: of the module.
        curves: what was logged, by step.
        metrics: at the end.
    """

    state: dict[str, Tensor]
    curves: list[dict[str, float]]
    metrics: dict[str, float]


def trainer(callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
    return Trainer(
        callbacks=[*callbacks],
        **{
            "accelerator": "cpu",
            "max_epochs": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **settings,
        },
    )


def fit(model: DistillationModule, data: Any, callbacks: Sequence[Callback] = (), **settings: Any) -> Run:
    """Train a module."""
    seed_everything(0, verbose=False)
    curves = Curves()
    run = trainer([*callbacks, curves], **settings)
    run.fit(model, data)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return Run(state, curves.rows, metrics_of(run))


def metrics_of(run: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in run.callback_metrics.items() if not name.endswith("_ms")}


def plan(
    folder: Path,
    model: DistillationModule,
    data: ImageData,
    *,
    of: str = "teacher",
    splits: Sequence[Split] = ("train", "val"),
    callbacks: Sequence[Callback] = (),
    network: Any = None,
    **settings: Any,
) -> tuple[StorePlan, Trainer]:
    """The plan of a store, and the trainer that fills it."""
    seed_everything(0, verbose=False)
    data.setup("fit")
    run = trainer(callbacks, **settings)
    return plan_store(run, model, data, of, splits, folder, network), run


def store(folder: Path, model: DistillationModule, data: ImageData, *, share: tuple[int, int] = (0, 1), **rest: Any):
    """Store what the heads of a module compare with; one of several shares of it."""
    planned, run = plan(folder, model, data, **rest)
    planned.index.write(folder)
    write_states(model, planned.teacher, planned.requests, folder)
    for lacking in planned.share(*share).lacking:
        write_missing(run, model, data, planned.teacher, planned.requests, lacking, planned.index, folder)
    return planned


def differing(live: Run, stored: Run) -> list[str]:
    """The names of all that differs in any bit."""
    found = sorted(live.state.keys() ^ stored.state.keys())
    found += [name for name in live.state if not torch.equal(live.state[name], stored.state[name])]
    assert len(live.curves) == len(stored.curves) > 0
    for step, (first, second) in enumerate(zip(live.curves, stored.curves, strict=True)):
        assert first.keys() == second.keys()
        found += [f"{name} at step {step}" for name in first if first[name] != second[name]]
    return found


def live_and_stored(
    folder: Path,
    heads: Heads,
    data: Callable[[], ImageData] = Pictures,
    *,
    networks: Callable[[], Mapping[str, Any]] = dict,
    callbacks: Callable[[], Sequence[Callback]] = tuple,
    **settings: Any,
) -> tuple[Run, Run]:
    """A run with the teacher, and one with its stored answers."""
    store(folder, module(heads, **networks()), data(), callbacks=callbacks())
    live = fit(module(heads, **networks()), data(), callbacks(), **settings)
    replayed = module(heads, **{**networks(), "teacher": StoredTeacher(str(folder))})
    return live, fit(replayed, data(), callbacks(), **settings)
