"""Shares of gradients and balanced factors on two ranks with the Trainer's DDP."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distill.callbacks import GradientShares
from distill.data import Digits
from distill.distributed import world_size
from tests.training.test_ddp import _set_up
from tests.two_ranks import RankPool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """A separate pool with a long timeout, since its first call loads Lightning and timm."""
    ranks = RankPool(timeout=240.0)
    yield ranks
    ranks.close()


def _measured(folder: Path, at: Any, **settings: Any) -> tuple[list[dict[str, Any]], float]:
    """Return the shares of each step, and the factor that balances RKD."""
    shares = GradientShares(every=1, at=at, balance={"rkd": 0.3})
    module, trainer = _set_up(folder, callbacks=[shares], gradient_clip_val=0.5, **settings)  # or it diverges
    trainer.fit(module, Digits(batch_size=16 // world_size()))
    return shares.state_dict()["history"], module.distiller.objective.factor("rkd")


@pytest.mark.parametrize(
    ("at", "settings"),
    [
        ("parameters", {}),
        ("embedding", {}),
        ("parameters", {"accumulate_grad_batches": 2}),
        ("parameters", {"static_graph": True}),
    ],
    ids=["parameters", "embedding", "accumulation", "static graph"],
)
def test_two_ranks_measure_and_balance_as_one_process(
    at: str, settings: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    expected, factor = _measured(tmp_path, at, **settings)
    first, second = pool.run(partial(_measured, tmp_path, at, **settings))
    assert repr(first) == repr(second), "to the last bit on both ranks"
    assert first[1] == pytest.approx(factor, rel=1e-9)
    assert factor != 1.0
    assert [row["step"] for row in first[0]] == [row["step"] for row in expected]
    for row, other in zip(first[0], expected, strict=True):
        for name in {*row, *other} - {"step"}:
            assert row[name] == pytest.approx(other[name], rel=1e-9, abs=1e-9, nan_ok=True)
