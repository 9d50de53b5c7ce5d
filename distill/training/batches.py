"""The batches of any data: what they hold, known before step 0, and how their images are counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # as its users import it
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from distill.data import ImageData, Names, as_batch
from distill.errors import UserError
from distill.heads import Batch, Head, RunInfo
from distill.randomness import get_states, set_states

KEYS = frozenset({"image", "label", "index", "draw", "view", "segments"})
"""Keys of a batch that a head may need."""
_TOLERANCE = 0.5  # by which resizing and color changes may leave [0, 1]


def provided_keys(trainer: Trainer, module: LightningModule, loader: Any) -> frozenset[str]:
    """Return the keys that the training batches will have, with those that callbacks add.

    The batches of an `ImageData` are known. Of other data, two samples are collated; where that is not possible, as of
    a stream, all keys count as provided, and the first batch decides.

    Args:
        trainer: the trainer.
        module: the module, whose `batch_names` are those of the entries.
        loader: the training loader.

    Raises:
        UserError: the samples are no batch of images that fit the module.
    """
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
    added = {str(callback.adds_to_batch) for callback in callbacks if hasattr(callback, "adds_to_batch")}
    data: Any = trainer.datamodule  # type: ignore[attr-defined]  # and this
    if isinstance(data, ImageData):
        given = {"image", "index", "draw"} | ({"label"} if data.num_classes else set())
        given |= {"view"} if len(data.train_views) > 1 else set()
        return frozenset(given | added)
    batch = sample_batch(loader, module, data)
    if batch is None:
        return RunInfo().provides | {"draw", *added}
    require_fitting_images(batch["image"], getattr(module, "image_shape", None))
    warn_of_range(batch["image"])
    return frozenset((batch.keys() & KEYS) | added)


def sample_batch(loader: Any, module: LightningModule, data: Any = None) -> Batch | None:
    """Return a batch of two samples of a map-style data set, after the transfer hooks; `None` if there is none.

    Neither the loader's position nor any random state changes: the samples are read by a loader of their own, in a
    worker process if the loader has workers.

    Args:
        loader: of the data set.
        module: the module that the batches are for.
        data: the data module, whose transfer hooks come before the module's.

    Raises:
        UserError: the samples are no batch of images.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or dataset is None or isinstance(dataset, IterableDataset):
        return None
    states = get_states()
    try:
        raw = _collated(loader, dataset)
        for name, arguments in (
            ("on_before_batch_transfer", (0,)),
            ("transfer_batch_to_device", (module.device, 0)),
            ("on_after_batch_transfer", (0,)),
        ):
            owner = data if data is not None and is_overridden(name, data) else module
            raw = getattr(owner, name)(raw, *arguments)
    except UserError:
        raise
    except Exception:  # whatever it is, the first batch of the training shows it
        return None
    finally:
        set_states(states)
    return as_batch(raw, getattr(module, "batch_names", None))


def require_fitting_images(image: Tensor, shape: tuple[int, int, int] | None) -> None:
    """Require images of the shape that the networks were built for.

    Raises:
        UserError: they have another one.
    """
    if shape is None or tuple(image.shape[1:]) == tuple(shape):
        return
    given, wanted = (" x ".join(map(str, sizes)) for sizes in (image.shape[1:], shape))
    remedy = "give channels first" if tuple(image.shape[1:]) == (*shape[1:], shape[0]) else "give the images' shape"
    raise UserError(f"model.image_shape is {wanted}, but the data yield images of {given}: {remedy}")


def warn_of_range(image: Tensor) -> None:
    """Warn of images whose values are far outside [0, 1]."""
    low, high = (float(value) for value in image.aminmax())
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        rank_zero_warn(
            f"the data yield images from {low:.3g} to {high:.3g}, but the networks normalize images in [0, 1] by "
            "themselves: leave that to them, or give every network mean 0 and std 1"
        )


def counted_images(batch: Mapping[str, Any]) -> Tensor:
    """Return a mask `[B]` of the images that count: those that only pad a batch have index -1; without one, all."""
    index: Tensor | None = batch.get("index")
    if index is None:
        return torch.ones(len(batch["image"]), dtype=torch.bool, device=batch["image"].device)
    return index >= 0


def dummy_batch(image: Tensor, head: Head, num_classes: int) -> Batch:
    """Return a batch of given images with all that a head may read."""
    count = len(image)
    position = torch.arange(count)
    batch: Batch = {
        "image": image,
        "label": position % max(num_classes, 1),
        "index": position,
        "draw": torch.zeros_like(position),
    }
    height, width = image.shape[-2:]
    if "segments" in head.batch_needs:
        rows, columns = torch.arange(height) * 2 // height, torch.arange(width) * 2 // width
        batch["segments"] = (2 * rows[:, None] + columns).expand(count, height, width).contiguous()
    if "view" in head.batch_needs:
        batch["view"] = position * 2 // count
    return batch


def converted(batch: Any, names: Names | None, trainer: Trainer | None) -> Any:
    """Return the batch dict of what a loader yields while a trainer runs; other inputs stay as they are."""
    return batch if batch is None or trainer is None or trainer.state.stage is None else as_batch(batch, names)


def _collated(loader: DataLoader[Any], dataset: Any) -> Any:
    positions = list(range(min(2, len(dataset))))
    workers = loader.num_workers > 0
    settings: dict[str, Any] = {"worker_init_fn": loader.worker_init_fn} if workers else {}
    if workers:
        settings["multiprocessing_context"] = loader.multiprocessing_context
    batched = loader.batch_size is not None or loader.batch_sampler is not None
    return next(
        iter(
            DataLoader(
                dataset,
                batch_size=len(positions) if batched else None,
                sampler=positions,
                num_workers=int(workers),
                collate_fn=loader.collate_fn,
                generator=torch.Generator().manual_seed(0),
                **settings,
            )
        )
    )
