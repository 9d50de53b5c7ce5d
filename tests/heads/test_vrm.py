from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill.distributed import all_mean, gather, own_rows, world_size
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import edge_difference
from distill.heads import VRM, RunInfo
from tests.golden import Q
from tests.new_methods import CASES, assert_case, inputs
from tests.two_ranks import RankPool

ARGUMENTS = {"alpha": "sample_weight", "beta": "class_weight", "standardise": "standardize"}
NAMES = [name for name in CASES if name.startswith("vrm")]


def head_of(name: str, **given: Any) -> VRM:
    return VRM(**{ARGUMENTS.get(key, key): value for key, value in CASES[name]["params"].items()}, **given)


def loss_of(head: VRM, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    view = torch.arange(2 * len(student[0])) // len(student[0])
    loss: Tensor = head(Features(torch.cat(student)), Features(torch.cat(teacher)), {"view": view})
    return loss


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_value_parts_and_gradient_are_the_golden_ones(name: str, chunk: int | None) -> None:
    case, head = inputs(name), head_of(name, chunk=chunk)
    assert_case(name, loss_of(head, [case["s"], case["s2"]], [case["t"], case["t2"]]), case.__getitem__)
    parts = {key: value.item() for key, value in head.diagnostics().items()}
    expected = CASES[name]["parts"]
    assert parts == pytest.approx({"samples": expected["sample"], "classes": expected["class"]}, rel=1e-10)


def literal(first: Tensor, second: Tensor, target: Tensor, other: Tensor, kept: Any, delta: float) -> float:
    """The mean over kept edges and entries, number by number."""
    total, count = 0.0, 0
    for m in range(len(first)):
        for n in range(len(second)):
            if not kept(m, n):
                continue
            edges = []
            for x, y in ((first[m], second[n]), (target[m], other[n])):
                length = sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True)) ** 0.5
                pairs = zip(x.tolist(), y.tolist(), strict=True)
                edges.append([(a - b) / length if length > 1e-12 else 0.0 for a, b in pairs])
            for a, b in zip(*edges, strict=True):
                gap = abs(a - b)
                total += gap**2 / 2 if gap <= delta else delta * (gap - delta / 2)
                count += 1
    return total / count


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(1, 10_000), prune=st.floats(0.0, 0.9), images=st.integers(2, 4))
def test_it_is_the_literal_formula(seed: int, prune: float, images: int) -> None:
    student, teacher = [[scale * Q([images, 3], seed + n + k) for k in (0, 1)] for n, scale in ((0, 2), (9, 3))]
    probability = [part.softmax(1) for part in student]
    entropy = [[-sum(p * torch.tensor(p).log().item() for p in row) for row in part.tolist()] for part in probability]
    doubt = {(m, n): entropy[0][m] + entropy[1][n] for m in range(images) for n in range(images)}
    ranked = sorted(doubt, key=lambda edge: -doubt[edge])
    gone, kept = ranked[: int(prune * images**2)], ranked[int(prune * images**2) :]
    assume(not gone or doubt[gone[-1]] > doubt[kept[0]] + 1e-9)  # of equal edges, either may go
    head = VRM(1.0, 0.0, prune, delta=0.3, standardize=False)
    expected = literal(*student, *teacher, lambda m, n: (m, n) not in gone, 0.3)
    assert loss_of(head, student, teacher).item() == pytest.approx(expected, rel=1e-9)
    head = VRM(0.0, 1.0, prune, delta=0.3, standardize=False)
    expected = literal(*(part.mT for part in (*student, *teacher)), lambda m, n: True, 0.3)
    assert loss_of(head, student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_equal_samples_have_no_edge_and_a_gradient_of_0() -> None:
    both = Q([3, 4], 1).requires_grad_()
    loss = edge_difference((both, both.detach()), (Q([3, 4], 2), Q([3, 4], 2)))
    assert torch.isfinite(loss)
    (gradient,) = torch.autograd.grad(loss, both)
    assert gradient.isfinite().all()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        result = function(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, result.numel() if isinstance(result, Tensor) else 0)
        return result


@pytest.mark.parametrize("arguments", [{}, {"edges": "all", "classes": "stacked"}])
def test_no_tensor_of_all_edges_exists_in_either_pass(arguments: dict[str, Any]) -> None:
    images, classes = 24, 20
    student, teacher = [[Q([images, classes], n + k).float() for k in (0, 1)] for n in (1, 5)]
    student = [part.requires_grad_() for part in student]
    with Largest() as largest:
        loss_of(VRM(chunk=1, **arguments), student, teacher).backward()  # type: ignore[no-untyped-call]
    assert largest.numbers <= max(2 * images * classes, (2 * images) ** 2)


def share(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the ranks of the loss and of its gradient, each rank with its part of every view."""
    own = own_rows(student).clone().requires_grad_()
    loss = VRM()(Features(own), Features(own_rows(teacher)), {"view": torch.arange(len(own)) * 2 // len(own)})
    (gradient,) = torch.autograd.grad(loss, own)
    return all_mean(loss), gather(gradient) / world_size()


def test_the_batch_is_that_of_all_ranks(pool: RankPool) -> None:
    student, teacher = 2 * Q([16, 5], 1), 3 * Q([16, 5], 2)
    for found in pool.run(share, student, teacher):
        torch.testing.assert_close(found, share(student, teacher), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prune": 1.5}, "prune must be"),
        ({"delta": 0.0}, "delta must be above 0"),
        ({"edges": "some"}, "edges cannot be 'some'"),
        ({"classes": "all"}, "classes cannot be 'all'"),
        ({"huber": "l1"}, "huber cannot be 'l1'"),
        ({"scope": "image"}, "VRM has no scope 'image'"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_arguments_out_of_their_range_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        VRM(**arguments)


def test_one_class_and_one_view_are_refused() -> None:
    one = FeatureSpec(logits=(1,))
    with pytest.raises(UserError, match="VRM sets a class against the others, but the networks have 1 class"):
        VRM().build(one, one)
    with pytest.raises(UserError, match="VRM compares two views of each image, given one"):
        VRM().prepare(RunInfo(views=1))
