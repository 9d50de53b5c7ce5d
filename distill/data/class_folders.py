"""Image files in one folder per class, numbered by the classes of the training images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from distill.data.image_files import EXTENSIONS
from distill.errors import UserError, did_you_mean

_OF_OTHER_PROGRAMS = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the subfolders that are not hidden; none if `folder` does not exist."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))


def is_hidden(name: str) -> bool:
    """Return True for hidden files and folders, and for those that other programs put beside images."""
    return name.startswith(".") or name in _OF_OTHER_PROGRAMS


def is_image(path: Path) -> bool:
    """Return True for the file of an image that is not hidden."""
    return path.suffix.lower() in EXTENSIONS and not is_hidden(path.name) and path.is_file()


def refuse_unknown_classes(folder: Path, training: Path, allowed: Collection[str] = ()) -> None:
    """Refuse class folders that the training images do not have, since there is no number for them.

    Args:
        folder: of another split.
        training: folder of the training images.
        allowed: names of folders that are no classes.

    Raises:
        UserError: there is an unknown one.
    """
    classes = class_folders(training)
    if unknown := [name for name in class_folders(folder) if name not in {*classes, *allowed}]:
        raise UserError(
            f"data.root: {folder} has other class folders than {training}, whose order numbers the classes: "
            f"{listed(unknown)} of {folder.name} is no class of {training.name} ({did_you_mean(unknown[0], classes)})"
        )


def image_files(folder: Path, extensions: Sequence[str] = EXTENSIONS) -> tuple[list[str], Counter[str]]:
    """Find the images in a folder, at any depth and through links.

    Args:
        folder: of the images; it may be missing.
        extensions: of the files that are images, in lower case.

    Returns:
        The path of every image, sorted folder by folder, and the number of files that were left out, by extension.
        Hidden files and folders are in neither.
    """
    paths = []
    left_out: Counter[str] = Counter()
    for parent, files in sorted(_walk(folder)):
        for file in sorted(file for file in files if not is_hidden(file)):
            if file.lower().endswith(tuple(extensions)):
                paths.append(os.path.join(parent, file))
            else:
                left_out[os.path.splitext(file)[1].lower() or "no extension"] += 1
    return paths, left_out


def class_files(
    folder: Path, classes: Sequence[str], extensions: Sequence[str] = EXTENSIONS
) -> tuple[list[tuple[str, int]], Counter[str]]:
    """Find the images of the classes, each in a folder of its own as `image_files` finds them.

    Args:
        folder: contains a folder per class; some may be missing.
        classes: names of the classes, in the order of their labels.
        extensions: of the files that are images, in lower case.

    Returns:
        Path and label of every image, class by class, and the number of files that were left out, by extension.
    """
    samples = []
    left_out: Counter[str] = Counter()
    for label, name in enumerate(classes):
        paths, others = image_files(folder / name, extensions)
        samples += [(path, label) for path in paths]
        left_out += others
    return samples, left_out


def notes_on_files(folder: Path, left_out: Counter[str]) -> list[str]:
    """Describe the files of a folder that were left out."""
    if not left_out:
        return []
    kinds = ", ".join(f"{count} {extension}" for extension, count in left_out.most_common(4))
    more = len(left_out) - 4
    kinds += f", and {more} more extensions" if more > 0 else ""
    return [f"{folder}: files left out for their extension: {left_out.total():,} ({kinds})"]


def notes_on(folder: Path, classes: Sequence[str], labels: Iterable[int], left_out: Counter[str]) -> list[str]:
    """Describe what is unusual about the class folders of a split: files left out, classes without images."""
    notes = notes_on_files(folder, left_out)
    if loose := [path for path in folder.iterdir() if is_image(path)]:
        notes.append(f"{folder}: images left out since they are in no class folder: {len(loose):,}")
    present = set(labels)
    if missing := [name for label, name in enumerate(classes) if label not in present]:
        notes.append(f"{folder}: there is no image of {len(missing)} of the {len(classes)} classes: {listed(missing)}")
    return notes


def notes_on_names(folder: Path, classes: Sequence[str]) -> list[str]:
    """Describe what may be a mistake in the names and the depth of the training images' class folders."""
    notes = []
    spellings = Counter(name.casefold() for name in classes)
    if alike := [name for name in classes if spellings[name.casefold()] > 1]:
        notes.append(f"{folder}: {listed(alike)} are different classes, though their names differ only in case")
    inner = class_folders(folder / classes[0]) if len(classes) == 1 else []
    if len(inner) > 1:
        notes.append(
            f"{folder}: {classes[0]!r} is the only class, and the folders in it ({listed(inner)}) are none: classes "
            f"are the folders directly in {folder.name}"
        )
    return notes


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Return the first names in quotes, and the number of the others."""
    shown = ", ".join(map(repr, names[:limit]))
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Return the folders that are not hidden, with the files in them."""
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
        yield parent, files
