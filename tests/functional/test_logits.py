from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.functional import dkd, kd, mcd, nckd, nkd, rld, scd, standardize, tckd
from tests.golden import Q, assert_relative
from tests.new_methods import CASES, assert_case
from tests.new_methods import inputs as inputs_of


def kd_of(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    return kd(student_logits, teacher_logits, temperature)


LOSSES: dict[str, Callable[..., Tensor]] = {"kd": kd_of, "tckd": tckd, "nckd": nckd, "dkd": dkd}
RELATIVES: dict[str, Callable[..., Tensor]] = LOSSES | {"nkd": nkd, "scd": scd, "mcd": mcd, "rld": rld}
every_loss = pytest.mark.parametrize("name", LOSSES)
every_relative = pytest.mark.parametrize("name", RELATIVES)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (2 * Q([8, 10], 1)).requires_grad_(), 3 * Q([8, 10], 2)
    return student, teacher, (3 * torch.arange(8) + 1) % 10


@every_loss
def test_value_and_gradient_are_the_golden_ones(name: str) -> None:
    student, teacher, target = inputs()
    assert_relative(name, LOSSES[name](student, teacher, target, temperature=4.0).mean(), student)


@every_loss
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_is_that_of_the_literal_formula_in_probabilities(name: str, temperature: float) -> None:
    student, teacher, target = inputs()

    def divergence(p: Tensor, q: Tensor) -> float:
        return temperature**2 * (p * (p / q).log()).sum().item()

    for s, t, c, given_loss in zip(
        student.detach(),
        teacher,
        target.tolist(),
        LOSSES[name](student, teacher, target, temperature=temperature),
        strict=True,
    ):
        q, p = torch.softmax(s / temperature, 0), torch.softmax(t / temperature, 0)
        rest = torch.arange(10) != c
        binary = divergence(torch.stack([p[c], 1 - p[c]]), torch.stack([q[c], 1 - q[c]]))
        others = divergence(p[rest] / p[rest].sum(), q[rest] / q[rest].sum())
        expected = {"kd": divergence(p, q), "tckd": binary, "nckd": others, "dkd": binary + 8 * others}
        assert given_loss.item() == pytest.approx(expected[name], rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(1, 10_000), spread=st.floats(0.1, 30), temperature=st.floats(0.5, 8))
def test_kd_is_the_target_part_and_the_rest_by_its_share(seed: int, spread: float, temperature: float) -> None:
    student, teacher = spread * Q([4, 6], seed), spread * Q([4, 6], seed + 1)
    target = torch.tensor([0, 5, 2, 2])
    rest = 1 - torch.softmax(teacher / temperature, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    parts = tckd(student, teacher, target, temperature) + rest * nckd(student, teacher, target, temperature)
    torch.testing.assert_close(parts, kd(student, teacher, temperature), rtol=1e-9, atol=1e-10)


@every_loss
def test_equal_logits_have_no_loss_and_no_gradient(name: str) -> None:
    student, _, target = inputs()
    loss = LOSSES[name](student, student.detach(), target)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-13)


@every_relative
@pytest.mark.parametrize("gap", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("saturated", [0, 1])
def test_any_gap_between_two_logits_is_finite_in_float32(name: str, gap: float, side: str, saturated: int) -> None:
    gapped, plain = torch.zeros(1, 5), torch.linspace(-1, 1, 5).unsqueeze(0)
    gapped[0, saturated] = gap  # class 0 is the target
    student = (plain if side == "teacher" else gapped).clone().requires_grad_()
    teacher = {"student": plain, "teacher": gapped, "both": -gapped}[side]
    loss = RELATIVES[name](student, teacher, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert bool(loss.isfinite().all())
    assert bool(gradient.isfinite().all())
    assert loss.item() >= 0


@every_relative
def test_leading_dimensions_are_samples(name: str) -> None:
    student, teacher, target = inputs()
    folded = RELATIVES[name](student.view(2, 4, 10), teacher.view(2, 4, 10), target.view(2, 4))
    torch.testing.assert_close(folded.flatten(), RELATIVES[name](student, teacher, target), rtol=1e-12, atol=0)


@every_relative
def test_dtype_is_the_callers(name: str) -> None:
    student, teacher, target = inputs()
    assert RELATIVES[name](student.float(), teacher.float(), target).dtype == torch.float32


def test_parts_of_dkd_are_weighted_by_alpha_and_beta() -> None:
    student, teacher, target = inputs()
    expected = 0.5 * tckd(student, teacher, target, 2.0) + 3 * nckd(student, teacher, target, 2.0)
    torch.testing.assert_close(dkd(student, teacher, target, 0.5, 3.0, 2.0), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["nkd_T1", "nkd_T3", "nkd_keep_target"])
def test_normalized_distillation_has_the_golden_figures(name: str) -> None:
    case, params = inputs_of(name), CASES[name]["params"]
    loss = nkd(case["s"], case["t"], case["y"], params["gamma"], params["T"], params.get("keep_target", False))
    assert_case(name, loss.mean(), case.__getitem__)


def log_of(logits: Tensor, chosen: Tensor) -> Tensor:
    """The logarithm of the probabilities among the chosen classes."""
    return (logits[chosen].exp() / logits[chosen].exp().sum()).log()


@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (3.5, 3.0)])
def test_normalized_distillation_is_its_literal_formula(gamma: float, temperature: float) -> None:
    student, teacher, target = inputs()
    every = torch.ones(10, dtype=torch.bool)
    for s, t, y, found in zip(
        student, teacher, target.tolist(), nkd(student, teacher, target, gamma, temperature), strict=True
    ):
        others = torch.arange(10) != y
        expected = -log_of(t, every).exp()[y] * log_of(s, every)[y]
        cross = log_of(t / temperature, others).exp() * log_of(s / temperature, others)
        assert found.item() == pytest.approx((expected - gamma * temperature**2 * cross.sum()).item(), rel=1e-10)


@pytest.mark.parametrize(("temperature", "confidence"), [(4.0, 1.0), (2.0, 2.0)])
def test_refined_distillation_is_its_literal_formula(temperature: float, confidence: float) -> None:
    case = inputs_of("rld")
    student, teacher, target = case["s"].detach(), case["t"], case["y"]
    found = rld(student, teacher, target, 1.5, 3.0, temperature, confidence)
    for s, t, y, loss in zip(student, teacher, target.tolist(), found, strict=True):
        a, b = (s / confidence).softmax(0)[y], (t / confidence).softmax(0).max()
        expected = 1.5 * confidence**2 * (b * (b / a).log() + (1 - b) * ((1 - b) / (1 - a)).log())
        if bool((below := t < t[y]).any()):
            p, q = log_of(t / temperature, below), log_of(s / temperature, below)
            expected += 3.0 * temperature**2 * (p.exp() * (p - q)).sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)


