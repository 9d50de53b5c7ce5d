"""Facts that transformers' configurations and image processors tell: sizes, patches and grids."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from distill.errors import UserError

AutoClass = Literal["AutoModel", "AutoModelForImageClassification", "AutoBackbone"]


def processor_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the height and width that an image processor makes; `None` if it does not say."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = size or settings.get("size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            return size["height"], size["width"]
        if "shortest_edge" in size:
            return size["shortest_edge"], size["shortest_edge"]
    return None


def saved_class(config: Any) -> AutoClass:
    """Return the class that a model was saved as, classification or not."""
    saved = getattr(config, "architectures", None) or []
    return "AutoModelForImageClassification" if any("ImageClassification" in name for name in saved) else "AutoModel"


def _patch(config: Any) -> tuple[int, int] | None:
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return None
    return (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])


def check_size(name: str, config: Any, shape: tuple[int, int, int]) -> None:
    """Check that the patches divide the images `(C, H, W)`.

    Raises:
        UserError: they do not.
    """
    patch = _patch(config)
    if patch is not None and (shape[1] % patch[0] or shape[2] % patch[1]):
        raise UserError(
            f"image_size: {name!r} has patches of {patch[0]} x {patch[1]} pixels, which do not divide "
            f"{shape[1]} x {shape[2]}: give a multiple of them"
        )


def size_arguments(model: nn.Module, config: Any, shape: tuple[int, int, int]) -> dict[str, bool]:
    """Return the argument for images of another size than the position embeddings were made for, if there is one."""
    takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    size = getattr(config, "image_size", None)
    expected = (size, size) if isinstance(size, int) else None if size is None else tuple(size)
    return {"interpolate_pos_encoding": True} if takes and expected != shape[1:] else {}


def token_grid(config: Any, output: Any, shape: tuple[int, int, int]) -> tuple[int, int] | None:
    """Return the grid of the last hidden state's tokens, from a hidden state that is a map or from the patches."""
    states = [*(getattr(output, "reshaped_hidden_states", None) or ()), *(getattr(output, "hidden_states", None) or ())]
    if maps := [state for state in states if isinstance(state, Tensor) and state.ndim == 4]:
        last = maps[-1] if not getattr(output, "reshaped_hidden_states", None) else output.reshaped_hidden_states[-1]
        return last.shape[2], last.shape[3]
    patch = _patch(config)
    return None if patch is None else (shape[1] // patch[0], shape[2] // patch[1])


def prefix_tokens(config: Any, tokens: int, grid: tuple[int, int] | None) -> int:
    """Return the number of class, distillation and register tokens before those of the grid."""
    if grid is None:
        return 0
    count = tokens - grid[0] * grid[1]
    if count not in (0, 1, 2, 1 + getattr(config, "num_register_tokens", 0)):
        raise UserError(
            f"name: the {tokens} tokens of a {config.model_type!r} are not its {grid[0]} x {grid[1]} patches and a few "
            "more; wrap the model in TorchModule"
        )
    return count
