"""The `distill store` command: a teacher's answers to all draws of all images, on the disk."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table

from distill.data import ImageData, Split
from distill.errors import UserError, did_you_mean, under
from distill.given import Writer
from distill.networks import FrozenTeacher, Teacher
from distill.objective import key_of, teacher_key
from distill.runs.lock import FolderIsLockedError, FolderLock
from distill.store import StoredTeacher, room
from distill.store.requests import FEATURES
from distill.training.distillation import DistillationModule
from distill.training.store_plan import StorePlan, plan_store, write_states
from distill.training.stored import require_fixed_draws, restore_states
from distill.training.storing import write_missing

SPLITS: tuple[Split, ...] = ("train", "val")
"""Splits that are stored by default: those that a training reads."""


def run_store(args: list[str]) -> None:
    """Run `distill store`; the splits may be words: `--splits train val test`."""
    from distill.cli.program import run

    joined: list[str] = []
    words: list[str] | None = None
    for arg in [*args, "-"]:
        if words is not None and not arg.startswith("-"):
            words.append(arg)
            continue
        if words is not None:
            joined.append(f"--splits=[{','.join(words)}]")
        words = [] if arg == "--splits" else None
        if words is None:
            joined.append(arg)
    run(joined[:-1])


def store(
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule | None,
    output: str,
    splits: Sequence[Split],
    shard: str,
    teacher: str | None,
    force: bool,
) -> None:
    """Run a teacher over all draws of all images, and write what the terms of the loss compare with.

    Raises:
        UserError: an argument out of its range, images or terms that cannot be stored, a store of something else in
            the folder, or no room for it.
    """
    assert isinstance(module, DistillationModule)
    part, parts = _part(shard)
    if trainer.world_size > 1:
        raise UserError(
            f"trainer.devices: a store is written by single processes, not by {trainer.world_size} ranks: give "
            "devices 1, and start several processes with --shard 1/N to N/N"
        )
    with under("data"):
        require_fixed_draws(data)
    assert isinstance(data, ImageData)
    name = _name_of(teacher, module.teachers)
    data.prepare_data()
    data.setup("fit")
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
    kept = [each for each in callbacks if isinstance(each, ProgressBar) or hasattr(each, "adds_to_batch")]
    trainer.callbacks = kept  # type: ignore[attr-defined]
    folder = Path(output).expanduser()
    console = Console()
    with _Claimed(folder, part, parts):
        objective = module.distiller.objective
        restore_states(objective, objective.requests(name), folder)
        plan = plan_store(trainer, module, data, name, splits, folder, _recipe(module.teachers[name]))
        console.print(_table(plan))
        _refuse(plan, module, force)
        plan.index.write(folder)
        write_states(module, name, plan.requests, folder)
        share = plan.share(part, parts)
        for lacking in share.lacking:
            write_missing(trainer, module, data, name, plan.requests, lacking, plan.index, folder)
        for line in (f"{folder}: {_size(share.bytes)} written", _use(name, folder)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Claimed:
    """Context that holds the lock of the folder, or with several processes that of this one's part.

    A folder that was made for it and stays empty is removed.

    Raises:
        UserError: another process writes there, or nothing can be written.
    """

    def __init__(self, folder: Path, part: int, parts: int) -> None:
        self.folder = folder
        self.locked = folder if parts == 1 else folder / "processes" / f"{part + 1}-of-{parts}"

    def __enter__(self) -> None:
        try:
            self.locked.mkdir(parents=True, exist_ok=True)
            self.lock = FolderLock(self.locked)
        except FolderIsLockedError as error:
            raise UserError(f"output: {str(self.folder)!r} is being written by {error}: wait for its end") from None
        except OSError as error:
            raise UserError(f"output: {str(self.folder)!r} cannot be written ({error.strerror})") from None

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        with suppress(OSError):  # it has content
            for folder in (self.locked, *self.locked.parents):
                folder.rmdir()
                if folder == self.folder:
                    break


def _part(shard: str) -> tuple[int, int]:
    """Return the number of this process, from 0, and the number of processes."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"shard must be the number of this process of all, such as 1/4 to 4/4, given {shard!r}")
    return int(match[1]) - 1, int(match[2])


def _name_of(given: str | None, teachers: Mapping[str, Teacher]) -> str:
    if not teachers:
        raise UserError("model.teacher is not given: there is nothing to store")
    if given is None and len(teachers) > 1:
        raise UserError(f"teacher: there are several teachers, {', '.join(teachers)}: name the one to store")
    if given is not None and given not in teachers:
        raise UserError(f"teacher: there is no teacher {given!r}: {did_you_mean(given, teachers)}")
    name = given or next(iter(teachers))
    if isinstance(teachers[name], StoredTeacher):
        raise UserError(f"{teacher_key(name)}: this teacher is read from a store: give the network itself")
    return name


def _recipe(teacher: Teacher) -> Any:
    """Return the configuration of a teacher's network, if one can say it."""
    if not isinstance(teacher, FrozenTeacher):
        return None
    writer = Writer()
    try:
        configuration = writer.write(teacher.network, "teacher")
    except UserError:
        return None
    return None if writer.objects else configuration


def _refuse(plan: StorePlan, module: DistillationModule, force: bool) -> None:
    """Refuse whole feature maps unless forced, and a store for which there is no room."""
    for term, request in plan.requests.items():
        maps = [plan.index.quantities[request.name(name)] for name in request.features if name not in FEATURES]
        if maps and not force:
            row = sum(quantity.bytes for quantity in maps)
            total = row * sum(len(plan.index.splits[split]) for split in plan.quantities)
            raise UserError(
                f"{key_of(term)}.head: {type(module.terms[term].head).__name__} compares whole feature maps, which "
                f"take {_size(row)} per image and draw, {_size(total)} in all: leave the term out, or give --force"
            )
    if plan.bytes > (free := room(plan.folder)):
        raise UserError(
            f"output: the store needs {_size(plan.bytes)} more, but the disk of {str(plan.folder)!r} has {_size(free)}"
        )


def _table(plan: StorePlan) -> Table:
    table = Table(box=SIMPLE_HEAVY, pad_edge=False)
    for column in ("split", "quantity", "read by"):
        table.add_column(column, overflow="fold")
    for column in ("per row", "rows", "in all", "to write"):
        table.add_column(column, justify="right")
    for lacking in plan.lacking:
        for quantity in plan.quantities[lacking.split]:
            to_write = sum(
                len(lacking.rows.of(number)) * quantity.bytes
                for number, quantities in lacking.shards.items()
                if quantity in quantities
            )
            table.add_row(
                lacking.split,
                quantity.name,
                ", ".join(plan.readers(quantity)) or "metrics",
                _size(quantity.bytes),
                f"{len(lacking.rows):,}",
                _size(quantity.bytes * len(lacking.rows)),
                _size(to_write) if to_write else "nothing",
            )
    return table


def _size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _use(name: str, folder: Path) -> str:
    key = teacher_key(name)
    return f"train with it: distill fit --config ... --{key}=StoredTeacher --{key}.path={folder}"
