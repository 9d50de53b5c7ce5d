"""Programs written by `torch.export`, run without their source code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError


def load_program(path: str | Path, shape: tuple[int, int, int]) -> tuple[nn.Module, int, torch.dtype]:
    """Load a program that `torch.export.save` has written; its layers keep their names.

    Args:
        path: the file.
        shape: `(C, H, W)` of the images that it will get.

    Returns:
        The program, and the number of channels and the dtype of its images.

    Raises:
        UserError: the file is missing or no program, or what it bakes in does not fit: its inputs, the number of images
            in a batch, or their size.
    """
    path = Path(path).expanduser()
    where = f"program {str(path)!r}"
    if not path.is_file():
        raise UserError(f"{where} is a folder" if path.is_dir() else f"{where} does not exist")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(file)
            model = torch.export.unflatten(program)
    except Exception as error:  # each part of the archive fails in its own way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{where} cannot be loaded ({reason}): write it with torch.export.save") from error
    names = set(program.graph_signature.user_inputs)
    inputs = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].ndim != 4:
        raise UserError(f"{where} takes {len(inputs)} inputs, not a single batch of images [B, C, H, W]")
    image = inputs[0]
    sides: list[Any] = list(image.shape)  # a free axis is symbolic
    batch, channels, *size = (side if isinstance(side, int) else None for side in sides)
    if batch is not None:
        raise UserError(
            f"{where} takes batches of {batch} images only, as torch.export baked in: export it with dynamic_shapes "
            'that leave the first axis free, such as {0: torch.export.Dim("batch")}'
        )
    if any(side not in (None, given) for side, given in zip(size, shape[1:], strict=True)):
        baked = " x ".join("any" if side is None else str(side) for side in size)
        option = size[0] if size[0] == size[1] else size
        raise UserError(
            f"{where} takes images of {baked} only, as torch.export baked in, given {shape[1]} x {shape[2]}: set "
            f"image_size: {option}"
        )
    return model, shape[0] if channels is None else channels, image.dtype


def lookup(value: Any, path: str | int, name: str) -> Any:
    """Return a part of what a module returns: a key, a number or an attribute, or several joined by dots.

    Raises:
        UserError: there is no such part; the message lists those that there are.
    """
    for part in str(path).split("."):
        try:
            if isinstance(value, dict):
                value = value[part] if part in value else value[int(part)]
            elif isinstance(value, tuple | list) and part.lstrip("-").isdigit():
                value = value[int(part)]
            else:
                value = getattr(value, part)
        except (KeyError, IndexError, ValueError, AttributeError):
            raise UserError(f"output: {name} returns no {path!r}, but {describe(value)}") from None
    return value


def describe(value: Any) -> str:
    """Return what a module returns, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"{type(value).__name__} with {', '.join(map(repr, value))}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} with 0 to {len(value) - 1}" if value else f"an empty {type(value).__name__}"
    parts = (
        [name for name, part in vars(value).items() if isinstance(part, Tensor)] if hasattr(value, "__dict__") else []
    )
    return f"{type(value).__name__} with {', '.join(map(repr, parts))}" if parts else type(value).__name__
