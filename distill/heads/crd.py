"""Contrastive representation distillation (Tian, Krishnan, Isola, 2020), with a bank of all samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.distributed import all_mean, gather
from distill.errors import UserError, one_of, require_at_least, require_between
from distill.features import Features, FeatureSpec
from distill.functional.chunks import rows_per_chunk
from distill.functional.contrast import noise_contrast
from distill.functional.labels import hard_labels
from distill.heads.base import Batch, RunInfo, Scope
from distill.heads.parts.embedding_head import EmbeddingHead
from distill.memory import SampleBank, with_gradient_now
from distill.randomness import random_bits
from distill.schedules import Number, require_values_above, value_at

DENSE = 32
"""Rows of the bank per drawn row up to which it is faster to score all of them: one product instead of many reads."""


class CRD(EmbeddingHead):
    """Noise-contrastive estimation between each image's embedding and a bank of the other network's embeddings.

    Student embeddings are compared with a bank of teacher embeddings and teacher embeddings with a bank of student
    embeddings; the loss is the sum of both, mean over the images. Both projections are learned.

    Each image's negatives are drawn with replacement from (seed, call, sample index), so they depend neither on the
    number of ranks nor on global random state. Negatives of the image's own class are left out, and the weights of the
    others are raised to make up for them. The bank learns classes during training: in the first epoch, a sample that
    has not occurred yet counts as one of another class. Without labels, all other samples are negatives. (The public
    code knows all labels from the start, and draws exactly K samples of other classes without replacement; with
    `positives="class"`, called `relax` there, it draws the positive from the whole class.)

    The bank takes `samples` x `width` x 2 numbers. It is updated once per batch, with the batches of all ranks, and in
    training only. A step scores all rows, `[B, samples]`, and picks the drawn ones, which is faster, up to `samples` =
    32 (1 + `negatives`); beyond, it scores the drawn rows only, those of a few images at a time, and its cost does not
    depend on `samples`.

    Args:
        samples: n, the size of the training set; each `index` must be below it. 50,000 as in CIFAR-100.
        negatives: K, how many are drawn per image; 16,384 as in the CRD benchmark.
        width: d of the projections; 128 likewise.
        temperature: T, a number or a schedule; 0.07 likewise.
        momentum: the weight of the old embedding when a row of the bank is updated; 0.5 likewise.
        positives: `exact` takes the image itself as its positive, `class` a random image of its class (among those
            drawn; itself if there is none).
        seed: of the draws.
        bank_device: `cpu` keeps the bank in the host's memory, for a bank that does not fit beside the networks, and
            sends the device the rows that a step scores; each step then waits for the device once. By default it is on
            the device. The values are the same.

    Raises:
        UserError: an argument out of its range.
    """

    scope: Scope = "memory"
    memory_names: ClassVar = {"bank.student": "the bank (samples x width)"}
    bank: SampleBank
    normalizer: Tensor
    calls: Tensor

    def __init__(
        self,
        samples: int = 50_000,
        negatives: int = 16384,
        width: int = 128,
        temperature: Number = 0.07,
        momentum: float = 0.5,
        positives: Literal["exact", "class"] = "exact",
        seed: int = 0,
        bank_device: Literal["cpu"] | None = None,
    ) -> None:
        super().__init__(width)
        require_at_least(2, samples=samples)
        require_at_least(1, negatives=negatives)
        require_between(0, 1, momentum=momentum)
        require_values_above(0, temperature=temperature)
        self.samples, self.negatives, self.momentum, self.temperature = samples, negatives, momentum, temperature
        self.positives = one_of("positives", positives, ("exact", "class"))
        self.batch_needs = frozenset({"index"} if positives == "exact" else {"index", "label"})
        self.seed = seed
        if bank_device is not None:
            one_of("bank_device", bank_device, ("cpu",))
        self.bank_device = bank_device
        self._normalized = -1  # the normalizer's version when it was last seen to be set: no call need ask the device

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the projections and the bank."""
        super().build(student, teacher)
        self.bank = SampleBank(self.samples, self.width, self.momentum, self.bank_device)
        self.register_buffer("normalizer", torch.zeros(2))  # 0 until the first call sets it
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def prepare(self, run: RunInfo) -> None:
        """Check the bank's size against the number of training images.

        Raises:
            UserError: they differ.
        """
        if run.samples is not None and run.samples != self.samples:
            raise UserError(
                f"CRD has samples {self.samples}, but the training set has {run.samples}: give samples {run.samples}"
            )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Contrast embeddings `[B, d_s]` and `[B, d_t]` with the bank, given `index` `[B]` and labels, if any."""
        queries = self.student_projection(student["embedding"]), self.teacher_projection(teacher["embedding"])
        index = batch["index"]
        label = hard_labels(batch["label"]) if "label" in batch else torch.full_like(index, -1)
        rows, weight = self.draw(index, label)
        places = rows if self._scores_all else self.bank.places(rows)
        temperature = value_at(self.temperature, self.progress)

        def score(part: slice, *queries: Tensor) -> list[Tensor]:
            sides: tuple[Literal["teacher", "student"], ...] = ("teacher", "student")  # each network against the other
            return [
                self._scores(query, side, rows[part], places[part]) / temperature
                for query, side in zip(queries, sides, strict=True)
            ]

        parts = self._parts(len(index), index.device)
        normalizers = self._normalizers(score, queries, parts)

        def contrast(part: slice, *queries: Tensor) -> Tensor:
            losses = [
                noise_contrast(scores, normalizer, self.samples, weight[part].to(scores.dtype))
                for scores, normalizer in zip(score(part, *queries), normalizers, strict=True)
            ]
            return torch.stack(losses).sum() / len(index)

        loss = with_gradient_now(contrast, *queries, parts=parts)
        if self.training:
            fresh = (gather(tensor.detach()) for tensor in (index, *queries, label))
            self.bank.update(*fresh)
            self.calls += 1
        return loss

    def filled(self) -> Tensor:
        """Return the share of the samples that have occurred; the rows of the others are random."""
        return self.bank.filled / self.samples

    def draw(self, index: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the positive and the negatives of each image.

        Args:
            index: int64 `[B]`.
            label: int64 `[B]`, -1 if unknown.

        Returns:
            Rows of the bank, `[B, 1 + K]`, the positive first, and the weights of the negatives, `[B, K]`.
        """
        itself = index.unsqueeze(1)
        drawn = random_bits(index, self.negatives, self.seed, self.calls) % (self.samples - 1)
        drawn = drawn + (drawn >= itself)  # any other sample
        same_class = (self.bank.label[drawn] == label.unsqueeze(1)) & (label >= 0).unsqueeze(1)
        positive = itself
        if self.positives == "class":
            first = same_class.to(torch.uint8).argmax(dim=1, keepdim=True)
            positive = torch.where(same_class.gather(1, first), drawn.gather(1, first), itself)
        others = (~same_class).sum(dim=1, keepdim=True).clamp_min(1)
        weight = self.negatives / others.float()  # not in torch's default type, which may be bfloat16
        return torch.cat([positive, drawn], dim=1), weight.masked_fill(same_class, 0.0)

    @property
    def _scores_all(self) -> bool:
        return self.samples <= DENSE * (1 + self.negatives)

    def _parts(self, images: int, device: torch.device) -> list[slice]:
        """Return the images that are scored at a time."""
        size = images if self._scores_all else rows_per_chunk((1 + self.negatives) * self.width, device)
        return [slice(first, first + size) for first in range(0, images, size)]

    def _scores(self, query: Tensor, side: Literal["student", "teacher"], rows: Tensor, places: Tensor) -> Tensor:
        """Return the products of queries `[c, d]` with their drawn rows, `[c, 1 + K]`."""
        if self._scores_all:
            bank: Tensor = getattr(self.bank, side)
            return (query @ bank.to(query).T).gather(1, rows)
        drawn = self.bank.rows(side, places, query.device).to(query.dtype)
        return (drawn @ query.unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def _normalizers(
        self, score: Callable[..., list[Tensor]], queries: Sequence[Tensor], parts: Sequence[slice]
    ) -> Tensor:
        """Return Z per direction, `[2]`: n times the mean exponential of the very first call, over all ranks."""
        if self._normalized == self.normalizer._version:  # not written to since
            return self.normalizer
        sums = [
            torch.stack([scores.exp().sum() for scores in score(part, *(query[part] for query in queries))])
            for part in parts
        ]
        first = torch.stack(sums).sum(dim=0) / (len(queries[0]) * (1 + self.negatives))
        first = all_mean(first) * self.samples
        normalizer = torch.where(self.normalizer == 0, first.to(self.normalizer.dtype), self.normalizer)
        if self.training:
            self.normalizer.copy_(normalizer)
            self._normalized = self.normalizer._version
        return normalizer
