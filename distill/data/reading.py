"""Reading every image of a data module once, to find those that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from distill.data.base import ImageData
from distill.data.image_files import first_line
from distill.data.loaders import loader_of
from distill.data.sources import paths_of
from distill.errors import UserError

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Read:
    """Images that were just read.

    Attributes:
        split: `train`, `val` or `test`.
        images: their number.
        broken: one sentence for each of them that cannot be read.
    """

    split: str
    images: int
    broken: list[str]


class ImageReader:
    """Reads every image of all splits once, without augmenting it, in as many worker processes as the data module has.

    A file in several splits is read once. Of data modules that are not an `ImageData`, the samples of the loaders' data
    sets are read; those without a length are left out.

    Args:
        data: the data module.

    Attributes:
        total: number of images to read.
    """

    def __init__(self, data: LightningDataModule) -> None:
        self._parts: list[tuple[str, _Readable]] = []
        seen: set[str] = set()
        for split in _SPLITS:
            for source in _sources(data, split):
                paths = paths_of(source)
                self._parts.append((split, _Readable(source, split, _positions(source, paths, seen))))
                seen |= set(paths or ())
        self.total = sum(len(part) for _, part in self._parts)
        self._workers = int(getattr(data, "num_workers", 0))

    def __iter__(self) -> Iterator[Read]:
        for split, part in self._parts:
            generator = torch.Generator().manual_seed(0)
            for sentences in DataLoader(
                part, batch_size=16, num_workers=self._workers, collate_fn=list, generator=generator
            ):
                yield Read(split, len(sentences), [sentence for sentence in sentences if sentence])


class _Readable(Dataset[str]):
    """One sentence for each image that cannot be read, an empty one for the others."""

    def __init__(self, source: Any, split: str, positions: list[int]) -> None:
        self.source = source
        self.split = split
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> str:
        position = self.positions[index]
        try:
            self.source[position]
        except UserError as error:
            return first_line(error).removeprefix("data.root: ")
        except MemoryError:
            raise
        except Exception as error:  # whatever a data set of the user's raises
            return f"image {position} of {self.split} cannot be read ({type(error).__name__}: {first_line(error)})"
        return ""


def _sources(data: LightningDataModule, split: str) -> list[Any]:
    """Return the images of a split, without transforms where these are known."""
    if isinstance(data, ImageData):
        return [data.used_source(split)]  # type: ignore[arg-type]  # mypy does not infer the literals
    loaders: Any = loader_of(data, split)
    loaders = list(loaders.values()) if isinstance(loaders, dict) else loaders
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    datasets = [getattr(loader, "dataset", None) for loader in loaders]
    return [dataset for dataset in datasets if isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")]


def _positions(source: Any, paths: list[str] | None, seen: set[str]) -> list[int]:
    if paths is None:
        return list(range(len(source)))
    return [position for position, path in enumerate(paths) if path not in seen]
