"""Samplers whose order depends only on seed and epoch, and a loader that resumes in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from distill.randomness import derive_seed

SampleKey = tuple[int, int]
"""Draw and index, which with the seed determine a training sample's augmentation. A draw is an epoch or one of the
repetitions in it; without a number of fixed draws, each key occurs once in a run."""


class ShuffledSampler(DistributedSampler[SampleKey]):
    """Deal the samples of an epoch to the ranks in an order that depends only on seed and epoch.

    The k-th global batch has the same samples on any number of ranks. The remainder at the end is dropped.

    Args:
        samples: the data set.
        num_replicas: number of ranks.
        rank: of this process.
        seed: of the order.
        repetitions: how often each sample occurs in an epoch, augmented anew each time, in direct succession (repeated
            augmentation, dealt by timm's sampler). The length of the epoch does not change, so that it has fewer
            samples.
        balanced: the labels of the samples, to draw every class equally often (up to one sample), and within a class
            every sample; labels below 0 belong to no class. The length of the epoch does not change.
        draws: number of fixed draws of each sample, which later ones repeat in turn; `None`: all are new.

    Attributes:
        start: number of this rank's samples to skip in the next epoch.
    """

    def __init__(
        self,
        samples: Sized,
        num_replicas: int,
        rank: int,
        seed: int,
        repetitions: int = 1,
        balanced: Sequence[int] | None = None,
        draws: int | None = None,
    ) -> None:
        super().__init__(cast(Dataset[SampleKey], samples), num_replicas, rank, seed=seed, drop_last=True)
        self.repetitions = repetitions
        self.draws = draws
        self.classes: list[Tensor] = []
        if balanced is not None:
            labels = torch.tensor(balanced)
            self.classes = [(labels == label).nonzero().flatten() for label in sorted(set(balanced)) if label >= 0]
        self.start = 0

    @property
    def drawn_epoch(self) -> int:
        """The epoch whose order and draws come next."""
        return self.epoch

    def __iter__(self) -> Iterator[SampleKey]:
        seed = derive_seed("order", self.seed, self.drawn_epoch)
        if self.classes:
            keys = self._balanced(seed)
        else:
            keys = self._once(seed) if self.repetitions == 1 else self._repeated(seed)
        start, self.start = self.start, 0
        keys = keys[start : self.num_samples]
        return iter(keys if self.draws is None else [(draw % self.draws, index) for draw, index in keys])

    def _once(self, seed: int) -> list[SampleKey]:
        order = torch.randperm(len(cast(Sized, self.dataset)), generator=torch.Generator().manual_seed(seed)).tolist()
        return [(self.drawn_epoch, index) for index in order[: self.total_size][self.rank :: self.num_replicas]]

    def _repeated(self, seed: int) -> list[SampleKey]:
        from timm.data.distributed_sampler import RepeatAugSampler

        sampler: Any = cast(Any, RepeatAugSampler)(  # timm's has no types
            self.dataset, self.num_replicas, self.rank, num_repeats=self.repetitions, selected_round=0
        )
        sampler.set_epoch(seed)  # which it uses only to seed its order
        first = self.drawn_epoch * self.repetitions
        return [
            (first + (self.rank + position * self.num_replicas) % self.repetitions, index)
            for position, index in enumerate(sampler)
        ]

    def _balanced(self, seed: int) -> list[SampleKey]:
        """Return shuffled rounds of all classes, filled from shuffled rounds of all samples of each class."""
        generator = torch.Generator().manual_seed(seed)

        def rounds(count: int, length: int) -> Tensor:
            return torch.rand(ceil(length / count), count, generator=generator).argsort(dim=1).flatten()[:length]

        length = len(cast(Sized, self.dataset))
        classes = rounds(len(self.classes), length)
        index, draw = torch.empty(2, length, dtype=torch.long)
        for number, samples in enumerate(self.classes):
            positions = (classes == number).nonzero().flatten()
            index[positions] = samples[rounds(len(samples), len(positions))]
            draw[positions] = torch.arange(len(positions)) // len(samples)
        # draws per epoch: as many as the smallest class needs
        draws = ceil(ceil(length / len(self.classes)) / min(map(len, self.classes)))
        order = list(zip((self.drawn_epoch * draws + draw).tolist(), index.tolist(), strict=True))
        return order[: self.total_size][self.rank :: self.num_replicas]


class FixedSampler(ShuffledSampler, SequentialSampler):  # type: ignore[misc]  # whose indices are plain numbers
    """Deal the samples of the first epoch in every epoch, in the same order and with the same draws.

    It counts as a `SequentialSampler`, so that Lightning accepts it for `overfit_batches` instead of replacing it by
    the order of the files, whose first batches often hold a single class.
    """

    @property
    def drawn_epoch(self) -> int:
        """The first epoch."""
        return 0


class EvaluationSampler(DistributedSampler[int], SequentialSampler):
    """Deal the samples to the ranks in order; positions past the end of the set pad the ranks to equal length.

    `ImageDataset` returns these with `index` -1, and no metric counts them. It counts as a `SequentialSampler`, which
    it is on one rank, so that Lightning keeps it with `overfit_batches`.
    """

    def __init__(self, samples: Sized, num_replicas: int, rank: int) -> None:
        super().__init__(cast(Dataset[int], samples), num_replicas, rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


class ResumableLoader(DataLoader[Any]):
    """A loader over a `ShuffledSampler` that resumes after the batch at which its state was saved.

    The data module stores its state. (Lightning would store it too, but loads it too late if the length of the run is
    needed earlier, as by every schedule over the whole run.)

    Args:
        samples: the data set.
        mixed: whether each batch, a dict, gets a `mixing_seed`. It depends on the run's seed, the epoch and the number
            of the batch in it, and is thus the same on all ranks.
        kwargs: arguments of `DataLoader`.
    """

    sampler: ShuffledSampler

    def __init__(self, samples: Dataset[Any], mixed: bool = False, **kwargs: Any) -> None:
        super().__init__(samples, **kwargs)
        self.mixed = mixed
        self.batches = 0
        self._resume_state: dict[str, int] = {}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator, since Lightning sets the epoch after iter()
        state, self._resume_state = self._resume_state, {}
        self.batches = state["batches"] if state.get("epoch") == self.sampler.epoch else 0
        self.sampler.start = self.batches * (self.batch_size or 1)
        for batch in super().__iter__():
            if self.mixed:
                batch["mixing_seed"] = derive_seed("mixing", self.sampler.seed, self.sampler.drawn_epoch, self.batches)
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were loaded; before the first, the state to resume."""
        return self._resume_state or {"epoch": self.sampler.epoch, "batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume there if the next epoch is the stored one."""
        self._resume_state = state
