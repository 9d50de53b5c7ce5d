"""Image files with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.errors import UserError


class Files:
    """Pairs of an image in color, of PIL, and its label.

    Args:
        samples: path and label of each image.

    Attributes:
        labels: of all images, known without opening them.

    Raises:
        UserError: when an image is asked for whose file is cut short or no image.
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
        except (OSError, SyntaxError) as error:  # PIL raises the second for some broken PNGs
            reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
            raise UserError(
                f"data.root: {self.paths[index]} cannot be read ({reason}): fetch it anew, or take it out"
            ) from None
