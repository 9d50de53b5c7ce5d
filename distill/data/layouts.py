"""Layouts of image files and their labels in a folder, by split."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from distill.data.class_folders import (
    class_files,
    class_folders,
    image_files,
    listed,
    notes_on,
    notes_on_files,
    notes_on_names,
    refuse_unknown_classes,
)
from distill.data.dataset import Split
from distill.data.label_lists import number_labels, read_label_list, require_files
from distill.errors import UserError, did_you_mean, one_of

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class LabeledFiles:
    """The images of a split.

    Attributes:
        samples: path and label of each, -1 for unlabeled.
        names: of the files, relative to the folder of the split.
        notes: what the user should know about them.
    """

    samples: list[tuple[str, int]]
    names: list[str]
    notes: list[str]


class FolderLayout(ABC):
    """Image files and their labels in a folder, by split.

    Attributes:
        num_classes: 0 without labels.
        classes: their names, if they have names.
        folders: the folders of the splits that there are. Without a folder `train`, `val` or `test`, all images are
            training images.
    """

    num_classes: int = 0
    classes: list[str] | None = None

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[Split, Path] = {split: root / split for split in SPLITS if (root / split).is_dir()}
        self.folders = self.folders or {"train": root}

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that there are."""
        return tuple(self.folders)

    @abstractmethod
    def files(self, split: Split) -> LabeledFiles:
        """Return the images of a split that there is.

        Raises:
            UserError: there are none, or their labels are wrong.
        """


class ClassLayout(FolderLayout):
    """One folder per class in each split, whose sorted names in `train` number the classes."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.training = self.folders.get("train", root / "train")
        self.classes: list[str] = class_folders(self.training)
        if not self.classes:
            raise no_classes(root / "train")
        if "val" in self.folders and not class_folders(self.folders["val"]):
            raise no_classes(self.folders["val"])
        for split in self.splits:
            refuse_unknown_classes(self.folders[split], self.training)
        self.num_classes = len(self.classes)

    def files(self, split: Split) -> LabeledFiles:
        folder = self.folders[split]
        if not class_folders(folder):
            raise no_classes(folder)
        samples, left_out = class_files(folder, self.classes)
        labels = {label for _, label in samples}
        missing = [name for label, name in enumerate(self.classes) if label not in labels]
        if missing and (split == "train" or not samples):
            raise UserError(f"data.root: {folder} has no image of {listed(missing)}{_other_files(left_out)}")
        notes = notes_on(folder, self.classes, labels, left_out)
        notes += notes_on_names(folder, self.classes) if split == "train" else []
        return LabeledFiles(samples, [_relative(path, folder) for path, _ in samples], notes)


class PlainLayout(FolderLayout):
    """Images without labels, at any depth in the folders of the splits."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        if not root.is_dir():
            raise UserError(f"data.root: there is no folder {root}")
        if "train" not in self.folders:
            raise UserError(
                f"data.root: {root} has a folder {self.splits[0]!r} but none named 'train': give the folder of the "
                "training images that name"
            )

    def files(self, split: Split) -> LabeledFiles:
        folder = self.folders[split]
        paths, left_out = image_files(folder)
        if not paths:
            raise UserError(f"data.root: {folder} has no image{_other_files(left_out)}")
        notes = notes_on_files(folder, left_out)
        return LabeledFiles([(path, -1) for path in paths], [_relative(path, folder) for path in paths], notes)


