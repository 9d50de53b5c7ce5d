from __future__ import annotations

import torch

from distill.randomness import random_bits


def literal(index: int, place: int, *keys: int) -> int:
    """SplitMix64 in Python's own integers."""
    whole = 2**64

    def mixed(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % whole
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % whole
        return state ^ (state >> 31)

    state = 0
    for key in (*keys, index):
        state = mixed(((state ^ key) + 0x9E3779B97F4A7C15) % whole)
    return mixed((state + (place + 1) * 0x9E3779B97F4A7C15) % whole) % 2**63


def test_bits_are_those_of_splitmix_without_overflow() -> None:
    index = torch.tensor([0, 7, 49_999])
    bits = random_bits(index, 4, 3, torch.tensor(11))
    assert bits.tolist() == [[literal(i, place, 3, 11) for place in range(4)] for i in index.tolist()]


def test_bits_of_a_sample_depend_on_no_other_sample_and_on_no_global_state() -> None:
    index = torch.arange(20)
    state = torch.get_rng_state()
    whole = random_bits(index, 5, 1, 2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(random_bits(index[order], 5, 1, 2), whole[order])
    assert torch.equal(torch.get_rng_state(), state)


def test_every_key_changes_them() -> None:
    index = torch.arange(50)
    found = [random_bits(index, 20, seed, step) for seed in range(5) for step in range(5)]
    assert torch.stack(found).unique().numel() == 5 * 5 * 50 * 20


def test_remainders_are_spread_evenly() -> None:
    counts = (random_bits(torch.arange(500), 200, 0, 0) % 10).flatten().bincount(minlength=10).double()
    chi_squared = ((counts - 10_000).square() / 10_000).sum().item()
    assert chi_squared < 27.9  # 9 degrees of freedom: one in a thousand lies beyond
