"""Two ranks in torch's DDP, dealt the samples in turn, end with the weights and memories of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.distributed import own_rows, world_size
from distill.features import Features, FeatureSpec
from distill.heads import CRD, RRD, Head
from tests.golden import Q
from tests.two_ranks import RankPool

BATCH, SAMPLES = 16, 100
HEADS: dict[str, Head] = {
    "scored after enqueuing": RRD(size=50, width=4),
    "scored before enqueuing": RRD(size=50, width=4, preset="2024"),
    "smaller than a batch": RRD(size=11, width=4),
    "bank": CRD(samples=SAMPLES, negatives=9, width=4),
}


class Student(nn.Module):
    """Linear embeddings with a head on them."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 5)
        self.head = head
        head.build(FeatureSpec(embedding=(5,)), FeatureSpec(embedding=(7,)))

    def forward(self, index: Tensor) -> Tensor:
        student = Features(embedding=self.embed(Q([SAMPLES, 6], 1)[index]))
        batch = {"index": index, "label": index % 3}
        loss: Tensor = self.head(student, Features(embedding=Q([SAMPLES, 7], 2)[index]), batch)
        return loss


def _trained(name: str, epochs: int) -> dict[str, Tensor]:
    """Return the state after epochs of 6 batches of 16 samples in float64, some of them twice in a batch."""
    torch.manual_seed(0)
    student = Student(HEADS[name]).double()
    wrapped: nn.Module = student
    if world_size() > 1:
        buffers = [buffer for buffer, _ in student.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(student, buffers)  # type: ignore[no-untyped-call]
        wrapped = DistributedDataParallel(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for epoch in range(epochs):
        order = torch.randint(SAMPLES, (6 * BATCH,), generator=torch.Generator().manual_seed(epoch))
        for index in own_rows(order).split(BATCH // world_size()):
            optimizer.zero_grad()
            wrapped(index).backward()
            optimizer.step()
    return student.state_dict()


@pytest.mark.parametrize("name", HEADS)
def test_memories_that_the_batch_does_not_divide_are_those_of_one_process_after_many_steps(
    name: str, pool: RankPool
) -> None:
    expected = _trained(name, 11)
    for state in pool.run(_trained, name, 11):
        torch.testing.assert_close(state, expected, rtol=1e-10, atol=1e-10)
