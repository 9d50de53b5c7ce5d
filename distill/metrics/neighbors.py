"""Agreement of two networks about which images are alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from distill.distributed import rank, world_size
from distill.functional.neighbors import shared_neighbors
from distill.precision import at_least_float32

_CHUNK = 2**24
"""Number of similarities in memory at a time for each network: 64 MiB."""


class NeighborAgreement(Metric):
    """Share of each image's nearest images in the teacher's embedding that are among its nearest in the student's.

    The mean over all images, in `[0, 1]`; see `shared_neighbors`. It needs no labels, and the embeddings may have any
    widths. The embeddings of all ranks are gathered once, at the end, and put into the order in which an
    `EvaluationSampler` deals the images, so that the value does not depend on the number of ranks.

    Args:
        neighbors: k; 10 by default. Of fewer than k other images, all count.
    """

    full_state_update = False
    higher_is_better = True
    student: list[Tensor]
    teacher: list[Tensor]
    counted: list[Tensor]
    position: list[Tensor]

    def __init__(self, neighbors: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.neighbors = neighbors
        for name in ("student", "teacher", "counted", "position"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, student: Tensor, teacher: Tensor, counted: Tensor) -> None:
        """Add embeddings `[B, d_s]` and `[B, d_t]`; `counted` `[B]` is true for the images that count."""
        before = sum(map(len, self.counted))
        self.student.append(at_least_float32(student.detach()))
        self.teacher.append(at_least_float32(teacher.detach()))
        self.counted.append(counted)
        rows = torch.arange(before, before + len(counted), device=counted.device)
        self.position.append(rows * world_size() + rank())

    def compute(self) -> Tensor:
        """Return the mean over all images that count; NaN for fewer than two."""
        position, counted = dim_zero_cat(self.position), dim_zero_cat(self.counted)
        rows = position.argsort()
        rows = rows[counted[rows]]
        if len(rows) < 2:
            return torch.full((), torch.nan, device=position.device)
        student, teacher = (dim_zero_cat(state)[rows] for state in (self.student, self.teacher))
        return shared_neighbors(student, teacher, self.neighbors, max(1, _CHUNK // len(rows))).mean()
