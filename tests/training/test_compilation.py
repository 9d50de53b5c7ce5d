"""Compiled networks and heads: one graph each, nothing compiled after the first epoch, and the values of eager code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from distill.heads import CRD, CTKD, FT, KD, RKD, RRD, SP, TRG
from distill.objective import Term
from distill.schedules import Linear
from distill.training.compilation import compile_parts
from tests.training.stored_runs import Pictures, fit, module


def heads() -> dict[str, Term]:
    return {
        "kd": Term(KD()),
        "rkd": Term(RKD(), weight=Linear(0.0, 1.0)),
        "cooling": Term(KD(Linear(4.0, 1.0))),
        "rrd": Term(RRD(size=20, width=8)),
    }


class Compilations(Callback):
    """Counts the graphs compiled by the end of each epoch, and the breaks."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("which", ["both", "all"])
def test_nothing_is_compiled_after_the_first_epoch(which: Any) -> None:
    eager = fit(module(heads), Pictures(images=28))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counted, model = Compilations(), module(heads)
    compile_parts(model.distiller, which, backend="eager")  # torch's tracing alone, which is what counts
    compiled = fit(model, Pictures(images=28), [counted])
    assert len(counted.graphs) == 3
    assert counted.graphs[0] == counted.graphs[-1] >= 4  # train and eval mode of two networks
    assert not torch._dynamo.utils.counters["graph_break"]
    tolerance = 0.0 if which == "both" else 1e-5  # traced heads round differently
    torch.testing.assert_close(compiled.state, eager.state, rtol=tolerance, atol=tolerance)
    is_compiled = {name: term.head._compiled_call_impl is not None for name, term in model.terms.items()}
    assert is_compiled == {name: which == "all" and name not in ("cooling", "rrd") for name in model.terms}


@pytest.mark.parametrize(
    ("head", "pure"),
    [
        (KD(), True),
        (SP(), True),
        (KD(Linear(4.0, 1.0)), False),
        (CTKD(), False),
        (FT(), False),
        (TRG(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_head_that_changes_with_progress_is_not_pure(head: Any, pure: bool) -> None:
    assert head.is_pure == pure


@pytest.mark.parametrize("make", [RRD, CRD])
def test_a_head_with_a_memory_is_not_pure(make: Any) -> None:
    head = module(lambda: {"head": Term(make(width=8))}).terms["head"].head
    assert not head.is_pure
