"""Relational representation distillation (Giakoumoglou, Stathaki, 2024), with a memory of teacher embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.distributed import gather
from distill.errors import one_of, require_at_least
from distill.features import Features, FeatureSpec, Summary
from distill.functional.contrast import memory_relation
from distill.heads.base import Batch, Scope
from distill.heads.parts.embedding_head import EmbeddingHead
from distill.heads.parts.projection import L2Normalize, NormalizedLinear
from distill.memory import EmbeddingQueue, Storage
from distill.randomness import derive_seed, seeded_by
from distill.schedules import Number, require_values_above, value_at

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRESETS: dict[str, tuple[float, float, str]] = {"2025": (0.10, 0.02, "before"), "2024": (0.04, 0.10, "after")}
"""Temperatures of student and teacher and the time of enqueuing, by the year of the authors' code."""


class RRD(EmbeddingHead):
    """Cross entropy between both networks' similarities to a queue of teacher embeddings.

    Both embeddings are projected to one width and normalized. With p = softmax(queue z / T) for each network, the loss
    is -sum p_teacher log p_student, mean over the images. By default only filled rows of the queue are scored; while
    there are none, the loss is 0. The authors' code scores all K rows from step 0: those not filled yet hold noise, of
    length sqrt(d / K) instead of 1, since it is normalized over the rows. That is `start="noise"`. Until the queue is
    full, the two differ (at first, a loss near log of the batch size here and log K there); from then on they agree.

    The published sources disagree on which distribution is the sharper one: the student's in the paper's abstract, the
    teacher's in the authors' later code. Both temperatures and the order of enqueuing are therefore arguments; the
    preset supplies those that are not given.

    The queue is filled once per batch, hence several times per optimizer step under gradient accumulation, with the
    batches of all ranks in the order in which they were dealt, and in training only.

    Args:
        size: K, rows of the queue; 16,384 as in the authors' code.
        width: d of the projections; 128 likewise.
        student_temperature: T of the student, a number or a schedule; by default the preset's.
        teacher_temperature: T of the teacher, a number or a schedule; by default the preset's.
        enqueue: whether the batch enters the queue `before` it is scored, so that each image finds its own teacher
            embedding there, or `after`; by default the preset's.
        preset: the authors' code of `2025` (0.10, 0.02, before) or of `2024` (0.04, 0.10, after).
        distance: `kl` subtracts the teacher's entropy from the cross entropy: the gradient is the same, and 0 means
            equal.
        teacher_projection: `random` is a linear map with bias that is never trained, which is what the authors' code
            amounts to, and the same in every run; `orthogonal` likewise, with orthonormal rows and no bias; `identity`
            keeps the embedding, whose width is then d.
        dtype: storage type of the queue.
        chunk: rows scored at a time; by default as many as make 4 million similarities, 32 million on a GPU.
        start: until the queue is full, `filled` scores only its filled rows, a choice of this project; `noise` also
            scores rows of noise in place of the others, as the authors' code does.
        seed: of the noise.

    Raises:
        UserError: an argument out of its range.
    """

    scope: Scope = "memory"
    memory_names: ClassVar = {"queue.rows": "the queue (size x width)"}
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
        start: Literal["filled", "noise"] = "filled",
        seed: int = 0,
    ) -> None:
        super().__init__(width)
        require_at_least(1, size=size, chunk=chunk)
        require_values_above(0, student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        preset_student, preset_teacher, preset_order = PRESETS[one_of("preset", preset, PRESETS)]
        self.student_temperature = preset_student if student_temperature is None else student_temperature
        self.teacher_temperature = preset_teacher if teacher_temperature is None else teacher_temperature
        self.enqueue = one_of("enqueue", preset_order if enqueue is None else enqueue, ("before", "after"))
        self.distance = one_of("distance", distance, ("cross_entropy", "kl"))
        self.projection_kind = one_of("teacher_projection", teacher_projection, ("random", "orthogonal", "identity"))
        one_of("dtype", dtype, ("float32", "bfloat16"))
        self.start = one_of("start", start, ("filled", "noise"))
        self.size, self.dtype, self.chunk, self.seed = size, dtype, chunk, seed
        self._diagnostics: dict[str, Tensor] = {}

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the projections and the queue."""
        if self.projection_kind == "identity":
            (self.width,) = teacher["embedding"]
        super().build(student, teacher)
        self.queue = EmbeddingQueue(self.size, self.width, self.dtype)
        if self.start == "noise":
            generator = torch.Generator().manual_seed(derive_seed("noise", self.seed))
            noise = torch.randn(self.size, self.width, generator=generator, device="cpu")
            self.queue.rows.copy_(F.normalize(noise, dim=0))

    def make_teacher_projection(self, teacher_width: int) -> nn.Module:
        """Return the projection that `teacher_projection` names; none of them is trained."""
        if self.projection_kind == "identity":
            return L2Normalize()
        with seeded_by("projection"):  # so that it is the same in every run, and can be stored
            projection = NormalizedLinear(teacher_width, self.width).requires_grad_(False)
            if self.projection_kind == "orthogonal":
                nn.init.orthogonal_(projection.weight)
                nn.init.zeros_(projection.bias)
        return projection

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        """Return the projected and normalized embedding as `projected`, `[B, d]`.

        The projection computes in float64, so that its rounded rows do not depend on the size of the batch.
        """
        embedding = teacher["embedding"]
        wide = embedding if embedding.device.type == "mps" else embedding.double()  # which has no float64
        return Summary(maps={"projected": self.teacher_projection(wide).to(embedding.dtype)})

    def summary_key(self) -> Mapping[str, Any]:
        """Return the settings of the teacher's projection."""
        return {"projection": self.projection_kind, "width": self.width}

    def summary_state(self) -> Mapping[str, Tensor]:
        """Return the teacher's projection."""
        return dict(self.teacher_projection.named_parameters())

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare embeddings, `[B, d_s]` of the student and the teacher's projected ones, by their similarities."""
        queries = self.student_projection(student["embedding"])
        keys = teacher["projected"]
        global_keys = gather(keys)
        if self.training and self.enqueue == "before":
            self.queue.enqueue(global_keys)
        relation = memory_relation(
            queries, keys, self.queue.rows, *self._temperatures(), filled=self._scored(), chunk=self.chunk
        )
        self._diagnostics = {
            "teacher_entropy": relation.teacher_entropy.mean(),
            "student_entropy": relation.student_entropy.mean(),
            "filled": self.filled(),
        }
        if self.training and self.enqueue == "after":
            self.queue.enqueue(global_keys)
        loss = relation.cross_entropy
        return (loss - relation.teacher_entropy if self.distance == "kl" else loss).mean()

    def filled(self) -> Tensor:
        """Return the filled share of the queue."""
        return self.queue.filled / self.size

    def diagnostics(self) -> dict[str, Tensor]:
        """Return the mean entropy of both distributions (at most log K) and the filled share of the queue."""
        return self._diagnostics

    @torch.no_grad()
    def similarities(self, student: Features, teacher: Features) -> tuple[Tensor, Tensor]:
        """Return both distributions over the queue, the student's and the teacher's, `[B, K]` each.

        Rows that are not scored have probability 0. The queue does not change.
        """
        projected = self.student_projection(student["embedding"]), self.summary(teacher, {})["projected"]
        empty = torch.arange(self.size, device=projected[0].device) >= self._scored()
        distributions = [
            (query @ self.queue.rows.T.to(query.dtype) / temperature)
            .masked_fill(empty, float("-inf"))
            .softmax(dim=1)
            .masked_fill(empty, 0.0)
            for query, temperature in zip(projected, self._temperatures(), strict=True)
        ]
        return distributions[0], distributions[1]

    def plot(
        self, student: Features, teacher: Features, batch: Batch, images: int = 4, rows: int = 50
    ) -> Figure | None:
        """Draw both distributions of the first images over the rows that the teacher finds most similar.

        A queue without rows to score gives no figure.

        Args:
            student: the student's features.
            teacher: the teacher's features.
            batch: the batch of both.
            images: number of images, one plot each.
            rows: number of the queue's rows per image.
        """
        from distill.plotting.distributions import draw_distributions

        if self._scored() == 0:
            return None
        student_shares, teacher_shares = (part[:images] for part in self.similarities(student, teacher))
        return draw_distributions(student_shares, teacher_shares, rows)

    def _scored(self) -> Tensor | int:
        """Return the number of leading rows of the queue that are scored."""
        return self.size if self.start == "noise" else self.queue.filled

    def _temperatures(self) -> tuple[float, float]:
        return value_at(self.student_temperature, self.progress), value_at(self.teacher_temperature, self.progress)
