"""What all tests share: one thread a process, devices, and two processes that train together."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: the tests themselves run side by side
os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is loaded: no request may leave, nor wait for an answer

from collections.abc import Iterator

import pytest
import torch

from tests.two_ranks import RankPool

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each device in turn: the CPU, and for `-m cuda` a CUDA device, with exact float32."""
    yield from _given(torch.device(request.param))


@pytest.fixture(params=[CUDA])
def cuda(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A CUDA device, for a test that means nothing elsewhere."""
    yield from _given(torch.device(request.param))


@pytest.fixture(scope="session", params=[CUDA])
def cuda_pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """Two processes that talk through NCCL, each on its own CUDA device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    ranks = RankPool(backend="nccl")
    yield ranks
    ranks.close()


def _given(device: torch.device) -> Iterator[torch.device]:
    if device.type != "cuda":
        yield device
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield device
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Two gloo processes; `pool.run(function, *args)` gives the results of both."""
    ranks = RankPool()
    yield ranks
    ranks.close()