def test_a_target_below_all_other_classes_leaves_nothing_to_correlate() -> None:
    student, teacher = (2 * Q([3, 5], 1)).requires_grad_(), 3 * Q([3, 5], 2)
    loss = mcd(student, teacher, teacher.argmin(1))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert not loss.any()
    assert not gradient.any()


def test_classes_that_tie_with_the_target_are_left_out() -> None:
    student, teacher = Q([1, 4], 1), torch.tensor([[2.0, 2.0, 1.0, 0.0]]).double()
    expected = kd(student[:, 2:], teacher[:, 2:])
    torch.testing.assert_close(mcd(student, teacher, torch.tensor([0])), expected, rtol=1e-12, atol=0)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(1, 10_000), scale=st.floats(0.01, 100), shift=st.floats(-50, 50))
def test_standardized_logits_keep_only_the_shape_of_logits(seed: int, scale: float, shift: float) -> None:
    logits = Q([4, 6], seed)
    found = standardize(scale * logits + shift)
    torch.testing.assert_close(found, standardize(logits), rtol=1e-4, atol=1e-4)  # up to eps
    torch.testing.assert_close(found.mean(1), torch.zeros(4).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.std(1), torch.ones(4).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 3e7])
def test_equal_logits_are_standardized_to_zero_without_an_exploding_gradient(value: float) -> None:
    logits = torch.full((3, 100), value).requires_grad_()
    loss = kd(standardize(logits), standardize(torch.randn(3, 100)), 2.0).sum()
    assert not standardize(logits).any()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient.any()
