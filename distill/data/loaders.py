"""The loaders of any data module, of which some may be missing."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden


def loader_of(data: LightningDataModule, split: str) -> Any | None:
    """Return the loader of a split, `train`, `val` or `test`; `None` if the data module has none."""
    name = f"{split}_dataloader"
    return getattr(data, name)() if is_overridden(name, data) else None
