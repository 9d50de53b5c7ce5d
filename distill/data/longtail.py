"""Long-tailed training sets: of each class only so many images, few of most."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path, PurePath

from distill.data.files import Files
from distill.data.sources import Source, count_classes, labels_of
from distill.errors import UserError


class LongTail(ABC):
    """Makes a training set long-tailed; validation and test images stay as they are.

    A subclass says how many images of each class are kept. Classes keep their order, of each the first images are
    kept, in the data set's order, and images without a label are left out: nothing is drawn.

    Args:
        many: a class with more training images than this is a many-shot class.
        few: a class with fewer than this is a few-shot class; what is between is medium-shot. 100 and 20 are the
            thresholds of ImageNet-LT.

    Raises:
        UserError: the two thresholds are in the wrong order.
    """

    def __init__(self, many: int = 100, few: int = 20) -> None:
        if few > many:
            raise UserError(f"few must be at most many, {many}, given {few}")
        self.many = many
        self.few = few

    @abstractmethod
    def counts(self, available: list[int]) -> list[int]:
        """How many images of each class are kept of those there are, both by class."""

    def positions(self, source: Source, num_classes: int) -> list[int]:
        """Where the images that are kept lie in a source, rising.

        Raises:
            UserError: a class is left without an image, or the source does not tell its labels.
        """
        labels = labels_of(source)
        available = count_classes(labels, num_classes)
        self._require_images(available, available)
        missing = self.counts(available)
        self._require_images(missing, available)
        positions = []
        for position, label in enumerate(labels):
            if label >= 0 and missing[label] > 0:
                missing[label] -= 1
                positions.append(position)
        return positions

    def groups(self, counts: list[int]) -> dict[str, list[int]]:
        """The classes of each group, `many`, `medium` and `few`, by the training images of each class."""
        shots = ["many" if count > self.many else "few" if count < self.few else "medium" for count in counts]
        return {name: [label for label, shot in enumerate(shots) if shot == name] for name in ("many", "medium", "few")}

    def _require_images(self, counts: list[int], available: list[int]) -> None:
        empty = [label for label, count in enumerate(counts) if count < 1]
        if empty:
            raise UserError(
                f"data.longtail: {type(self).__name__} leaves class {empty[0]}, of {available[empty[0]]} images, "
                f"without a training image ({len(empty)} of {len(counts)} classes): every class needs one"
            )


class ExponentialTail(LongTail):
    """Fewer images from class to class by the same factor, as in CIFAR-LT (Cui et al. 2019, Cao et al. 2019).

    Class c of C keeps n_c = floor(n_max f^(c / (C - 1))) images; n_max is as large as the data set allows, of equal
    classes all the images of one.

    Args:
        imbalance: f, images of the rarest class per image of the most frequent one; 0.1, 0.02 and 0.01 are usual.
        many: a class with more training images than this is a many-shot class.
        few: a class with fewer than this is a few-shot class.

    Raises:
        UserError: an imbalance outside (0, 1], or thresholds in the wrong order.
    """

    def __init__(self, imbalance: float = 0.01, many: int = 100, few: int = 20) -> None:
        super().__init__(many, few)
        self.imbalance = _checked(imbalance)

    def counts(self, available: list[int]) -> list[int]:
        """n_c of every class."""
        last = max(len(available) - 1, 1)
        return _scaled([self.imbalance ** (label / last) for label in range(len(available))], available)


class StepTail(LongTail):
    """The first classes keep their images, the last ones a share of them (Buda et al. 2018).

    Args:
        imbalance: images of a rare class per image of a frequent one.
        rare: the share of the classes that are rare.
        many: a class with more training images than this is a many-shot class.
        few: a class with fewer than this is a few-shot class.

    Raises:
        UserError: an imbalance outside (0, 1], a share of classes outside [0, 1], or thresholds in the wrong order.
    """

    def __init__(self, imbalance: float = 0.01, rare: float = 0.5, many: int = 100, few: int = 20) -> None:
        super().__init__(many, few)
        self.imbalance = _checked(imbalance)
        if not 0 <= rare <= 1:
            raise UserError(f"rare must be from 0 to 1, given {rare}")
        self.rare = rare

    def counts(self, available: list[int]) -> list[int]:
        """As many of each frequent class, as few of each rare one."""
        frequent = len(available) - round(self.rare * len(available))
        return _scaled([1.0 if label < frequent else self.imbalance for label in range(len(available))], available)


class ListedTail(LongTail):
    """The images that a file lists, a line `path label` each, as ImageNet-LT's `ImageNet_LT_train.txt` does.

    A path is known by its last two parts, folder of the class and file, so it is for `ImageFolder`.

    Args:
        file: the list.
        many: a class with more training images than this is a many-shot class.
        few: a class with fewer than this is a few-shot class.

    Raises:
        UserError: there is no such file, a line is none of these, or thresholds in the wrong order.
    """

    def __init__(self, file: str, many: int = 100, few: int = 20) -> None:
        super().__init__(many, few)
        if not Path(file).is_file():
            raise UserError(f"data.longtail.file: there is no file {file!r}; give the list of the training images")
        self.file = file
        self.listed: dict[tuple[str, ...], int] = {}
        for number, line in enumerate(Path(file).read_text().splitlines(), 1):
            path, _, label = line.strip().rpartition(" ")
            if line.strip():
                if not path or not label.isdigit():
                    raise UserError(f"data.longtail.file: line {number} of {file!r} is not 'path label': {line[:60]!r}")
                self.listed[_key(path)] = int(label)

    def counts(self, available: list[int]) -> list[int]:
        """How many images of each class the list names."""
        beyond = max(self.listed.values(), default=0)
        return count_classes(list(self.listed.values()), max(len(available), beyond + 1))

    def positions(self, source: Source, num_classes: int) -> list[int]:
        """Where the listed images lie among the files.

        Raises:
            UserError: an image is not there or has another label, a class is left without one, or it is no folder.
        """
        if not isinstance(source, Files):
            raise UserError("data.longtail: ListedTail picks files, so it is for data sets of image files alone")
        available = count_classes(source.labels, num_classes)
        files = enumerate(zip(source.paths, source.labels, strict=True))
        found = {_key(path): (position, label) for position, (path, label) in files if _key(path) in self.listed}
        for key, label in self.listed.items():
            if key not in found or found[key][1] != label:
                place = "/".join(key)
                said = "is not there" if key not in found else f"has label {found[key][1]} by its folder"
                raise UserError(f"data.longtail.file: {self.file!r} lists {place} with label {label}, which {said}")
        self._require_images(self.counts(available), available)
        return sorted(position for position, _ in found.values())


def _checked(imbalance: float) -> float:
    if not 0 < imbalance <= 1:
        raise UserError(f"imbalance must be above 0 and at most 1, given {imbalance}")
    return imbalance


def _scaled(shares: list[float], available: list[int]) -> list[int]:
    """The most images that keep the classes in proportion to the shares (the largest is 1), rounded down."""
    most = int(min(images / share for images, share in zip(available, shares, strict=True)))
    return [int(most * share) for share in shares]


def _key(path: str) -> tuple[str, ...]:
    return PurePath(path).parts[-2:]
