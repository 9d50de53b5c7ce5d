"""Checkpoints for a module that is not, or not exactly, the one they were saved from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STUDENT = "distiller.student."
"""Prefix of the student's tensor names in a checkpoint."""


def student_and_what_fits(saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the student's saved tensors, and the others where they fit; those that do not stay as they are.

    Args:
        saved: tensors of a checkpoint.
        current: tensors of the module.
    """
    student = {name: tensor for name, tensor in saved.items() if name.startswith(STUDENT)}
    rest = {name: tensor for name, tensor in current.items() if not name.startswith(STUDENT)}
    same = {name: saved[name] for name, tensor in rest.items() if _shape(saved.get(name)) == tensor.shape}
    return student | rest | same


def differences(saved: Mapping[str, Tensor], current: Mapping[str, Tensor], shown: int = 3) -> str:
    """List the names of the tensors whose shapes differ or that one side lacks."""
    names = sorted(name for name in {*current, *saved} if _shape(current.get(name)) != _shape(saved.get(name)))
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
