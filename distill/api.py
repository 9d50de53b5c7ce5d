"""Distillation in one call: what `distill fit` does, from Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from lightning.pytorch import LightningDataModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distill import data as data_modules
from distill.callbacks import Results
from distill.cli.program import run
from distill.data import ImageData
from distill.data.class_folders import class_folders, is_image
from distill.errors import UserError, did_you_mean, require_above
from distill.given import Writer, given
from distill.heads import Head
from distill.networks import FeatureSource, Network
from distill.objective import TASK, Term
from distill.schedules import Cosine, Schedule, Warmup

Tree = Mapping[str, Any]
"""A part of a configuration, as in a YAML file."""


class Fitted(NamedTuple):
    """The outcome of a run.

    Attributes:
        student: the trained network itself, of timm if it was named, in eval mode on the CPU; it expects normalized
            images, unlike that of `load_student`.
        results: content of the run's `results.json`; empty on other ranks than the first.
        folder: the run's folder.
    """

    student: nn.Module
    results: dict[str, Any]
    folder: Path


def fit(
    student: str | nn.Module | Tree,
    teacher: str | nn.Module | Tree | None = None,
    *,
    data: str | Path | LightningDataModule | Tree,
    heads: Mapping[str, str | Head | Term | Tree] | None = None,
    teachers: Mapping[str, str | nn.Module | Tree] | None = None,
    task: str | Head | Term | Tree | None = None,
    epochs: int = 100,
    batch_size: int | None = None,
    lr: float | None = None,
    optimizer: Callable[..., Optimizer] | Tree | None = None,
    scheduler: Schedule | Callable[..., LRScheduler] | Tree | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int | str = "auto",
    folder: str | Path | None = None,
    resume: bool = False,
    options: Tree | None = None,
) -> Fitted:
    """Distill a student, as `distill fit` does: the run has a folder, and `export`, `probe` and `--resume` work on it.

    What the arguments say becomes a configuration, the run's `config.yaml`; objects of this package's classes are
    constructed anew from the arguments that they were given. Modules, heads and data modules of other classes are
    passed as they are: such a run resumes by the same call, and not from the command line, and its student is loaded
    with `load_student(path, student=module)`.

    Args:
        student: name of a network, a module, a network of `distill.networks`, or a part of a configuration. A name is
            one of timm, else of torchvision, or `owner/name` or a folder of Hugging Face; `timm/` or `torchvision/` in
            front decides. Named students have random weights and as many logits as the data have classes.
        teacher: likewise. A named teacher has its pretrained weights, which are downloaded, and their classifier, if
            they have one.
        data: a folder for `ImageFolder`, the name of a data module of `distill.data`, a data module, or a part of a
            configuration. In a folder, images have labels if those for training (in `train`, or in the folder itself)
            lie in folders, one per class, and none else; without `val`, a tenth of them is held out for validation.
        heads: terms by name: a head, its name, or a `Term` with a weight.
        teachers: several teachers by name; each `Term` names its own.
        task: the loss on the labels; cross-entropy by default, if there are labels.
        epochs: length of the run.
        batch_size: images per process and step; 64 by default.
        lr: learning rate of the default optimizer; 0.001 by default.
        optimizer: an optimizer's class, or a `functools.partial` of one; by default AdamW with weight decay 0.05 on
            matrices.
        scheduler: of the learning rate, likewise or a `Schedule`; by default a warm-up over the first epoch and a
            cosine to 0.
        seed: of weights, data order, augmentation and heads. Weights of given modules are what they are.
        accelerator: Lightning's `auto`, `cpu`, `gpu`, ...
        devices: Lightning's number of devices, `auto` for all.
        folder: the run's folder; by default `runs/run-1`, `runs/run-2`, ...
        resume: resume the run in `folder`, if there is one.
        options: further keys of the configuration, as on the command line: `{"trainer.precision": "bf16-mixed"}`.

    Raises:
        UserError: whatever `distill fit` refuses, with the same sentence.
    """
    require_above(0, epochs=epochs)
    writer = Writer()
    named = {
        "student": _network(student, "model.student", writer, pretrained=False),
        "teacher": None if teacher is None else _network(teacher, "model.teacher", writer),
        "teachers": {name: _network(each, f"model.teachers.{name}", writer) for name, each in (teachers or {}).items()},
    }
    terms = {name: _term(head, f"model.heads.{name}", writer) for name, head in (heads or {}).items()}
    model = {name: part for name, part in named.items() if part} | {"heads": terms}
    if task is not None:
        model[TASK] = _term(task, "model.task", writer)
    configuration: dict[str, Any] = {
        "seed_everything": seed,
        "data": _data(data, batch_size, writer),
        "model": model | _optimization(lr, optimizer, scheduler, writer),
        "trainer": {"max_epochs": epochs, "accelerator": accelerator, "devices": devices},
    }
    if folder is not None:
        configuration["trainer"]["default_root_dir"] = str(folder)
    arguments = [f"--config={json.dumps(configuration)}", *_as_arguments(options or {}, writer)]
    with given(writer.objects):
        finished = run(["fit", *arguments, *(["--resume"] if resume else [])])
    callbacks: Any = finished.trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
    results = next(callback for callback in callbacks if isinstance(callback, Results))
    return Fitted(finished.model.student.model.eval(), results.summary or {}, cast(Path, results.folder))


def _network(value: Any, key: str, writer: Writer, pretrained: bool = True) -> Any:
    """Return the configuration of a network."""
    if isinstance(value, str):
        return _named_network(value, pretrained)
    if isinstance(value, Network) and "spec" in vars(value):
        raise UserError(
            f"{key}: this {value.name} is built already, and the run would build it anew, without its weights: give "
            "its `model`, which keeps them, or a new network"
        )
    if isinstance(value, nn.Module) and not isinstance(value, FeatureSource):
        arguments: dict[str, Any] = {"module": writer.write(value, f"{key}.module")}
        normalization = getattr(value, "pretrained_cfg", {})  # of timm's models
        arguments |= {name: list(normalization[name]) for name in ("mean", "std") if name in normalization}
        return {"class_path": "TorchModule", "init_args": arguments}
    return writer.write(value, key)


def _named_network(name: str, pretrained: bool) -> dict[str, Any]:
    """Return the configuration of a network that is named: one of timm, of torchvision or of Hugging Face."""
    import timm

    import distill.networks.cifar  # noqa: F401  # registers its networks with timm

    library, slash, rest = name.partition("/")
    if (slash and library not in ("timm", "torchvision")) or (Path(name) / "config.json").is_file():
        return {"class_path": "HuggingFace", "init_args": {"name": name, "pretrained": pretrained}}
    name = rest or name
    is_of_timm = library != "torchvision" and timm.is_model(name.partition(".")[0])
    if not is_of_timm and library != "timm" and _is_of_torchvision(name):
        return {"class_path": "Torchvision", "init_args": {"name": name, "pretrained": pretrained}}
    return {"class_path": "Timm", "init_args": {"name": name, "pretrained": pretrained}}


def _is_of_torchvision(name: str) -> bool:
    from torchvision import models

    return name in models.list_models(module=models)


def _data(value: Any, batch_size: int | None, writer: Writer) -> Any:
    """Return the configuration of the data."""
    if isinstance(value, LightningDataModule):
        for name in ("num_classes", "image_shape"):
            if not hasattr(value, name):
                raise UserError(f"data: {type(value).__name__} has no {name}, which the networks are built for: set it")
    tree = _named_data(value) if isinstance(value, str | Path) else writer.write(value, "data")
    if batch_size is None:
        return tree
    if "data" in writer.objects:
        raise UserError("batch_size: the data module was given as an object: set its own batch size")
    return {**tree, "init_args": {**tree.get("init_args", {}), "batch_size": batch_size}}


def _named_data(value: str | Path) -> dict[str, Any]:
    """Return the configuration of a folder of images, or of a data module's name."""
    folder = Path(value)
    if folder.is_dir():
        training = folder / "train" if (folder / "train").is_dir() else folder
        loose = any(is_image(file) for file in training.iterdir())
        arguments: dict[str, Any] = {"root": str(value)}
        if loose or not class_folders(training):
            arguments["labels"] = "none"
        if not (folder / "val").is_dir():
            arguments["val_fraction"] = 0.1
        return {"class_path": "ImageFolder", "init_args": arguments}
    classes = {name: getattr(data_modules, name) for name in data_modules.__all__}
    known = [name for name, item in classes.items() if isinstance(item, type) and issubclass(item, ImageData)]
    if value not in known:
        raise UserError(f"data: there is no folder {str(value)!r}, nor a data set: {did_you_mean(str(value), known)}")
    return {"class_path": str(value)}


