"""Tensors that a quantity's rows were computed with, such as a frozen projection."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from distill.errors import UserError
from distill.store.quantities import require_safe_name
from distill.store.writing import write_file

STATE = "state"
"""Name of the folder of these tensors in a store."""


def write_state(folder: str | Path, quantity_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of a quantity, atomically: `<folder>/state/<quantity_name>.safetensors`.

    Raises:
        UserError: the file cannot be written; nothing is left of it, and an old one stays.
    """
    # Tensors may share memory, which the format has no words for.
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_file(_path(folder, quantity_name), save(content))


def read_state(folder: str | Path, quantity_name: str) -> dict[str, Tensor]:
    """Read the tensors that `write_state` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = _path(folder, quantity_name)
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        reason = "is missing"
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
    except SafetensorError:
        reason = "is cut short or damaged"
    raise UserError(f"store {str(folder)!r}: '{STATE}/{path.name}' {reason}; `distill store` writes it anew")


def _path(folder: str | Path, quantity_name: str) -> Path:
    require_safe_name("a quantity's name", quantity_name)
    return Path(folder).expanduser() / STATE / f"{quantity_name}.safetensors"
