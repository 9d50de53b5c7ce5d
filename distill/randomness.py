"""Random draws that depend on a key alone, and the global random states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, cast

import numpy
import torch


@contextmanager
def keyed(*key: object) -> Iterator[None]:
    """Within it, Python, NumPy and torch (on the CPU) draw what `key` alone determines; then all is as before.

    Args:
        key: numbers and words, such as seed, epoch and sample index.
    """
    before = get_states(devices=False)
    seed = seed_of(*key)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        set_states(before)


def seed_of(*key: object) -> int:
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