class ListLayout(PlainLayout):
    """Images at any depth in the folders of the splits; those that a list names have labels.

    Args:
        root: of the paths in the list.
        file: the list, see `read_label_list`.
    """

    def __init__(self, root: Path, file: str) -> None:
        super().__init__(root)
        self.file = file
        self.labels = {
            os.path.relpath(path, root) if os.path.isabs(path) else path: label
            for path, label in read_label_list(file).items()
        }
        self.listed = {split: [path for path in self.labels if self._split(path) == split] for split in (*SPLITS, None)}
        if not self.listed["train"]:
            raise UserError(
                f"data.labels: {file!r} lists no image of {self.folders['train']} (its first is "
                f"{next(iter(self.labels))}): paths are relative to data.root, {root}"
            )
        training, val, test = ([self.labels[path] for path in self.listed[split]] for split in SPLITS)
        numbering = number_labels(training, val + test)
        self.classes, self.num_classes, self.numbers = numbering.classes, numbering.num_classes, numbering.numbers

    def files(self, split: Split) -> LabeledFiles:
        found = super().files(split)
        paths = [_relative(path, self.root) for path, _ in found.samples]
        elsewhere = self.listed[None] if split == "train" else []
        known = {*paths}
        require_files(self.file, self.root, [path for path in [*self.listed[split], *elsewhere] if path not in known])
        labels = [self.numbers[self.labels.get(path, "")] for path in paths]
        notes = {
            f"{self.folders[split]}: images without a label in {self.file}": labels.count(-1),
            f"{self.file}: images that are in none of the folders of the splits": len(elsewhere),
        }
        return LabeledFiles(
            [(path, label) for (path, _), label in zip(found.samples, labels, strict=True)],
            found.names,
            [*found.notes, *(f"{note}: {count:,}" for note, count in notes.items() if count)],
        )

    def _split(self, path: str) -> Split | None:
        """Return the split in whose folder a path lies."""
        if self.folders == {"train": self.root}:
            return "train"
        return next((split for split in self.folders if path.startswith(f"{split}{os.sep}")), None)


class SplitLists(FolderLayout):
    """Images that lists name, a list for each split.

    Args:
        root: of the paths in the lists.
        files: the list of each split, of which `train` is needed, see `read_label_list`.
    """

    def __init__(self, root: Path, files: Mapping[str, str]) -> None:
        super().__init__(root)
        for split in files:
            one_of("data.labels", split, SPLITS)
        if "train" not in files:
            raise UserError(f"data.labels has a list for {', '.join(files) or 'no split'}, but none for train")
        self.lists = {split: files[split] for split in SPLITS if split in files}
        self.labels = {split: read_label_list(file, f"data.labels.{split}") for split, file in self.lists.items()}
        others = [label for split in self.splits if split != "train" for label in self.labels[split].values()]
        numbering = number_labels(self.labels["train"].values(), others)
        self.classes, self.num_classes, self.numbers = numbering.classes, numbering.num_classes, numbering.numbers

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that have a list."""
        return tuple(self.lists)

    def files(self, split: Split) -> LabeledFiles:
        labels = self.labels[split]
        require_files(self.lists[split], self.root, list(labels), f"data.labels.{split}")
        samples = [(str(self.root / path), self.numbers[label]) for path, label in labels.items()]
        return LabeledFiles(samples, list(labels), [])


def folder_layout(root: Path, labels: str | Mapping[str, str] | None) -> FolderLayout:
    """Return the layout of a folder.

    Args:
        root: the folder.
        labels: `folders`, `none` (or `None`), a list, or lists by split.

    Raises:
        UserError: the files do not have this layout.
    """
    if isinstance(labels, Mapping):
        return SplitLists(root, labels)
    layouts = {"folders": ClassLayout, "none": PlainLayout}
    if (layout := layouts.get(labels or "none")) is not None:
        return layout(root)
    assert labels is not None
    if not Path(labels).is_file():
        raise UserError(f"data.labels: there is no list {labels!r}; besides lists, {did_you_mean(labels, layouts)}")
    return ListLayout(root, labels)


def no_classes(folder: Path) -> UserError:
    """Return the error that the folder of a split has no class folders, or that there is no folder around it."""
    if not folder.parent.is_dir():
        return UserError(
            f"data.root: there is no folder {str(folder.parent)!r} (ImageNet: from image-net.org, after registering)"
        )
    return UserError(
        f"data.root: no class folders in {folder}; sort the images as {folder}/<class>/<image> "
        "(ImageNet: from image-net.org, after registering), or give data.labels=none to train without labels"
    )


def _other_files(left_out: Counter[str]) -> str:
    return f", only files of other kinds ({', '.join(left_out)})" if left_out else ""


def _relative(path: str, folder: Path) -> str:
    """Return a path that was found in a folder relative to it."""
    return path[len(os.path.join(folder, "")) :]
