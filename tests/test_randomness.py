import random

import numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.randomness import get_states, seeded_by, set_states


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
