"""Facts that the configurations of transformers' models state, or leave out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.errors import UserError

HUB_OPTIONS = "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"
"""Arguments of every `from_pretrained` that say which files are read."""

PROCESSOR_FILES = "preprocessor_config.json", "processor_config.json"
"""Files with the settings of an image processor."""


def import_transformers() -> Any:
    """Import transformers.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"HuggingFace needs the package transformers ({error}): install the extra 'transformers'"
        ) from error
    return transformers


def processor_settings(name: str, **arguments: Any) -> dict[str, Any]:
    """Return the settings of a model's image processor."""
    from transformers.image_processing_base import ImageProcessingMixin

    settings: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(name, **arguments)[0]
    return settings


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


def require_folder(name: str) -> None:
    """Require a name that looks like a path to be a folder with a configuration.

    Raises:
        UserError: it is not.
    """
    path = Path(name)
    if (path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2) and not path.is_dir():
        raise UserError(f"name: there is no folder {name!r}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"name: the folder {name!r} holds no config.json, as save_pretrained writes it")


def saved_class(config: Any) -> str:
    """Return the class that loads a model as it was saved."""
    saved = getattr(config, "architectures", None) or []
    return "AutoModelForImageClassification" if any("ImageClassification" in name for name in saved) else "AutoModel"


def patch_stride(config: Any) -> tuple[int, int] | None:
    """Return the pixels from one patch to the next, where a configuration has one number for them or two."""
    stride: Any = getattr(config, "patch_stride", None) or getattr(config, "patch_size", None)
    if isinstance(stride, int):
        return stride, stride
    if isinstance(stride, tuple | list) and len(stride) == 2 and all(isinstance(side, int) for side in stride):
        return stride[0], stride[1]
    return None


def check_size(name: str, config: Any, shape: tuple[int, int, int]) -> None:
    """Require images of whole patches, as models cut off what is left over.

    Raises:
        UserError: the patches do not divide the images.
    """
    patch = patch_stride(config)
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


def find_grid(config: Any, output: Any, hidden: Tensor, shape: tuple[int, int, int]) -> tuple[int, int] | None:
    """Return the grid of the last hidden state's tokens, from a hidden state that is a map or from the patches."""
    states = [*(getattr(output, "hidden_states", None) or ()), *(getattr(output, "reshaped_hidden_states", None) or ())]
    for state in reversed(states):
        if isinstance(state, Tensor) and state.ndim == 4:  # channels first, in Hiera last
            sides = state.shape[2:] if state.shape[1] == hidden.shape[2] else state.shape[1:3]
            if sides[0] * sides[1] <= hidden.shape[1] <= 2 * sides[0] * sides[1]:
                return sides[0], sides[1]
    patch = patch_stride(config)
    return None if patch is None else (shape[1] // patch[0], shape[2] // patch[1])


def count_prefix_tokens(config: Any, tokens: int, grid: tuple[int, int] | None) -> int:
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


def classifiers_of(model: nn.Module, count: int) -> list[str]:
    """Return the linear layers outside the base model that give a number per class: one, or two that are averaged."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    if base is None or base is model:
        return []
    inside = set(base.modules())
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer not in inside and layer.out_features == count
    ]


def first_line(error: Exception) -> str:
    """Return the beginning of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
