"""What all tests share: one thread a process, and two processes that train together."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: the tests themselves run side by side
os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is loaded: no request may leave, nor wait for an answer

from collections.abc import Iterator

import pytest

from tests.two_ranks import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Two gloo processes; `pool.run(function, *args)` gives the results of both."""
    ranks = RankPool()
    yield ranks
    ranks.close()
