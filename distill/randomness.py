"""Random draws that depend on a key alone, and the global random states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, cast

import numpy
import torch
from torch import Tensor

# The constants of SplitMix64 (Steele, Lea, Flood, 2014) as signed integers; int64 arithmetic wraps around.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


@contextmanager
def seeded_by(*key: object) -> Iterator[None]:
    """Within it, Python, NumPy and torch (on the CPU) draw what `key` alone determines; then all is as before.

    Args:
        key: numbers and words, such as seed, epoch and sample index.
    """
    before = get_states(devices=False)
    seed = derive_seed(*key)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        set_states(before)


def derive_seed(*key: object) -> int:
    """A seed of 63 bits that depends on `key` alone, on any machine."""
    return int.from_bytes(sha256(repr(key).encode()).digest()[:8], "big") >> 1


def get_states(devices: bool = True) -> dict[str, Any]:
    """The global random states, as plain data and tensors; with those of the CUDA devices if there are any."""
    name, words, *rest = cast(tuple[Any, ...], numpy.random.get_state())
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(words.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
    }
    if devices and torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_states(states: dict[str, Any]) -> None:
    """Set what `get_states` gave."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, numpy_words, *rest = states["numpy"]
    numpy.random.set_state((name, numpy_words.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def random_bits(index: Tensor, count: int, *keys: int | Tensor) -> Tensor:
    """Random integers for each sample, drawn from (keys, index) by a hash.

    `random_bits(index, K, seed, step) % n` are K draws from n with replacement; `random_bits(index, n, seed,
    step).topk(m, dim=-1).indices` are m draws without.

    Args:
        index: int64 `[B]`, what tells one sample from another.
        count: how many numbers for each.
        keys: what else the numbers depend on: a seed, a step; int64 scalars, as tensors or not.

    Returns:
        int64 `[B, count]`, uniform in `[0, 2^63)`.
    """
    state = torch.zeros_like(index)
    for key in (*keys, index):
        state = _mixed((state ^ key) + _STEP)
    places = torch.arange(1, count + 1, device=index.device)
    return _mixed(state.unsqueeze(-1) + _STEP * places).bitwise_and(2**63 - 1)


def _mixed(state: Tensor) -> Tensor:
    for shift, factor in _MIX:
        state = (state ^ _shifted(state, shift)) * factor
    return state.bitwise_xor(_shifted(state, 31))


def _shifted(state: Tensor, places: int) -> Tensor:
    """`state` shifted to the right as if it had no sign."""
    return (state >> places).bitwise_and(2 ** (64 - places) - 1)
