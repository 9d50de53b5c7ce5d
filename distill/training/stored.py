"""Stored teachers in a run: their rows in its batches, and the proof that these are the teacher's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # as its users import it
from torch import Tensor

import distill
from distill.data import ImageData
from distill.data.dataset import Split, run_seed
from distill.data.identity import settings_identity, split_identity
from distill.distiller import Distiller
from distill.errors import UserError, under
from distill.objective import Objective, teacher_key
from distill.store import STORED, Difference, Request, StoredRows, StoredTeacher, differences, read_state
from distill.superpixels.pixels import backend_on


def stored_teachers(distiller: Distiller) -> dict[str, StoredTeacher]:
    """Return the teachers that are read from a store, by name."""
    teachers: Any = distiller.teachers
    return {name: teacher for name, teacher in teachers.items() if isinstance(teacher, StoredTeacher)}


def attach(
    distiller: Distiller,
    data: Any,
    splits: Sequence[Split] = ("train", "val"),
    segments: Mapping[str, Any] | None = None,
) -> None:
    """Let the batches of a data module bring the rows of all stored teachers, after comparing all that they depend on.

    In a training by Lightning this happens by itself; in a loop of your own, call it before making the loaders.

    Args:
        distiller: with the teachers.
        data: the data module.
        splits: of the images that will be loaded.
        segments: the settings of the segments that will be added to the batches.

    Raises:
        UserError: the images are not those that a teacher saw, its rows are not whole, or the data module is not one
            of this package.
    """
    for split in splits:
        if isinstance(data, ImageData):
            data.stored.pop(split, None)
    for name, teacher in stored_teachers(distiller).items():
        with under(teacher_key(name)):
            require_same_images(teacher, data, splits, segments)
    for split in splits:
        teachers = stored_teachers(distiller)
        found = {name: teacher.rows(split) for name, teacher in teachers.items() if teacher.quantities(split)}
        for name, stored in found.items():
            with under(teacher_key(name)):
                stored.check()
        if found:
            data.stored[split] = partial(_rows_of, found)
    for teacher in stored_teachers(distiller).values():
        restore_states(distiller.objective, teacher.requests, Path(teacher.path).expanduser(), required=True)


def dummy_rows(distiller: Distiller, count: int, device: torch.device | None = None) -> dict[str, Any]:
    """Return the entry of a batch that random rows of all stored teachers make; none without such teachers."""
    rows = {
        name: {quantity: tensor.to(device) for quantity, tensor in teacher.dummy_rows(count).items()}
        for name, teacher in stored_teachers(distiller).items()
    }
    return {STORED: rows} if rows else {}


def restore_states(objective: Objective, requests: Mapping[str, Request], folder: Path, required: bool = False) -> None:
    """Give the heads the frozen tensors with which their stored summaries were computed, where there are any.

    Args:
        objective: with the heads.
        requests: of the terms.
        folder: of the store.
        required: whether the store must have them; otherwise, those that it lacks are left as they are.

    Raises:
        UserError: they cannot be read, or do not fit.
    """
    for term, request in requests.items():
        if not (state := objective.terms[term].head.summary_state()):
            continue
        try:
            stored = read_state(folder, request.prefix)
        except UserError:
            if required:
                raise
            continue
        for name, tensor in stored.items():
            if name not in state or state[name].shape != tensor.shape:
                raise UserError(f"model.heads.{term}.head: the stored {name!r} does not fit; give another folder")
            with torch.no_grad():
                state[name].copy_(tensor)


def require_same_images(
    teacher: StoredTeacher, data: Any, splits: Sequence[Split], segments: Mapping[str, Any] | None = None
) -> None:
    """Require a run whose images are those that a stored teacher saw.

    Raises:
        UserError: they are not; every difference is named.
    """
    require_fixed_draws(data)
    stored = teacher.index
    given = run_identity(data)
    if teacher.any_batch_size:
        given["data"]["batch_size"] = stored.identity["data"]["batch_size"]
    known = {key: stored.identity[key] for key in given}
    found = [*differences(known, given)]
    for split in splits:
        if split in stored.splits and not found:
            found += differences({split: stored.images[split]}, {split: split_identity(data, split)})
    views = len(stored.identity["data"].get("train_views", data.train_views))
    if data.draws > (draws := stored.splits["train"].draws // views):
        found.append(Difference("data.draws", draws, data.draws))
    for quantity in teacher.quantities("train"):
        if "segments" in quantity.key:
            known, here = dict(quantity.key["segments"]), dict(segments or {})
            if known["backend"] == "auto":  # a store of before backends were named
                known["backend"] = here.get("backend")
            found += differences({"segments": known}, {"segments": here})
            break
    if found:
        remedies = {
            "data.batch_size": " (any_batch_size: true accepts that, and agrees to about 1e-5)",
            "data.draws": f" (`distill store` with data.draws {data.draws} adds the others)",
            "data.seed": " (data.seed gives the images a seed apart from the run's)",
        }
        remedy = remedies.get(found[0].key, "") if len(found) == 1 else ""
        raise UserError(f"the store {teacher.path!r} is of other images: {'; '.join(map(str, found))}{remedy}")
    warn_of_versions(teacher)


def require_fixed_draws(data: Any) -> None:
    """Require data whose images come in a fixed number of versions, each determined by a key.

    Raises:
        UserError: they do not.
    """
    if not isinstance(data, ImageData):
        raise UserError(
            "a stored teacher needs images that are augmented by a key: a data module of distill, not "
            f"{type(data).__name__}"
        )
    if data.has_own_hooks:
        raise UserError(
            f"a stored teacher sees no images that {type(data).__name__} changes in transfer hooks of its own, which "
            "a live one would see: change them in the transform of its samples"
        )
    if data.draws is None:
        raise UserError("data.draws is null, which makes new versions of the images in every epoch: give their number")
    if data.mixing is not None:
        raise UserError("data.mixing mixes images by batch, so that no stored row would be theirs: leave it out")


def run_identity(data: ImageData) -> dict[str, Any]:
    """Return what the images of a run depend on, as JSON values."""
    seed = run_seed() if data.seed is None else data.seed
    return {"data": {**settings_identity(data), "seed": seed, "batch_size": data.batch_size}}


def warn_of_versions(teacher: StoredTeacher) -> None:
    """Warn of other versions of packages, which may compute other last digits."""
    stored = teacher.index.identity.get("versions", {})
    if found := differences({"versions": stored}, {"versions": versions()}):
        rank_zero_warn(f"the store {teacher.path!r} was written by other versions: {'; '.join(map(str, found))}")


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute a teacher's answers."""
    import timm

    return {"distill": distill.__version__, "torch": str(torch.__version__), "timm": timm.__version__}


def segment_settings(trainer: Any) -> dict[str, Any] | None:
    """Return the settings of the callback that adds segments to the batches, if there is one.

    They name the backend that computes the segments here, since those of another are others.
    """
    for callback in trainer.callbacks:
        if getattr(callback, "adds_to_batch", None) == "segments":
            settings, (mean, std) = callback.settings, callback.normalization
            device = torch.device("cpu") if callback.in_workers else trainer.strategy.root_device
            backend = backend_on(device, settings["segments"], settings["backend"])
            return {**settings, "backend": backend, "mean": mean, "std": std}
    return None


def _rows_of(rows: Mapping[str, StoredRows], keys: Sequence[tuple[int, int]]) -> list[dict[str, dict[str, Tensor]]]:
    """Return the rows of samples, by teacher and quantity."""
    draws, indices = zip(*keys, strict=True)
    batches = {name: stored.batch(draws, indices) for name, stored in rows.items()}
    return [
        {name: {quantity: tensor[number] for quantity, tensor in batch.items()} for name, batch in batches.items()}
        for number in range(len(keys))
    ]
