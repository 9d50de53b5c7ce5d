from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.functional import kd, mlkd, standardize
from distill.functional.multilevel import Masks
from tests.golden import Q
from tests.new_methods import CASES, assert_case, inputs


def literal(student: Tensor, teacher: Tensor, temperatures: list[float], masks: Masks) -> list[float]:
    """One view, entry by entry."""
    (rows, columns), certain = teacher.shape, teacher.softmax(1)
    middle = statistics.median(row.max().item() for row in certain)
    samples = [row.max().item() <= middle for row in certain]
    middle = statistics.median(certain.sum(0).tolist())
    classes = [mass <= middle for mass in certain.sum(0).tolist()]
    share, class_share = sum(samples) / rows, sum(classes) / columns
    found = [0.0, 0.0, 0.0]
    for temperature in temperatures:
        q, p = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
        for n in range(rows):
            weight = share if masks == "scale" else samples[n]
            found[0] += weight * temperature**2 * (p[n] * (p[n] / q[n]).log()).sum().item() / rows
        for i in range(columns):
            for j in range(columns):
                weight = class_share if masks == "scale" else classes[j] / columns**2
                found[1] += weight * (p[:, i] @ p[:, j] - q[:, i] @ q[:, j]).item() ** 2 / columns
        for i in range(rows):
            for j in range(rows):
                weight = share if masks == "scale" else samples[j] / rows**2
                found[2] += weight * (p[i] @ p[j] - q[i] @ q[j]).item() ** 2 / rows
    return found


@pytest.mark.parametrize("masks", ["scale", "rows"])
@pytest.mark.parametrize("shape", [[6, 4], [5, 3]])
def test_it_is_the_literal_formula(shape: list[int], masks: Masks) -> None:
    student, teacher, temperatures = 2 * Q(shape, 1), 3 * Q(shape, 2), [4.0, 3.0, 5.0, 2.0, 6.0]
    parts = mlkd(student, teacher, masks=masks)
    assert [part.item() for part in parts] == pytest.approx(literal(student, teacher, temperatures, masks), rel=1e-10)


def test_masks_that_select_have_the_golden_figures() -> None:
    case = inputs("mlkd_rows")
    parts = mlkd(case["s"], case["t"], temperatures=[4.0], masks="rows")
    figures = CASES["mlkd_rows"]["parts"]
    assert [part.item() for part in parts] == pytest.approx([figures[key] for key in ("kd", "cc", "bc")], rel=1e-10)
    assert_case("mlkd_rows", sum(parts, torch.zeros(())), case.__getitem__)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(1, 10_000), masks=st.sampled_from(["scale", "rows"]))
def test_rows_of_a_second_view_add_their_divergences_wherever_they_stand(seed: int, masks: Masks) -> None:
    first, second = (Q([5, 4], seed), Q([5, 4], seed + 1)), (Q([5, 4], seed + 2), Q([5, 4], seed + 3))
    expected = mlkd(*first, masks=masks)
    added = sum(kd(*second, temperature).mean() for temperature in (4.0, 3.0, 5.0))
    added += sum(kd(*first, temperature).mean() for temperature in (2.0, 6.0))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    student, teacher = (torch.cat(pair)[order] for pair in zip(first, second, strict=True))
    parts = mlkd(student, teacher, (torch.arange(10) // 5)[order], masks=masks)
    torch.testing.assert_close(parts, expected._replace(instances=expected.instances + added), rtol=1e-10, atol=1e-12)


def test_a_batch_whose_rows_all_show_view_0_is_a_batch_without_views() -> None:
    student, teacher = 2 * Q([6, 4], 1), 3 * Q([6, 4], 2)
    view = torch.zeros(6, dtype=torch.int64)
    assert torch.equal(torch.stack(mlkd(student, teacher, view)), torch.stack(mlkd(student, teacher)))


def test_only_the_divergences_see_standardized_logits() -> None:
    student, teacher = 2 * Q([6, 4], 1), 3 * Q([6, 4], 2)
    raw, given_parts = mlkd(student, teacher), mlkd(student, teacher, standardize=True)
    assert given_parts[1:] == raw[1:]
    divergences = [
        kd(standardize(student), standardize(teacher), temperature).mean() for temperature in (4.0, 3.0, 5.0, 2.0, 6.0)
    ]
    assert given_parts.instances.item() == pytest.approx(sum(divergences).item() / 2, rel=1e-10)  # type: ignore[union-attr]
