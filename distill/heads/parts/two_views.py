"""Checks and reading of two views of each image."""

from __future__ import annotations

from torch import Tensor

from distill.errors import UserError
from distill.heads.base import Head, RunInfo


def require_two_views(head: Head, run: RunInfo) -> None:
    """Require two views of each image, where their number is known.

    Raises:
        UserError: there are others.
    """
    if run.views not in (None, 2):
        given = "one" if run.views == 1 else str(run.views)
        raise UserError(
            f"{type(head).__name__} compares two views of each image, given {given}: give two in data.train_views, "
            "such as [weak, strong], or choose two of more as the term's views"
        )


def both_views(head: Head, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows `[B, ...]` of each of two views, given view after view `[2 B, ...]`.

    Raises:
        UserError: the rows are not even in number.
    """
    if len(rows) % 2:
        raise UserError(f"{type(head).__name__} compares two views of each image, given {len(rows)} rows")
    first, second = rows.chunk(2)
    return first, second
