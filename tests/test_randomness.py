"""Draws that depend only on a key, and the global random states."""

import random

import numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.randomness import get_states, random_bits, seeded_by, set_states


def draw():
    return random.random(), float(numpy.random.rand()), float(torch.rand(())), int(torch.randint(10**9, ()))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(0, 2**31))
def test_a_keyed_draw_depends_on_its_key_alone_and_leaves_no_trace(seed, epoch, noise):
    torch.manual_seed(noise)
    before = get_states()
    with seeded_by(seed, epoch):
        first = draw()
    outside = draw()
    set_states(before)
    assert outside == draw(), "the draw within moved the global states"
    torch.manual_seed(noise + 1)
    with seeded_by(seed, epoch):
        assert draw() == first
    with seeded_by(seed, epoch + 1):
        assert draw() != first


def literal(index: int, position: int, *keys: int) -> int:
    """SplitMix64 in Python's own integers."""
    modulus = 2**64

    def mixed(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % modulus
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % modulus
        return state ^ (state >> 31)

    state = 0
    for key in (*keys, index):
        state = mixed(((state ^ key) + 0x9E3779B97F4A7C15) % modulus)
    return mixed((state + (position + 1) * 0x9E3779B97F4A7C15) % modulus) % 2**63


def test_bits_are_those_of_splitmix_without_overflow() -> None:
    index = torch.tensor([0, 7, 49_999])
    bits = random_bits(index, 4, 3, torch.tensor(11))
    assert bits.tolist() == [[literal(i, position, 3, 11) for position in range(4)] for i in index.tolist()]


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
