"""Relational representation distillation (Giakoumoglou, Stathaki, 2024), against a memory of teacher embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from distill.distributed import gather, rank
from distill.errors import UserError, one_of
from distill.features import Features, FeatureSpec
from distill.functional.contrast import memory_relation
from distill.heads.base import Batch, Head, Scope, positive
from distill.heads.parts.projection import L2Normalize, NormalizedLinear
from distill.memory import EmbeddingQueue, Storage, refuse_other_shapes
from distill.schedules import Number, value_at

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRESETS: dict[str, tuple[float, float, str]] = {"2025": (0.10, 0.02, "before"), "2024": (0.04, 0.10, "after")}
"""Student's and teacher's temperature, and the time of enqueuing, in the authors' code of that year."""


class RRD(Head):
    """Cross entropy between the two networks' similarities to a queue of teacher embeddings.

    Both embeddings are projected to one width and normalized; p = softmax(queue z / T) for each network, and the loss
    is -sum p_teacher log p_student, mean over the images. Only filled rows of the queue are scored; as long as there
    is none, the loss is 0.

    The published sources disagree on which of the two distributions is the sharper one: the paper's abstract says the
    student's, the authors' later code the teacher's. Both temperatures and the order are therefore arguments, and a
    preset gives what of them is not given.

    The queue is filled once a batch, so several times an optimizer step under gradient accumulation, with the batches
    of all ranks in rank order, and in training only.

    Args:
        size: K, rows of the queue.
        width: d of the projections.
        student_temperature: T of the student, a number or a schedule; the preset's if not given.
        teacher_temperature: T of the teacher, a number or a schedule; the preset's if not given.
        enqueue: whether the batch is put into the queue `before` it is scored, so that each image finds its own teacher
            embedding there, or `after`; the preset's if not given.
        preset: the authors' code of `2025` (0.10, 0.02, before) or of `2024` (0.04, 0.10, after).
        distance: `kl` is the cross entropy without the teacher's entropy: the same gradient, and 0 means equal.
        teacher_projection: how the teacher's embedding gets its width. `random` draws a linear map with bias that is
            never trained, which is what the authors' code comes to; `orthogonal` does the same with orthonormal rows
            and no bias; `identity` leaves the embedding as it is, and d is its width.
        dtype: what the queue is stored as.
        chunk: rows scored at a time, to save memory; all if not given.

    Raises:
        UserError: an argument out of its range.
    """

    needs = frozenset({"embedding"})
    scope: Scope = "memory"
    student_projection: nn.Module
    teacher_projection: nn.Module
    queue: EmbeddingQueue

    def __init__(
        self,
        size: int = 16384,
        width: int = 128,
        student_temperature: Number | None = None,
        teacher_temperature: Number | None = None,
        enqueue: Literal["before", "after"] | None = None,
        preset: Literal["2025", "2024"] = "2025",
        distance: Literal["cross_entropy", "kl"] = "cross_entropy",
        teacher_projection: Literal["random", "orthogonal", "identity"] = "random",
        dtype: Storage = "float32",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        for name, given in (("size", size), ("width", width), ("chunk", chunk)):
            if given is not None and given < 1:
                raise UserError(f"{name} must be at least 1, given {given}")
        of_student, of_teacher, order = PRESETS[one_of("preset", preset, PRESETS)]
        self.student_temperature = positive(
            "student_temperature", of_student if student_temperature is None else student_temperature
        )
        self.teacher_temperature = positive(
            "teacher_temperature", of_teacher if teacher_temperature is None else teacher_temperature
        )
        self.enqueue = one_of("enqueue", order if enqueue is None else enqueue, ("before", "after"))
        self.distance = one_of("distance", distance, ("cross_entropy", "kl"))
        self.projected = one_of("teacher_projection", teacher_projection, ("random", "orthogonal", "identity"))
        one_of("dtype", dtype, ("float32", "bfloat16"))
        self.size, self.width, self.dtype, self.chunk = size, width, dtype, chunk
        self._seen: dict[str, Tensor] = {}

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Make the projections and the queue."""
        (student_width,), (teacher_width,) = student["embedding"], teacher["embedding"]
        width = teacher_width if self.projected == "identity" else self.width
        self.student_projection = NormalizedLinear(student_width, width)
        self.teacher_projection = L2Normalize()
        if self.projected != "identity":
            projection = NormalizedLinear(teacher_width, width).requires_grad_(False)
            if self.projected == "orthogonal":
                nn.init.orthogonal_(projection.weight)
                nn.init.zeros_(projection.bias)
            self.teacher_projection = projection
        self.queue = EmbeddingQueue(self.size, width, self.dtype)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare embeddings `[B, d_s]` with embeddings `[B, d_t]` by way of the queue."""
        queries = self.student_projection(student["embedding"])
        # All ranks project the whole batch: the rows are then bit for bit those of one process.
        everyone = self.teacher_projection(gather(teacher["embedding"]))
        own = everyone[rank() * len(queries) : (rank() + 1) * len(queries)]
        if self.training and self.enqueue == "before":
            self.queue.enqueue(everyone)
        relation = memory_relation(
            queries, own, self.queue.rows, *self._temperatures(), filled=self.queue.filled, chunk=self.chunk
        )
        self._seen = {
            "teacher_entropy": relation.teacher_entropy.mean(),
            "student_entropy": relation.student_entropy.mean(),
            "filled": self.queue.filled / self.size,
        }
        if self.training and self.enqueue == "after":
            self.queue.enqueue(everyone)
        loss = relation.cross_entropy
        return (loss - relation.teacher_entropy if self.distance == "kl" else loss).mean()

    def diagnostics(self) -> dict[str, Tensor]:
        """Mean entropy of both distributions (at most log K), and the share of the queue that is filled."""
        return self._seen

    @torch.no_grad()
    def similarities(self, student: Features, teacher: Features) -> tuple[Tensor, Tensor]:
        """The two distributions over the queue, to look at: p of the student and p of the teacher, `[B, K]` each.

        Rows that hold nothing have probability 0. The queue stays as it is.
        """
        projected = (self.student_projection(student["embedding"]), self.teacher_projection(teacher["embedding"]))
        empty = torch.arange(self.size, device=projected[0].device) >= self.queue.filled
        found = [
            (query @ self.queue.rows.T.to(query.dtype) / temperature)
            .masked_fill(empty, float("-inf"))
            .softmax(dim=1)
            .masked_fill(empty, 0.0)
            for query, temperature in zip(projected, self._temperatures(), strict=True)
        ]
        return found[0], found[1]

    def plot(
        self, student: Features, teacher: Features, batch: Batch, images: int = 4, rows: int = 50
    ) -> Figure | None:
        """Draw both distributions of the first images over the rows that their teacher finds most similar.

        While the queue is empty there is nothing to draw.

        Args:
            student: what the student saw.
            teacher: what the teacher saw.
            batch: what both looked at.
            images: how many images, one plot each.
            rows: how many rows of the queue for each.
        """
        from matplotlib.figure import Figure

        if self.queue.filled == 0:
            return None
        of_student, of_teacher = (part[:images].cpu() for part in self.similarities(student, teacher))
        nearest = of_teacher.topk(min(rows, self.size), dim=1).indices
        figure = Figure(figsize=(8, 2 * len(nearest)), layout="constrained")
        for axes, *curves in zip(
            figure.subplots(len(nearest), squeeze=False)[:, 0],
            of_teacher.gather(1, nearest),
            of_student.gather(1, nearest),
            strict=True,
        ):
            for name, curve in zip(("teacher", "student"), curves, strict=True):
                axes.plot(curve.float().numpy(), label=name)
            axes.set_yscale("log")
            axes.set_ylim(1e-6, 1.5)
            axes.set_ylabel("probability")
        axes.set_xlabel("rows of the queue, most similar to the teacher first")
        axes.legend()
        return figure

    def _temperatures(self) -> tuple[float, float]:
        return value_at(self.student_temperature, self.progress), value_at(self.teacher_temperature, self.progress)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = {
            "queue.rows": "the queue (size x width)",
            "teacher_projection.weight": "the teacher's projection (width x teacher's embedding)",
            "student_projection.weight": "the student's projection (width x student's embedding)",
        }
        refuse_other_shapes(self, state_dict, prefix, names)
        super()._load_from_state_dict(state_dict, prefix, *args)
