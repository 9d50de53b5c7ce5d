from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.distributed import gather, own_rows
from distill.heads.parts.adapters import CastConv2d, GlobalBatchNorm2d
from tests.golden import Q
from tests.two_ranks import RankPool


def drawn(width: int) -> GlobalBatchNorm2d:
    norm = GlobalBatchNorm2d(width).double()
    norm.load_state_dict({"weight": Q([width, 1, 1], 5), "bias": Q([width, 1, 1], 6)})
    return norm


def test_batch_norm_is_torchs_in_training() -> None:
    x, expected = Q([4, 3, 5, 5], 1).requires_grad_(), nn.BatchNorm2d(3).double()
    expected.load_state_dict({"weight": Q([3], 5), "bias": Q([3], 6)}, strict=False)
    results = []
    for norm in (drawn(3), expected):
        result = norm(x)
        results.append((result, *torch.autograd.grad(result.square().sum(), (x, *norm.parameters()))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.flatten(), theirs.flatten())


def half(x: Tensor) -> tuple[Tensor, Tensor]:
    own = own_rows(x).clone().requires_grad_()
    result = drawn(3)(own)
    (gradient,) = torch.autograd.grad(result.pow(3).sum(), own)
    return gather(result.detach()), gather(gradient)


def test_batch_norm_over_two_ranks_is_that_of_the_whole_batch(pool: RankPool) -> None:
    x = Q([4, 3, 5, 5], 1).requires_grad_()
    expected = drawn(3)(x)
    (gradient,) = torch.autograd.grad(expected.pow(3).sum(), x)
    for result, found in pool.run(half, x.detach()):
        torch.testing.assert_close(result, expected.detach())
        torch.testing.assert_close(found, gradient)


def test_a_channel_without_variance_becomes_the_bias() -> None:
    x = torch.full((2, 3, 1, 1), 7.0, requires_grad=True)
    norm = GlobalBatchNorm2d(3)
    nn.init.constant_(norm.bias, 0.5)
    result = norm(x)
    (gradient,) = torch.autograd.grad(result.square().sum(), x)
    assert result.flatten().tolist() == [0.5] * 6
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_torchs_and_keeps_the_grid(side: int, bias: bool) -> None:
    ours = CastConv2d(3, 4, side, bias=bias)
    theirs = nn.Conv2d(3, 4, side, padding="same", bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = Q([2, 3, 5, 6], 1).float()
    torch.testing.assert_close(ours(x), theirs(x))
