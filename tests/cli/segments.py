"""A user's head that reads segments."""

from torch import Tensor

from distill.features import Features
from distill.heads import Batch, Head


class Segmented(Head):
    batch_needs = frozenset({"segments"})

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return student["logits"].mean() * batch["segments"].float().mean()
