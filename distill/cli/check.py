"""Tables of a training set-up: networks, loss terms, data and optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite, prod
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from distill.data import ImageData, ImageReader
from distill.data.loaders import loader_of
from distill.errors import UserError
from distill.features import FeatureSpec
from distill.heads import Batch, Head
from distill.networks import FrozenTeacher, Network, Teacher
from distill.objective import Term
from distill.schedules import Schedule, bounds_of
from distill.store import StoredTeacher
from distill.training.batches import sample_batch
from distill.training.classification import ClassificationModule
from distill.training.distillation import DistillationModule
from distill.training.optimizer import EffectiveBatch
from distill.training.run_info import progress_of, smallest_batch, steps_per_epoch


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
        console.print(_data(data, module))
        if (batch := _effective_batch(data, trainer)) is not None:
            console.print(_step(module, batch, data, trainer))


def read_all_images(data: LightningDataModule, console: Console | None = None) -> None:
    """Read every image of the data once, with a progress bar, and print those that cannot be read.

    Args:
        data: the data module, set up.
        console: the console to print to; standard output by default.

    Raises:
        UserError: an image cannot be read.
    """
    console = console or Console()
    reader = ImageReader(data)
    broken = 0
    with Progress(
        TextColumn("reading images"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("", total=reader.total)
        for read in reader:
            progress.advance(task, read.images)
            broken += len(read.broken)
            for sentence in read.broken:
                console.print(f"{read.split}: {sentence}", highlight=False, markup=False, soft_wrap=True)
    if broken:
        raise UserError(
            f"data: {broken:,} of {reader.total:,} images cannot be read: replace or remove those listed above"
        )
    console.print(f"All {reader.total:,} images can be read.")


def run_check(args: list[str]) -> None:
    """Run `distill check`; `--data` without a class also reads every image."""
    from distill.cli.program import run

    following = [*args[1:], "-"]
    bare = [arg == "--data" and after.startswith("-") for arg, after in zip(args, following, strict=True)]
    run(["--read_data=true" if is_bare else arg for arg, is_bare in zip(args, bare, strict=True)])


def _networks(module: DistillationModule) -> Table:
    table = Table(title="Networks", title_justify="left")
    table.add_column("")
    columns: list[dict[str, str]] = []
    for name, teacher in module.teachers.items():
        table.add_column(name)
        columns.append(_teacher_rows(teacher))
    table.add_column("student")
    columns.append(_network_rows(module.student))
    names = list(dict.fromkeys(name for column in columns for name in column))
    for name in names:
        table.add_row(name, *(column.get(name, "-") for column in columns))
    return table


def _teacher_rows(teacher: Teacher) -> dict[str, str]:
    if isinstance(teacher, FrozenTeacher):
        return _network_rows(teacher.network)
    if isinstance(teacher, StoredTeacher):
        splits = ", ".join(f"{len(rows):,} {split}" for split, rows in teacher.index.splits.items())
        return {"network": teacher.name, "stored rows": splits, **_shapes(teacher.spec)}
    return {"network": teacher.name, **_shapes(teacher.spec)}


def _network_rows(network: Network) -> dict[str, str]:
    parameters = list(network.parameters())
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *network.buffers()))
    return {
        "network": network.name,
        "parameters": _count(parameters),
        "trainable": _count(parameter for parameter in parameters if parameter.requires_grad),
        "memory": f"{size / 2**20:.1f} MiB",
        **_shapes(network.spec),
        **{
            f"tap {name}": f"{_shape(network.spec.maps[name])} ({layer})"
            for name, layer in network.tap_layers.items()
            if name != layer
        },
    }


def _shapes(spec: FeatureSpec) -> dict[str, str]:
    rows = {
        "logits": _shape(spec.logits),
        "embedding": _shape(spec.embedding),
        "tokens": _shape(spec.tokens),
        "grid": _shape(spec.grid),
    }
    return rows | {f"tap {name}": _shape(shape) for name, shape in spec.maps.items()}


def _heads(module: DistillationModule) -> Table:
    table = Table(title="Terms of the loss", title_justify="left")
    several = ["teacher"] if len(module.teachers) > 1 else []
    chosen = ["views"] if any(term.views or term.teacher_views for term in module.terms.values()) else []
    for name in ("name", "head", *several, *chosen, "reads", "scope", "weight", "parameters", "memory"):
        table.add_column(name)
    for name, term in module.terms.items():
        head = term.head
        memory = sum(buffer.numel() * buffer.element_size() for buffer in head.buffers())
        table.add_row(
            name,
            type(head).__name__,
            *(module.distiller.objective.teacher_of(name) or "-" for _ in several),
            *(_views(term) for _ in chosen),
            ", ".join(sorted(head.needs | head.batch_needs)) or "-",
            _scope(head),
            _weight(term),
            _count(head.parameters()),
            f"{memory / 2**20:.1f} MiB" if memory else "-",
        )
    return table


def _data(data: LightningDataModule, module: LightningModule) -> Table:
    table = Table(title="Data", title_justify="left", show_header=False)
    table.add_row("data set", type(data).__name__)
    table.add_row("classes", str(getattr(module, "num_classes", "-") or "none: no labels"))
    table.add_row("image", _shape(getattr(module, "image_shape", None)))
    if not isinstance(data, ImageData):
        data.prepare_data()
    for split, stage in (("train", "fit"), ("val", "fit"), ("test", "test")):
        if not isinstance(data, ImageData):
            data.setup(stage)
        loader = loader_of(data, split)
        table.add_row(f"{split} images", _images(loader))
        if split == "train":
            table.add_row("batch", _sample(loader, module, data))
    for note in getattr(data, "notes", ()):
        table.add_row("note", note)
    counts: Any = data if getattr(module, "num_classes", 0) else None
    if hasattr(counts, "class_counts"):
        table.add_row("train images per class", _class_counts(counts.class_counts()))
    return table


def _images(loader: Any) -> str:
    """Return the number of images of a loader; "-" without a loader, "?" if it is not known."""
    try:
        return "-" if loader is None else f"{len(loader.dataset):,}"
    except (AttributeError, TypeError):
        return "?"


def _sample(loader: Any, module: LightningModule, data: LightningDataModule) -> str:
    """Return one line that says what a batch holds, and the range of its images."""
    try:
        batch: Batch | None = sample_batch(loader, module, data)
    except UserError as error:
        if not isinstance(data, ImageData):
            raise
        return str(error)  # a broken image, among those that `--data` lists
    if batch is None:
        return "known only from the first batch of the training"
    low, high = (float(value) for value in batch["image"].aminmax())
    entries = [
        f"{key} {str(value.dtype).removeprefix('torch.')} {_shape(('B', *value.shape[1:]))}"
        for key, value in batch.items()
        if isinstance(value, Tensor)
    ]
    return f"{', '.join(entries)}; images from {low:.3g} to {high:.3g}"


def _step(module: LightningModule, batch: EffectiveBatch, data: LightningDataModule, trainer: Trainer) -> Table:
    table = Table(title="Optimizer step", title_justify="left", show_header=False)
    table.add_row("effective batch", str(batch))
    if (views := len(getattr(data, "train_views", "1"))) > 1 and isinstance(module, ClassificationModule):
        passes = module.distiller.view_passes
        table.add_row("views of each image", f"{views}, so {views * batch.images} rows a batch; {passes} passes")
    progress_of(trainer, 0)  # loads the training data, as `fit` does
    loader: Any = trainer.train_dataloader
    last = smallest_batch(loader, trainer.num_training_batches)
    if last is not None and last != loader.batch_size:
        table.add_row("last batch of an epoch", f"{last} images x {batch.devices} devices")
    steps = steps_per_epoch(trainer.num_training_batches, trainer.accumulate_grad_batches)
    if isfinite(steps):  # of data with a length, or with a limit
        table.add_row("steps per epoch", f"{steps:,.0f}")
    if isinstance(module, ClassificationModule):
        table.add_row("learning rate", module.make_optimizer(batch)[1])
    return table


def _effective_batch(data: LightningDataModule, trainer: Trainer) -> EffectiveBatch | None:
    images = getattr(data, "batch_size", None)
    return None if images is None else EffectiveBatch(images, trainer.world_size, trainer.accumulate_grad_batches)


def _views(term: Term) -> str:
    """Return the views of the student, and those of the teacher where they are named."""
    sides = ["all" if each is None else ", ".join(map(str, each)) for each in (term.views, term.teacher_views)]
    return sides[0] if term.teacher_views is None else f"{sides[0]} (teacher {sides[1]})"


def _scope(head: Head) -> str:
    return "batch (its value depends on the number of ranks)" if head.scope == "batch" else head.scope


def _class_counts(counts: list[int], shown: int = 20) -> str:
    """Format the image counts per class and their imbalance; a long list is cut to its ends."""
    if not counts:
        return "no labels"
    numbers = [str(count) for count in counts]
    if len(numbers) > shown:
        numbers = [*numbers[: shown // 4], "...", *numbers[-shown // 4 :]]
    return f"{' '.join(numbers)} (imbalance {min(counts) / max(*counts, 1):.2g})"


def _count(parameters: Iterable[Tensor]) -> str:
    return f"{sum(prod(parameter.shape) for parameter in parameters):,}"


def _shape(shape: tuple[int | str, ...] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape))


def _weight(term: Term) -> str:
    lowest = (bounds_of(term.weight) or (0.0,))[0]
    note = " (negative: this term is maximized)" if lowest < 0 else ""
    if not isinstance(term.weight, Schedule):
        return f"{term.weight:g}{note}"
    settings: dict[str, Any] = {name: value for name, value in vars(term.weight).items() if value is not None}
    return f"{type(term.weight).__name__}({', '.join(f'{name}={value}' for name, value in settings.items())}){note}"
