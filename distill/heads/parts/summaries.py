"""The summary of a teacher that a head compares with, as a request to a store."""

from __future__ import annotations

from distill.heads.base import Head
from distill.store.requests import Request


def request_of(head: Head, dtype: str = "float32") -> Request:
    """Return what a built head reads of a stored teacher.

    A head that leaves `summarize_teacher` as it is reads the teacher's own features.

    Args:
        head: the head.
        dtype: `float32`, `bfloat16` or `float16`.
    """
    owner = next(cls for cls in type(head).__mro__ if "summarize_teacher" in vars(cls))
    if owner is Head:
        return Request(features=tuple(sorted(head.needs_of("teacher"))), dtype=dtype)
    return Request(
        head=owner.__name__,
        settings=dict(head.summary_key()),
        dtype=dtype,
        on_segments="segments" in head.batch_needs,
    )
