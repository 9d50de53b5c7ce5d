"""Distributions over the rows of a memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_distributions(student: Tensor, teacher: Tensor, rows: int = 50) -> Figure:
    """Draw one plot per image: both distributions over the rows that are most probable for the teacher.

    Args:
        student: probabilities `[B, K]`.
        teacher: probabilities `[B, K]`.
        rows: number of rows per image; at most K are drawn.
    """
    from matplotlib.figure import Figure

    nearest = teacher.topk(min(rows, teacher.shape[1]), dim=1).indices
    student, teacher = (shares.detach().gather(1, nearest).float().cpu() for shares in (student, teacher))
    figure = Figure(figsize=(8, 2 * len(nearest)), layout="constrained")
    plots = figure.subplots(len(nearest), squeeze=False)[:, 0]
    for axes, teacher_curve, student_curve in zip(plots, teacher, student, strict=True):
        axes.plot(teacher_curve.numpy(), label="teacher")
        axes.plot(student_curve.numpy(), label="student")
        axes.set_yscale("log")
        axes.set_ylim(1e-6, 1.5)
        axes.set_ylabel("probability")
    plots[-1].set_xlabel("rows of the queue, most similar to the teacher first")
    plots[-1].legend()
    return figure
