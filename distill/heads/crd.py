"""Contrastive representation distillation (Tian, Krishnan, Isola, 2020), against a bank of all samples."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.distributed import all_sum, gather, world_size
from distill.errors import UserError, one_of
from distill.features import Features, FeatureSpec
from distill.functional.contrast import noise_contrast
from distill.heads.base import Batch, Head, RunInfo, Scope, positive
from distill.heads.parts.projection import NormalizedLinear
from distill.memory import SampleBank, refuse_other_shapes, with_gradient_now
from distill.randomness import random_bits
from distill.schedules import Number, value_at


class CRD(Head):
    """Tells an image's embedding in the other network from those of many other images, in both directions.

    Student embeddings are held against a bank of teacher embeddings, and the other way round, by noise-contrastive
    estimation; the loss is the sum of both, mean over the images. Both projections are learned.

    Each image's negatives are drawn with replacement from (seed, call, sample index), so they depend neither on the
    number of ranks nor on global random state. Those of the image's own class are left out and the others weighted up
    to as many. Classes are learned as samples come by: in the first epoch a sample not yet seen passes for one of
    another class. Without labels all other samples are negatives.

    The bank takes `samples` x `width` x 2 numbers, and a step `[B, samples]` besides. It moves once a batch, with the
    batches of all ranks, and in training only.

    Args:
        samples: n, how many samples the training set has; each `index` must be below it. 50,000 as in CIFAR-100.
        negatives: K, how many are drawn for each image; 16,384 as in the CRD benchmark.
        width: d of the projections.
        temperature: T, a number or a schedule.
        momentum: the share of the old embedding when a place in the bank moves.
        positives: `exact` holds an image against itself, `class` against a random one of its class (among those
            drawn, itself if there is none).
        seed: of the draws.

    Raises:
        UserError: an argument out of its range.
    """

    needs = frozenset({"embedding"})
    scope: Scope = "memory"
    student_projection: nn.Module
    teacher_projection: nn.Module
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
    ) -> None:
        super().__init__()
        for name, given, least in (("samples", samples, 2), ("negatives", negatives, 1), ("width", width, 1)):
            if given < least:
                raise UserError(f"{name} must be at least {least}, given {given}")
        if not 0 <= momentum <= 1:
            raise UserError(f"momentum must be between 0 and 1, given {momentum}")
        self.samples, self.negatives, self.width, self.momentum = samples, negatives, width, momentum
        self.temperature = positive("temperature", temperature)
        self.positives = one_of("positives", positives, ("exact", "class"))
        self.seed = seed

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Make the projections and the bank."""
        (student_width,), (teacher_width,) = student["embedding"], teacher["embedding"]
        self.student_projection = NormalizedLinear(student_width, self.width)
        self.teacher_projection = NormalizedLinear(teacher_width, self.width)
        self.bank = SampleBank(self.samples, self.width, self.momentum)
        self.register_buffer("normalizer", torch.zeros(2))  # 0 until the first call sets it
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def prepare(self, run: RunInfo) -> None:
        """Check the bank against the number of training images.

        Raises:
            UserError: they differ.
        """
        if run.samples is not None and run.samples != self.samples:
            raise UserError(
                f"CRD has samples {self.samples}, but the training set has {run.samples}: give samples {run.samples}"
            )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Contrast embeddings `[B, d_s]` and `[B, d_t]` with the bank, given `index` `[B]` and labels."""
        queries = self.student_projection(student["embedding"]), self.teacher_projection(teacher["embedding"])
        index, label = batch["index"], _hard(batch["label"])
        places, weight = self.draw(index, label)
        temperature = value_at(self.temperature, self.progress)

        def contrast(*queries: Tensor) -> Tensor:
            banks = self.bank.teacher, self.bank.student  # each network against the other
            logits = [
                (query @ bank.T.to(query.dtype)).gather(1, places) / temperature
                for query, bank in zip(queries, banks, strict=True)
            ]
            normalizer = self._normalizer(logits)
            losses = [
                noise_contrast(scores, one, self.samples, weight.to(scores.dtype))
                for scores, one in zip(logits, normalizer, strict=True)
            ]
            return torch.stack(losses).sum(dim=0).mean()

        loss = with_gradient_now(contrast, *queries)
        if self.training:
            fresh = (gather(tensor.detach()) for tensor in (index, *queries, label))
            self.bank.update(*fresh)
            self.calls += 1
        return loss

    def draw(self, index: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Whom to hold each image against.

        Args:
            index: int64 `[B]`.
            label: int64 `[B]`, -1 where unknown.

        Returns:
            Places in the bank, `[B, 1 + K]`, the positive first, and what each of the negatives counts, `[B, K]`.
        """
        own = index.unsqueeze(1)
        drawn = random_bits(index, self.negatives, self.seed, self.calls) % (self.samples - 1)
        drawn = drawn + (drawn >= own)  # any but the own one
        alike = (self.bank.label[drawn] == label.unsqueeze(1)) & (label >= 0).unsqueeze(1)
        chosen = own
        if self.positives == "class":
            first = alike.to(torch.uint8).argmax(dim=1, keepdim=True)
            chosen = torch.where(alike.gather(1, first), drawn.gather(1, first), own)
        weight = self.negatives / (~alike).sum(dim=1, keepdim=True).clamp_min(1)
        return torch.cat([chosen, drawn], dim=1), weight.masked_fill(alike, 0.0)

    def _normalizer(self, logits: list[Tensor]) -> Tensor:
        """Z for each direction: n times the mean exponential of the first call ever, over all ranks."""
        first = torch.stack([scores.detach().exp().mean() for scores in logits])
        first = all_sum(first) / world_size() * self.samples
        normalizer = torch.where(self.normalizer == 0, first.to(self.normalizer.dtype), self.normalizer)
        if self.training:
            self.normalizer.copy_(normalizer)
        return normalizer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = {
            "bank.student": "the bank (samples x width)",
            "teacher_projection.weight": "the teacher's projection (width x teacher's embedding)",
            "student_projection.weight": "the student's projection (width x student's embedding)",
        }
        refuse_other_shapes(self, state_dict, prefix, names)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _hard(label: Tensor) -> Tensor:
    """The largest class of soft labels `[B, C]`, -1 where there is none."""
    if label.ndim == 1:
        return label
    return label.argmax(dim=1).masked_fill(label.sum(dim=1) <= 0, -1)
