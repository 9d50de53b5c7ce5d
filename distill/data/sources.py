"""What samples are read from: images with labels, by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from distill.errors import UserError


class Source(Protocol):
    """Pairs of an image and its label, by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


class Subset:
    """Some of a source's pairs.

    Args:
        source: the whole.
        positions: which of its pairs, in which order.
    """

    def __init__(self, source: Source, positions: Sequence[int]) -> None:
        self.source = source
        self.positions = list(positions)
        known = labels_of(source)
        self.labels = [known[position] for position in self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.source[self.positions[index]]


def labels_of(source: Source) -> list[int]:
    """The label of every pair, -1 for unlabeled, without opening an image.

    Raises:
        UserError: the source does not tell them: it has neither `labels` nor torchvision's `targets`.
    """
    for name in ("labels", "targets"):
        labels = getattr(source, name, None)
        if labels is not None:
            return [int(label) for label in labels]
    raise UserError(
        f"data: {type(source).__name__} has neither 'labels' nor 'targets', so its classes cannot be counted: give "
        "it a sequence of the labels under one of these names"
    )


def count_classes(labels: Sequence[int], num_classes: int) -> list[int]:
    """How many of the labels are of each class; those below 0 are of none."""
    counts = [0] * num_classes
    for label in labels:
        if label >= 0:
            counts[label] += 1
    return counts
