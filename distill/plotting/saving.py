"""Pictures in files."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from distill.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, path: str | Path, dpi: int = 100) -> Path:
    """Write a figure to a file, whole or not at all: if that fails, an older picture stays as it is.

    Args:
        figure: the figure.
        path: the file, whose suffix is the format; its folder is created if needed.
        dpi: resolution, in pixels per inch.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    content = BytesIO()
    figure.savefig(content, format=path.suffix.lower().removeprefix("."), dpi=dpi)
    write_atomic(path, content.getbuffer())
    return path
