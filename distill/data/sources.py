"""Sources of samples: pairs of image and label, by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from distill.errors import UserError


class Source(Protocol):
    """Pairs of an image and its label, by position.

    Class counts, long tails and class-balanced sampling also need the labels of all pairs, as `labels` or `targets`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


class ArraySource:
    """Images in memory, with their labels.

    Args:
        images: one image per entry of the first dimension, an array or a tensor.
        labels: integers of the same length; -1 for unlabeled.

    Attributes:
        labels: the labels as a list.
    """

    def __init__(self, images: Any, labels: Sequence[int] | Any) -> None:
        self.images = images
        self.labels = [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], self.labels[index]


class FileSource:
    """Image files, opened as color images of PIL, with their labels.

    Args:
        samples: path and label of each image.

    Attributes:
        paths: of all images.
        labels: of all images, known without opening them.

    Raises:
        UserError: when an image is read whose file is missing, truncated or not an image.
    """

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self.paths = [path for path, _ in samples]
        self.labels = [int(label) for _, label in samples]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from torchvision.datasets.folder import pil_loader

        try:
            return pil_loader(self.paths[index]), self.labels[index]
        except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for some broken PNGs
            reason = "it is missing" if isinstance(error, FileNotFoundError) else first_line(error)
            raise UserError(
                f"data.root: {self.paths[index]} cannot be read ({reason}): download it again or remove it"
            ) from None


class Subset:
    """Selected pairs of a source.

    Args:
        source: the whole.
        positions: of the selected pairs, in the order in which they are to come.
    """

    def __init__(self, source: Source, positions: Sequence[int]) -> None:
        self.source = source
        self.positions = list(positions)
        labels = labels_of(source)
        self.labels = [labels[position] for position in self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.source[self.positions[index]]


def labels_of(source: Source) -> list[int]:
    """Return the label of every pair, -1 for unlabeled, without opening an image.

    Raises:
        UserError: the source has neither `labels` nor torchvision's `targets`.
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
    """Return the number of labels of each class, without those below 0."""
    counts = [0] * num_classes
    for label in labels:
        if label >= 0:
            counts[label] += 1
    return counts


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]
