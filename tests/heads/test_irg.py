from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.features import Features
from distill.heads.irg import IRG
from tests.golden import Q


def literal(student: Tensor, teacher: Tensor) -> float:
    def edges(x: Tensor) -> list[float]:
        squared = [(a - b).square().sum().item() for a in x for b in x]
        return [entry / max(squared) for entry in squared]

    pairs = list(zip(edges(student), edges(teacher), strict=True))
    return sum((a - b) ** 2 for a, b in pairs) / len(pairs)


def test_it_is_the_literal_formula() -> None:
    student, teacher = Q([8, 6], 3), Q([8, 12], 4)
    loss = IRG()(Features(embedding=student), Features(embedding=teacher), {})
    assert loss.item() == pytest.approx(literal(student, teacher), rel=1e-10)


def test_the_gradient_of_the_public_code_holds_the_largest_distance_constant_and_is_half_of_the_rest() -> None:
    student, teacher = Q([8, 6], 3).requires_grad_(), Q([8, 12], 4)
    loss = IRG()(Features(embedding=student), Features(embedding=teacher), {})
    (gradient,) = torch.autograd.grad(loss, student)
    squared = [torch.cdist(x, x).square() for x in (student.detach(), teacher)]
    largest = [edges.max() for edges in squared]
    slope = 2 / 64 * (squared[0] / largest[0] - squared[1] / largest[1])  # by each edge
    edges = student.detach().unsqueeze(1) - student.detach().unsqueeze(0)
    public = (slope.unsqueeze(2) * 2 * edges / largest[0]).sum(1)  # of the row's image alone, not of the column's
    pair = torch.nonzero(squared[0] == largest[0])[0]
    through_largest = torch.zeros_like(student)
    direction = 2 * (student.detach()[pair[0]] - student.detach()[pair[1]])
    through_largest[pair[0]] -= (slope * squared[0]).sum() / largest[0] ** 2 * direction
    through_largest[pair[1]] += (slope * squared[0]).sum() / largest[0] ** 2 * direction
    torch.testing.assert_close(gradient, 2 * public + through_largest)
    assert through_largest.norm() > 1e-3 * gradient.norm()


def test_two_images_have_one_edge_which_is_always_the_largest() -> None:
    loss = IRG()(Features(embedding=Q([2, 6], 3)), Features(embedding=Q([2, 12], 4)), {})
    assert loss.item() == pytest.approx(0.0, abs=1e-20)
