"""The views in a batch: V views of each image, view after view.

With B images, row v B + i of every entry belongs to view v of image i. Nothing here reads a value from a device, unless
nobody has said how many views there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from distill.errors import UserError
from distill.features import Features

AnyFeatures = TypeVar("AnyFeatures", bound=Features)


def count_views(batch: Mapping[str, Any], known: int | None = None) -> int:
    """Return the number of views of each image in a batch, 1 without an entry `view`.

    Args:
        batch: a batch.
        known: the number of views of the run, which spares a batch on a device from being waited for.
    """
    view: Tensor | None = batch.get("view")
    if view is None or len(view) == 0:
        return 1
    return int(view[-1]) + 1 if known is None or view.device.type == "cpu" else known


def rows_of_views(features: AnyFeatures, chosen: Sequence[int], views: int) -> AnyFeatures:
    """Return the features of the chosen views, one after the other.

    Args:
        features: of all V B rows.
        chosen: numbers of the views.
        views: V.
    """
    if list(chosen) == list(range(views)):
        return features
    return features.apply(lambda tensor: _rows(tensor, chosen, views))


def batch_of_views(batch: Mapping[str, Any], chosen: Sequence[int], views: int) -> dict[str, Any]:
    """Return a batch of the chosen views; several are numbered anew from 0, of a single one there is no `view`.

    Args:
        batch: a batch, whose entries of V B rows are chosen from, also those inside of mappings.
        chosen: numbers of the views.
        views: V.
    """
    if list(chosen) == list(range(views)):
        return dict(batch)
    rows = len(batch["view"])
    found = {key: _chosen(value, chosen, views, rows) for key, value in batch.items() if key != "view"}
    if len(chosen) > 1:
        numbers = torch.arange(len(chosen), device=batch["view"].device)
        found["view"] = numbers.repeat_interleave(rows // views, output_size=len(chosen) * (rows // views))
    return found


def require_views_of(batch: Mapping[str, Any], views: int) -> None:
    """Require each image once in each view, view after view, as far as no device has to be waited for.

    Raises:
        UserError: the rows cannot be those of so many views.
    """
    view: Tensor = batch["view"]
    images, rest = divmod(len(batch["image"]), views)
    ordered = torch.arange(views).repeat_interleave(images)
    if rest or (view.device.type == "cpu" and not torch.equal(view, ordered)):
        raise UserError(
            f"data: a batch has {len(batch['image'])} images in {views} views, which are not {images} images in the "
            "first view, then as many in the next: give each image once in every view, view after view"
        )


def _chosen(value: Any, chosen: Sequence[int], views: int, rows: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _chosen(inner, chosen, views, rows) for key, inner in value.items()}
    is_by_row = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
    return _rows(value, chosen, views) if is_by_row else value


def _rows(tensor: Tensor, chosen: Sequence[int], views: int) -> Tensor:
    size = len(tensor) // views
    parts = [tensor[view * size : (view + 1) * size] for view in chosen]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
