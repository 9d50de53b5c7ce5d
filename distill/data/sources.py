"""Sources of samples: pairs of image and label, by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from distill.data.decoders import READERS, Decoder
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
    """Image files, read as RGB images (see `read_image`), with their labels.

    Args:
        samples: path and label of each image.
        notes: what the user should know about the files, such as some that were left out; told once in a run.
        decoder: `pil` gives images of PIL, `torchvision` tensors `[3, H, W]` of the same pixels.

    Attributes:
        decoder: as given; `PhotoData` sets its own.
        paths: of all images.
        labels: of all images, known without opening them.

    Raises:
        UserError: when an image is read whose file is missing, truncated or not an image.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], notes: Sequence[str] = (), decoder: Decoder = "pil") -> None:
        self.paths = [path for path, _ in samples]
        self.labels = [int(label) for _, label in samples]
        self.notes = list(notes)
        self.decoder: Decoder = decoder

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return READERS[self.decoder](self.paths[index]), self.labels[index]


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
    if (labels := listed_labels(source)) is not None:
        return labels
    raise UserError(
        f"data: {type(source).__name__} has neither 'labels' nor 'targets', so its classes cannot be counted: give "
        "it a sequence of the labels under one of these names"
    )


def listed_labels(source: Source) -> list[int] | None:
    """Return the label of every pair, or `None` if the source does not list them."""
    for name in ("labels", "targets"):
        labels = getattr(source, name, None)
        if labels is not None:
            return [int(label) for label in labels]
    return None


def paths_of(source: Any) -> list[str] | None:
    """Return the path of every image, or `None` if the source has no files."""
    if isinstance(source, Subset):
        paths = paths_of(source.source)
        return paths and [paths[position] for position in source.positions]
    return source.paths if isinstance(source, FileSource) else None


def require_classes(source: Source, split: str, num_classes: int) -> None:
    """Refuse labels that are no class, if the source lists its labels; negative ones stand for none.

    Raises:
        UserError: a label is as large as the number of classes, or larger.
    """
    if (labels := listed_labels(source)) is not None and (largest := max(labels, default=-1)) >= num_classes:
        raise UserError(
            f"data: image {labels.index(largest)} of {split} has label {largest}, but with {num_classes} classes "
            f"labels go from 0 to {num_classes - 1}"
        )


def count_classes(labels: Sequence[int], num_classes: int) -> list[int]:
    """Return the number of labels of each class, without those below 0."""
    counts = [0] * num_classes
    for label in labels:
        if label >= 0:
            counts[label] += 1
    return counts


def require_images_of_every_class(reason: str, counts: Sequence[int]) -> None:
    """Require labels, and an image of every class.

    Args:
        reason: beginning of the message.
        counts: number of labeled images per class.

    Raises:
        UserError: there is no class, or a class without images.
    """
    if not counts:
        raise UserError(f"{reason}, but the data have no labels")
    if 0 in counts:
        raise UserError(f"{reason}, but class {counts.index(0)} has no labeled training image")
