"""Folders of images, with or without labels."""

from __future__ import annotations

import os
from typing import Any

from distill.data.dataset import Split
from distill.data.held_out import divide, require_fraction
from distill.data.layouts import LabeledFiles, folder_layout
from distill.data.photos import PhotoData
from distill.data.sources import FileSource
from distill.errors import UserError


class ImageFolder(PhotoData):
    """Images in a folder, by split as `root/train`, `root/val` and `root/test`, or all of them for training.

    Splits are folders (or lists, see `labels`). Without a folder of one of these names, all images of `root` are
    training images. There must be validation images: as `val`, or held out by `val_fraction`; without `test`, they are
    the test images too. Hidden files and folders are ignored.

    Args:
        root: the folder.
        labels: their origin. With `folders`, each split has a folder per class, as in ImageNet, whose sorted names in
            the training images number the classes. A class may be missing in other splits, which is noted. With
            `none` (or null), images have no labels and lie at any depth. The path of a list, lines of `path,label` with
            paths relative to `root`, gives labels to the images that it names; the others have none. Lists by split
            (`{train: a.csv, val: b.csv}`) name the images themselves. Labels that are not all numbers are names, whose
            sorted order numbers the classes.
        val_fraction: share of the training images that is held out for validation, where there is no `val`. The name
            of a file, relative to the training images, decides: so the same images are held out in all runs, and
            none changes sides when others are added. `None` holds out none.
        labeled_only: leave out the images without a label.
        settings: further settings, see `PhotoData` and `ImageData`.

    Attributes:
        num_classes: number of classes; 0 without labels.
        classes: their names, in the order of their labels; `None` without names.

    Raises:
        UserError: the folder is missing or has another layout, there are no validation images or two kinds of them, a
            class has no training image, another split has a class that the training images do not have, or a list has
            another format or names images that are missing; later, a file is not an image.
    """

    def __init__(
        self,
        root: str,
        labels: dict[str, str] | str | None = "folders",
        val_fraction: float | None = None,
        labeled_only: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(root=root, **settings)
        require_fraction(val_fraction)
        self.val_fraction = val_fraction
        self.labeled_only = labeled_only
        self._layout = folder_layout(self.root, labels)
        self._files: dict[Split, LabeledFiles] = {}
        self.classes = self._layout.classes
        self.num_classes = self._layout.num_classes
        has_validation = "val" in self._layout.splits
        if not has_validation and val_fraction is None:
            raise UserError(
                f"data.root: {root} has no validation images 'val': add them, or give data.val_fraction, such as 0.1, "
                "to hold out training images"
            )
        if has_validation and val_fraction is not None:
            raise UserError(
                f"data.val_fraction {val_fraction} would hold out training images, but {root} has validation images "
                "'val': leave one of them out"
            )
        if labeled_only and not self.num_classes:
            raise UserError("data.labeled_only leaves out all images, since with data.labels=none none has a label")

    def source(self, split: Split) -> FileSource:
        """Return the images of a split."""
        if split == "test" and "test" not in self._layout.splits:
            split = "val"
        held_out = split == "val" and self.val_fraction is not None
        found = self._found("train" if held_out else split)
        samples, notes = found.samples, found.notes
        if self.val_fraction is not None and split != "test":
            parts = divide([name.replace(os.sep, "/") for name in found.names], self.val_fraction)
            samples = [samples[position] for position in parts[held_out]]
        if self.labeled_only:
            samples = [(path, label) for path, label in samples if label >= 0]
            if not samples:
                raise UserError(f"data.labeled_only leaves out all {split} images: none has a label")
        if split == "train" and (lost := {*range(self.num_classes)} - {label for _, label in samples}):
            notes = [
                *notes,
                f"{self.root}: there is no training image of {len(lost)} of the {self.num_classes} classes",
            ]
        return FileSource(samples, notes)

    def _found(self, split: Split) -> LabeledFiles:
        if split not in self._files:
            self._files[split] = self._layout.files(split)
        return self._files[split]
