"""Random numbers that depend on their keys and on nothing else: no state, the same on every rank and device."""

from __future__ import annotations

import torch
from torch import Tensor

# The constants of SplitMix64 (Steele, Lea, Flood, 2014) as signed integers; int64 arithmetic wraps around.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


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
