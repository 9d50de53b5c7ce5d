"""In which order samples come, so that it depends on nothing but seed and epoch, and can be taken up in the middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from distill.randomness import derive_seed

SampleKey = tuple[int, int]
"""Draw and index: what a training sample's augmentation depends on, besides the seed. A draw is an epoch, or one of the
repetitions in it; no two places of a run are equal."""


class ShuffledSampler(DistributedSampler[SampleKey]):
    """Deals the samples of an epoch to the ranks in an order that depends on seed and epoch alone.

    The k-th global batch holds the same samples on any number of ranks. What is left over at the end is dropped.

    Args:
        samples: the data set.
        num_replicas: number of ranks.
        rank: this one.
        seed: of the order.
        repetitions: how often a sample comes in an epoch, each time augmented anew, one right after the other (repeated
            augmentation, dealt by timm's sampler). The epoch keeps its length, so it holds fewer samples.
        balanced: the samples' labels, if every class is to come equally often (to one sample), and within a class every
            sample; a label below 0 is of no class. The epoch keeps its length.
    """

    def __init__(
        self,
        samples: Sized,
        num_replicas: int,
        rank: int,
        seed: int,
        repetitions: int = 1,
        balanced: Sequence[int] | None = None,
    ) -> None:
        super().__init__(cast(Dataset[SampleKey], samples), num_replicas, rank, seed=seed, drop_last=True)
        self.repetitions = repetitions
        self.classes: list[Tensor] = []
        if balanced is not None:
            labels = torch.tensor(balanced)
            self.classes = [(labels == label).nonzero().flatten() for label in sorted(set(balanced)) if label >= 0]
        self.start = 0  # of the samples of this rank, how many to pass over in the next epoch

    def __iter__(self) -> Iterator[SampleKey]:
        seed = derive_seed("order", self.seed, self.epoch)
        if self.classes:
            mine = self._balanced(seed)
        else:
            mine = self._once(seed) if self.repetitions == 1 else self._repeated(seed)
        start, self.start = self.start, 0
        return iter(mine[start : self.num_samples])

    def _once(self, seed: int) -> list[SampleKey]:
        order = torch.randperm(len(cast(Sized, self.dataset)), generator=torch.Generator().manual_seed(seed)).tolist()
        return [(self.epoch, index) for index in order[: self.total_size][self.rank :: self.num_replicas]]

    def _repeated(self, seed: int) -> list[SampleKey]:
        from timm.data.distributed_sampler import RepeatAugSampler

        dealer: Any = cast(Any, RepeatAugSampler)(  # timm's has no types
            self.dataset, self.num_replicas, self.rank, num_repeats=self.repetitions, selected_round=0
        )
        dealer.set_epoch(seed)  # nothing but the seed of its order
        first = self.epoch * self.repetitions
        return [
            (first + (self.rank + place * self.num_replicas) % self.repetitions, index)
            for place, index in enumerate(dealer)
        ]

    def _balanced(self, seed: int) -> list[SampleKey]:
        """Rounds of all classes, and for each class rounds of all its samples, each round shuffled."""
        generator = torch.Generator().manual_seed(seed)

        def rounds(count: int, length: int) -> Tensor:
            return torch.rand(ceil(length / count), count, generator=generator).argsort(dim=1).flatten()[:length]

        length = len(cast(Sized, self.dataset))
        classes = rounds(len(self.classes), length)
        index, turn = torch.empty(2, length, dtype=torch.long)
        for number, samples in enumerate(self.classes):
            places = (classes == number).nonzero().flatten()
            index[places] = samples[rounds(len(samples), len(places))]
            turn[places] = torch.arange(len(places)) // len(samples)
        # of an epoch's draws of one sample, no more than the smallest class needs
        turns = ceil(ceil(length / len(self.classes)) / min(map(len, self.classes)))
        order = list(zip((self.epoch * turns + turn).tolist(), index.tolist(), strict=True))
        return order[: self.total_size][self.rank :: self.num_replicas]


class MarkedSampler(DistributedSampler[int]):
    """Deals the samples to the ranks in order; positions that only fill up lie past the end of the set.

    `ImageDataset` marks those with `index` -1, and no metric counts them.
    """

    def __init__(self, samples: Sized, num_replicas: int, rank: int) -> None:
        super().__init__(cast(Dataset[int], samples), num_replicas, rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


class ResumableLoader(DataLoader[Any]):
    """A loader over a `ShuffledSampler` that goes on after the batch at which its state was saved.

    The data module keeps its state. (Lightning would, but loads it too late where the length of the run is asked for
    before, as every schedule over the whole run does.)
    """

    sampler: ShuffledSampler

    def __init__(self, samples: Dataset[Any], **kwargs: Any) -> None:
        super().__init__(samples, **kwargs)
        self.given = 0
        self._resumed: dict[str, int] = {}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator: Lightning tells the epoch after iter()
        resumed, self._resumed = self._resumed, {}
        self.given = resumed["batches"] if resumed.get("epoch") == self.sampler.epoch else 0
        self.sampler.start = self.given * (self.batch_size or 1)
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were given out."""
        return {"epoch": self.sampler.epoch, "batches": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there, if the next epoch that is asked for is that one."""
        self._resumed = state
