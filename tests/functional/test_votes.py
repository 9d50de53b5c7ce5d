"""The vote of nearest neighbors, held to a literal count."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.functional import neighbor_votes


def literally(query, memory, labels, num_classes, neighbors, temperature):
    cosines = [float(query @ row / (query.norm() * row.norm())) for row in memory]
    nearest = sorted(range(len(memory)), key=lambda place: -cosines[place])[:neighbors]
    votes = [0.0] * num_classes
    for place in nearest:
        votes[int(labels[place])] += math.exp(cosines[place] / temperature)
    return [vote / sum(votes) for vote in votes]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    neighbors=st.integers(1, 12),
    temperature=st.floats(0.05, 2.0),
    chunk=st.sampled_from([None, 1, 2, 100]),
)
def test_votes_are_those_of_the_definition(seed, neighbors, temperature, chunk):
    generator = torch.Generator().manual_seed(seed)
    queries, memory = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (3, 12))
    labels = torch.randint(4, (12,), generator=generator)
    votes = neighbor_votes(queries, memory, labels, 4, neighbors, temperature, chunk)
    expected = [literally(query, memory, labels, 4, neighbors, temperature) for query in queries]
    torch.testing.assert_close(votes, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_one_near_neighbor_outvotes_two_far_ones_unless_the_temperature_is_high():
    memory = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[2.0, 1.0]])
    assert neighbor_votes(query, memory, labels, 2, neighbors=3, temperature=0.07).argmax() == 0
    assert neighbor_votes(query, memory, labels, 2, neighbors=3, temperature=10.0).argmax() == 1


def test_lengths_do_not_count_and_a_tiny_temperature_does_not_overflow():
    memory = torch.tensor([[1.0, 0.0], [0.0, 1000.0], [0.0, 0.0]])
    votes = neighbor_votes(torch.tensor([[10.0, 1.0]]), memory, torch.tensor([0, 1, 1]), 2, 3, temperature=1e-4)
    torch.testing.assert_close(votes, torch.tensor([[1.0, 0.0]]))