def _term(value: Any, key: str, writer: Writer) -> Any:
    """Return the configuration of a term."""
    if isinstance(value, Term | Mapping) and "class_path" not in (value if isinstance(value, Mapping) else ()):
        return writer.write(value, key)
    return {"head": writer.write(value, f"{key}.head")}


def _optimization(lr: float | None, optimizer: Any, scheduler: Any, writer: Writer) -> dict[str, Any]:
    """Return the configuration of optimizer and learning rate."""
    if optimizer is not None and lr is not None:
        raise UserError("lr: it is the learning rate of the default optimizer, but an optimizer is given: set its own")
    settings: dict[str, Any] = {} if optimizer is not None else {"weight_decay_on": "matrices"}
    arguments = {"lr": 1e-3 if lr is None else lr, "weight_decay": 0.05}
    default = {"class_path": "torch.optim.AdamW", "init_args": arguments}
    falling = Warmup(epochs=1, value=Cosine(1.0, 0.0))  # the same for runs of any length, which may be extended
    return {
        "optimizer": writer.write(default if optimizer is None else optimizer, "model.optimizer"),
        "scheduler": writer.write(falling if scheduler is None else scheduler, "model.scheduler"),
        **settings,
    }


def _as_arguments(options: Tree, writer: Writer) -> list[str]:
    """Return further keys as arguments of the command line."""
    written = {key: writer.write(value, key) for key, value in options.items()}
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in written.items()]
