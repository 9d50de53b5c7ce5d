"""Tables of a training set-up: networks, loss terms, data and optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distill.heads import Head
from distill.networks import Network
from distill.objective import Term
from distill.schedules import Schedule
from distill.training.classification import ClassificationModule
from distill.training.distillation import DistillationModule
from distill.training.optimizer import EffectiveBatch


def print_set_up(
    module: LightningModule, data: LightningDataModule | None, trainer: Trainer, console: Console | None = None
) -> None:
    """Print the networks with their feature shapes, the heads with their weights, and the data.

    Args:
        module: the module; building it has already checked the configuration.
        data: the module's data.
        trainer: provides the number of devices and accumulation steps.
        console: the console to print to; standard output by default.
    """
    console = console or Console()
    if isinstance(module, DistillationModule):
        console.print(_networks(module))
        console.print(_heads(module))
    if data is not None:
        console.print(_data(data, trainer))
        if (batch := _effective_batch(data, trainer)) is not None:
            console.print(_step(module, batch))
    console.print("The set-up is valid.")


def _networks(module: DistillationModule) -> Table:
    table = Table(title="Networks", title_justify="left")
    table.add_column("")
    columns: list[dict[str, str]] = []
    for side, network in (("teacher", module.teacher), ("student", module.student)):
        if network is not None:
            table.add_column(side)
            columns.append(_network_rows(network if isinstance(network, Network) else network.network))
    names = list(dict.fromkeys(name for column in columns for name in column))
    for name in names:
        table.add_row(name, *(column.get(name, "-") for column in columns))
    return table


def _network_rows(network: Network) -> dict[str, str]:
    spec = network.spec
    parameters = list(network.parameters())
    rows = {
        "network": network.name,
        "parameters": _count(parameters),
        "trainable": _count(parameter for parameter in parameters if parameter.requires_grad),
        "logits": _shape(spec.logits),
        "embedding": _shape(spec.embedding),
        "tokens": _shape(spec.tokens),
        "grid": _shape(spec.grid),
    }
    return rows | {f"tap {name}": _shape(shape) for name, shape in spec.maps.items()}


def _heads(module: DistillationModule) -> Table:
    table = Table(title="Terms of the loss", title_justify="left")
    for name in ("name", "head", "reads", "scope", "weight", "parameters", "memory"):
        table.add_column(name)
    for name, term in module.terms.items():
        head = term.head
        memory = sum(buffer.numel() * buffer.element_size() for buffer in head.buffers())
        table.add_row(
            name,
            type(head).__name__,
            ", ".join(sorted(head.needs | head.batch_needs)) or "-",
            _scope(head),
            _weight(term),
            _count(head.parameters()),
            f"{memory / 2**20:.1f} MiB" if memory else "-",
        )
    return table


def _data(data: LightningDataModule, trainer: Trainer) -> Table:
    table = Table(title="Data", title_justify="left", show_header=False)
    table.add_row("data set", type(data).__name__)
    table.add_row("classes", str(getattr(data, "num_classes", "-")))
    table.add_row("image", _shape(getattr(data, "image_shape", None)))
    for split, loader in (
        ("train", data.train_dataloader),
        ("val", data.val_dataloader),
        ("test", data.test_dataloader),
    ):
        table.add_row(f"{split} images", f"{len(loader().dataset):,}")
    if hasattr(data, "class_counts"):
        table.add_row("train images per class", _class_counts(data.class_counts()))
    return table


def _step(module: LightningModule, batch: EffectiveBatch) -> Table:
    table = Table(title="Optimizer step", title_justify="left", show_header=False)
    table.add_row("effective batch", str(batch))
    if isinstance(module, ClassificationModule):
        table.add_row("learning rate", module.make_optimizer(batch)[1])
    return table


def _effective_batch(data: LightningDataModule, trainer: Trainer) -> EffectiveBatch | None:
    images = getattr(data, "batch_size", None)
    return None if images is None else EffectiveBatch(images, trainer.world_size, trainer.accumulate_grad_batches)


def _scope(head: Head) -> str:
    return "batch (its value depends on the number of ranks)" if head.scope == "batch" else head.scope


def _class_counts(counts: list[int], shown: int = 20) -> str:
    """Format the image counts per class and their imbalance; a long list is cut to its ends."""
    numbers = [str(count) for count in counts]
    if len(numbers) > shown:
        numbers = [*numbers[: shown // 4], "...", *numbers[-shown // 4 :]]
    return f"{' '.join(numbers)} (imbalance {min(counts) / max(*counts, 1):.2g})"


def _count(parameters: Iterable[Tensor]) -> str:
    return f"{sum(prod(parameter.shape) for parameter in parameters):,}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape))


def _weight(term: Term) -> str:
    if not isinstance(term.weight, Schedule):
        return f"{term.weight:g}" + (" (negative: the term grows)" if term.weight < 0 else "")
    settings: dict[str, Any] = {name: value for name, value in vars(term.weight).items() if value is not None}
    return f"{type(term.weight).__name__}({', '.join(f'{name}={value}' for name, value in settings.items())})"
