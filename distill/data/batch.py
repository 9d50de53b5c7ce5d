"""The batch: a dict of image, label, index and more, made of whatever a loader yields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError

Names = Mapping[str, str | int]
"""Key of the batch -> key (of a mapping) or place (in a tuple) under which a loader yields it."""

_PLACES = ("image", "label", "index")
_ALIASES = {"image": ("pixel_values",), "label": ("labels",)}  # Hugging Face's

_UINT8_REMEDY = (
    "scale them to floats in [0, 1], as torchvision's v2.ToDtype(torch.float32, scale=True) or ToTensor() does"
)


def as_batch(raw: Any, names: Names | None = None) -> dict[str, Any]:
    """Turn what a loader yields into a batch: `image`, and where there are any, `label`, `index` and further entries.

    Known are mappings with `image` and `label` or Hugging Face's `pixel_values` and `labels`, dataclasses and named
    tuples with such fields, `(image,)`, `(image, label)`, `(image, label, index)`, and an image alone. What is missing
    stays missing: nothing is made up. Tensors stay on their device, and no value is read.

    >>> sorted(as_batch((torch.rand(4, 3, 8, 8), torch.arange(4))))
    ['image', 'label']
    >>> as_batch({"x": torch.rand(4, 3, 8, 8), "y": torch.arange(4)}, {"image": "x", "label": "y"})["label"]
    tensor([0, 1, 2, 3])

    Args:
        raw: what the loader yields.
        names: the key or the place of entries that have another one, such as `{"image": "x"}` or `{"image": 1}`. Of a
            tuple, only the named places are taken.

    Returns:
        `image` float `[B, C, H, W]`; `label` int64 `[B]` or soft, float `[B, K]`; `index` int64 `[B]`; further entries
        of a mapping as they are.

    Raises:
        UserError: nothing in it is a batch of images, there are two of them, or an entry has another type or shape.
    """
    batch = _entries(raw, dict(names or {}))
    if "image" not in batch:
        raise UserError(
            f"data: no images in {described(raw)}: name their key or place in model.batch, such as {{image: pixels}}"
        )
    image = batch["image"]
    _require_images(image, raw)
    batch = {key: value for key, value in batch.items() if value is not None or key not in _PLACES}
    if "label" in batch:
        batch["label"] = _label(batch["label"], image)
    if "index" in batch:
        batch["index"] = _index(batch["index"], image)
    if batch.get("view") is not None:
        batch["view"] = _tensor("view", batch["view"], image).long()
    return batch


def described(raw: Any) -> str:
    """Describe what a loader yielded in a few words, with shapes and types."""
    if isinstance(raw, Tensor):
        return f"a tensor {_type(raw)} {list(raw.shape)}"
    if isinstance(raw, Mapping):
        return f"a {type(raw).__name__} of {_listed([f'{key}: {_short(value)}' for key, value in raw.items()])}"
    if isinstance(raw, tuple | list):
        return f"a {type(raw).__name__} of {_listed([_short(value) for value in raw])}"
    return f"a {type(raw).__name__}"


def _entries(raw: Any, names: dict[str, str | int]) -> dict[str, Any]:
    """Return the entries of a batch under their own names, unchecked."""
    if is_dataclass(raw) and not isinstance(raw, type):
        raw = {field.name: getattr(raw, field.name) for field in fields(raw)}
    elif isinstance(raw, tuple) and hasattr(raw, "_asdict") and not any(map(_is_number, names.values())):
        named = raw._asdict()
        if names or "image" in named or _ALIASES["image"][0] in named:
            raw = named
    if isinstance(raw, Mapping):
        return _renamed(raw, names)
    if isinstance(raw, Tensor) and raw.ndim == 4:
        raw = (raw,)
    if not isinstance(raw, tuple | list):
        return {}
    if names:
        return {key: _entry(raw, key, position) for key, position in names.items()}
    images = [_is_images(value) for value in raw]
    if sum(images) > 1 or any(isinstance(value, tuple | list) and sum(map(_is_images, value)) > 1 for value in raw):
        raise UserError(
            f"data: more than one batch of images in {described(raw)}: give several views of the images in one image, "
            "view after view, with their numbers as view, or name one of several inputs in model.batch, such as "
            "{image: 0, label: 2}"
        )
    if not images or not images[0] or len(raw) > len(_PLACES):
        if any(images):
            raise UserError(
                f"data: {described(raw)} is neither (image), (image, label) nor (image, label, index): name the places "
                f"in model.batch, such as {{image: {images.index(True)}}}"
            )
        return {}
    return dict(zip(_PLACES, raw, strict=False))


def _renamed(raw: Mapping[Any, Any], names: dict[str, str | int]) -> dict[str, Any]:
    batch = dict(raw)
    for key, given in names.items():
        if given not in raw:
            raise UserError(f"model.batch: {key} is to be {given!r}, but the data yield {described(raw)}")
    taken = {key: batch.pop(given, None) for key, given in names.items() if given in raw}
    for key, aliases in _ALIASES.items():
        for alias in aliases:
            if key not in taken and key not in batch and alias in batch:
                taken[key] = batch.pop(alias)
    return batch | taken


def _entry(raw: Sequence[Any], key: str, position: str | int) -> Any:
    if not isinstance(position, int) or not -len(raw) <= position < len(raw):
        raise UserError(
            f"model.batch: {key} is to be {position!r}, but the data yield {described(raw)}: give a place from 0 to "
            f"{len(raw) - 1}"
        )
    return raw[position]


def _require_images(image: Any, raw: Any) -> None:
    if isinstance(image, tuple | list) and any(map(_is_images, image)):
        raise UserError(
            f"data: image is {described(image)}: give one batch of images, several views view after view with their "
            "numbers as view"
        )
    if not isinstance(image, Tensor) or image.ndim != 4:
        shown = described(image)
        inside = "" if image is raw else f" in {described(raw)}"
        raise UserError(f"data: image must be a tensor [B, C, H, W], given {shown}{inside}")
    if not image.is_floating_point():
        given = f"{_type(image)} {list(image.shape)}"
        raise UserError(f"data: image must be float in [0, 1], given {given}: {_UINT8_REMEDY}")


def _label(given: Any, image: Tensor) -> Tensor:
    """Return classes int64 `[B]` or soft labels `[B, K]`."""
    label = _tensor("label", given, image)
    if label.ndim == 2 and label.shape[1] == 1 and not label.is_floating_point():
        label = label[:, 0]
    if label.ndim == 1 and not label.is_floating_point():
        return label.long()
    if label.ndim == 2 and label.is_floating_point():
        return label
    raise UserError(
        f"data: label must be classes, integers [B], or soft labels, floats [B, K], given {_type(label)} "
        f"{list(label.shape)}"
    )


def _index(given: Any, image: Tensor) -> Tensor:
    index = _tensor("index", given, image)
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise UserError(
            f"data: index must be each image's place in the data set, integers [B], given {_type(index)} "
            f"{list(index.shape)}: name in model.batch what is to be taken, such as {{image: 0, label: 1}}"
        )
    return index.long()


def _tensor(key: str, value: Any, image: Tensor) -> Tensor:
    """Return numbers of a tensor, an array or a list, one entry per image, on the images' device."""
    try:
        tensor = torch.as_tensor(value, device=image.device)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"data: {key} must be numbers, one for each image, given {described(value)}: name in model.batch what is "
            "to be taken, such as {image: 0, label: 1}"
        ) from None
    if tensor.ndim == 0 or len(tensor) != len(image):
        raise UserError(
            f"data: {key} has the shape {list(tensor.shape)}, but image {list(image.shape)}: give one for each image"
        )
    return tensor


def _is_number(value: object) -> bool:
    return isinstance(value, int)


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_type(value)} {list(value.shape)}"
    if isinstance(value, tuple | list | Mapping):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def _listed(parts: list[str], most: int = 5) -> str:
    return ", ".join(parts[:most]) + (f" and {len(parts) - most} more" if len(parts) > most else "") or "nothing"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
