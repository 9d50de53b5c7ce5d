"""Random draws determined by a key, and the global random states."""

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
    """Seed Python, NumPy and torch (on the CPU) by `key` within the context, and restore their states afterwards.

    Args:
        key: numbers and strings, such as seed, epoch and sample index.
    """
    with unchanged_states():
        seed_states(*key)
        yield


def seed_states(*key: object) -> None:
    """Seed Python, NumPy and torch (on the CPU) by `key`.

    Args:
        key: as for `seeded_by`, which also restores the states: that takes ten times as long.
    """
    seed = derive_seed(*key)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def unchanged_states() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch (on the CPU) after the context."""
    of_python, of_numpy, of_torch = random.getstate(), numpy.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)
        torch.default_generator.set_state(of_torch)


def derive_seed(*key: object) -> int:
    """Return a seed of 63 bits that depends only on `key`, the same on any machine."""
    return int.from_bytes(sha256(repr(key).encode()).digest()[:8], "big") >> 1


def get_states() -> dict[str, Any]:
    """Return the global random states as plain data and tensors, with that of the process's CUDA device."""
    name, words, *rest = cast(tuple[Any, ...], numpy.random.get_state())
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(words.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_states(states: dict[str, Any]) -> None:
    """Restore the global random states that `get_states` returned, in this process or in another."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, numpy_words, *rest = states["numpy"]
    numpy.random.set_state((name, numpy_words.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def random_bits(index: Tensor, count: int, *keys: int | Tensor) -> Tensor:
    """Return random integers for each sample, a hash of (keys, index).

    `random_bits(index, K, seed, step) % n` are K draws from n with replacement; `random_bits(index, n, seed,
    step).topk(m, dim=-1).indices` are m draws without replacement.

    Args:
        index: int64 `[B]`, which identifies each sample.
        count: number of integers per sample.
        keys: further keys, such as a seed and a step: int64 scalars, Python numbers or tensors.

    Returns:
        int64 `[B, count]`, uniform in `[0, 2^63)`.
    """
    state = torch.zeros_like(index)
    for key in (*keys, index):
        state = _mixed((state ^ key) + _STEP)
    offsets = torch.arange(1, count + 1, device=index.device)
    return _mixed(state.unsqueeze(-1) + _STEP * offsets).bitwise_and(2**63 - 1)


def _mixed(state: Tensor) -> Tensor:
    for shift, factor in _MIX:
        state = (state ^ _shifted(state, shift)) * factor
    return state.bitwise_xor(_shifted(state, 31))


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Return `state` shifted to the right as an unsigned integer."""
    return (state >> bits).bitwise_and(2 ** (64 - bits) - 1)
