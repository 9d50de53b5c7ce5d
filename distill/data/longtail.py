"""Long-tailed training sets: many images of few classes, few images of most."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path, PurePath

from distill.configurable import Configurable
from distill.data.sources import FileSource, Source, count_classes, labels_of
from distill.errors import UserError, require_above, require_at_least, require_between


class LongTail(Configurable, ABC):
    """Make a training set long-tailed; validation and test images do not change.

    A subclass decides how many images of each class are kept. Classes keep their order, the first images of each
    class are kept, in the order of the data set, and images without a label are left out: nothing is random.

    Args:
        many: a class with more training images than this is a many-shot class.
        few: a class with fewer training images than this is a few-shot class; the classes in between are medium-shot.
            The defaults 100 and 20 are the thresholds of ImageNet-LT.

    Raises:
        UserError: `few` is above `many`, or one of them is negative.
    """

    def __init__(self, many: int = 100, few: int = 20) -> None:
        require_at_least(0, many=many, few=few)
        if few > many:
            raise UserError(f"few must be at most many, {many}, given {few}")
        self.many = many
        self.few = few

    @abstractmethod
    def counts(self, available: list[int]) -> list[int]:
        """Return the number of images to keep of each class, given the number available."""

    def positions(self, source: Source, num_classes: int) -> list[int]:
        """Return the positions of the kept images in a source, in rising order.

        Raises:
            UserError: a class is left without an image, or the source does not list its labels.
        """
        labels = labels_of(source)
        available = self._available(labels, num_classes)
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
        """Return the classes of the groups `many`, `medium` and `few`, given the training images per class."""
        shots = ["many" if count > self.many else "few" if count < self.few else "medium" for count in counts]
        return {name: [label for label, shot in enumerate(shots) if shot == name] for name in ("many", "medium", "few")}

    def _available(self, labels: list[int], num_classes: int) -> list[int]:
        """Return the number of images of each class, of which there must be one."""
        if not num_classes:
            raise UserError(f"data.longtail: {type(self).__name__} needs labels, but the data have none")
        return count_classes(labels, num_classes)

    def _require_images(self, counts: list[int], available: list[int]) -> None:
        empty = [label for label, count in enumerate(counts) if count < 1]
        if empty:
            raise UserError(
                f"data.longtail: {type(self).__name__} leaves class {empty[0]}, of {available[empty[0]]} images, "
                f"without a training image ({len(empty)} of {len(counts)} classes): every class needs one"
            )


class ExponentialTail(LongTail):
    """Class sizes that decrease exponentially, as in CIFAR-LT (Cui et al. 2019, Cao et al. 2019).

    Class c of C keeps n_c = floor(n_max f^(c / (C - 1))) images; n_max is as large as the data set allows, which for
    classes of equal size is that size.

    Args:
        imbalance: f, the size of the smallest class divided by that of the largest; 0.1, 0.02 and 0.01 are usual.
        many: a class with more training images than this is a many-shot class.
        few: a class with fewer training images than this is a few-shot class.

    Raises:
        UserError: the imbalance is not in (0, 1], or `few` is above `many`.
    """

    def __init__(self, imbalance: float = 0.01, many: int = 100, few: int = 20) -> None:
        super().__init__(many, few)
        self.imbalance = _checked(imbalance)

    def counts(self, available: list[int]) -> list[int]:
        """Return n_c for every class."""
        last = max(len(available) - 1, 1)
        return _scaled([self.imbalance ** (label / last) for label in range(len(available))], available)


class StepTail(LongTail):
    """Two class sizes: the first classes keep all images, the last ones a fraction (Buda et al. 2018).

    Args:
        imbalance: the size of a rare class divided by that of a frequent one.
        rare: fraction of the classes that are rare.
        many: a class with more training images than this is a many-shot class.
        few: a class with fewer training images than this is a few-shot class.

    Raises:
        UserError: the imbalance is not in (0, 1], `rare` is not in [0, 1], or `few` is above `many`.
    """

    def __init__(self, imbalance: float = 0.01, rare: float = 0.5, many: int = 100, few: int = 20) -> None:
        super().__init__(many, few)
        self.imbalance = _checked(imbalance)
        require_between(0, 1, rare=rare)
        self.rare = rare

    def counts(self, available: list[int]) -> list[int]:
        """Return the size of every class, frequent or rare."""
        frequent = len(available) - round(self.rare * len(available))
        return _scaled([1.0 if label < frequent else self.imbalance for label in range(len(available))], available)


class ListedTail(LongTail):
    """The images listed in a file, one line `path label` per image, such as ImageNet-LT's `ImageNet_LT_train.txt`.

    Paths are compared by their last two parts, class folder and file name, so this is for `ImageFolder`.

    Args:
        file: the list.
        many: a class with more training images than this is a many-shot class.
        few: a class with fewer training images than this is a few-shot class.

    Raises:
        UserError: the file does not exist, a line has another format, or `few` is above `many`.
    """

    def __init__(self, file: str, many: int = 100, few: int = 20) -> None:
        super().__init__(many, few)
        if not Path(file).is_file():
            raise UserError(f"data.longtail.file: {file!r} does not exist: give the list of the training images")
        self.file = file
        self.listed: dict[tuple[str, ...], int] = {}
        for number, line in enumerate(Path(file).read_text(errors="replace").splitlines(), 1):
            path, _, label = line.strip().rpartition(" ")
            if line.strip():
                if not path or not label.isdecimal():
                    raise UserError(f"data.longtail.file: line {number} of {file!r} is not 'path label': {line[:60]!r}")
                self.listed[_key(path)] = int(label)

    def counts(self, available: list[int]) -> list[int]:
        """Return the number of listed images of each class."""
        largest = max(self.listed.values(), default=0)
        return count_classes(list(self.listed.values()), max(len(available), largest + 1))

    def positions(self, source: Source, num_classes: int) -> list[int]:
        """Return the positions of the listed images, in rising order.

        Raises:
            UserError: a listed image is missing or has another label, a class is left without an image, or the source
                is not made of files.
        """
        if not isinstance(source, FileSource):
            raise UserError("data.longtail: ListedTail selects image files, so it needs a data set of image files")
        available = self._available(source.labels, num_classes)
        files = enumerate(zip(source.paths, source.labels, strict=True))
        found = {_key(path): (position, label) for position, (path, label) in files if _key(path) in self.listed}
        for key, label in self.listed.items():
            if key not in found or found[key][1] != label:
                name = "/".join(key)
                reason = "is missing" if key not in found else f"has label {found[key][1]} by its folder"
                raise UserError(f"data.longtail.file: {self.file!r} lists {name} with label {label}, which {reason}")
        self._require_images(self.counts(available), available)
        return sorted(position for position, _ in found.values())


def _checked(imbalance: float) -> float:
    require_above(0, imbalance=imbalance)
    require_between(0, 1, imbalance=imbalance)
    return imbalance


def _scaled(shares: list[float], available: list[int]) -> list[int]:
    """Return the largest class sizes in proportion to the shares (the largest share is 1), rounded down."""
    most = int(min(images / share for images, share in zip(available, shares, strict=True)))
    return [int(most * share) for share in shares]


def _key(path: str) -> tuple[str, ...]:
    return PurePath(path).parts[-2:]
