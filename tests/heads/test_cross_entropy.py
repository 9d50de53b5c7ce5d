from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distill.distributed import own_rows
from distill.errors import UserError
from distill.features import Features
from distill.heads.cross_entropy import CrossEntropy
from tests.golden import Q
from tests.two_ranks import RankPool

LABEL = torch.tensor([3, 0, -1, 1, -1, 4])
SOFT = torch.tensor([[0.25, 0, 0.75, 0, 0], [0] * 5, [0, 0.5, 0, 0, 0], [0, 0, 0, 1, 0], [0] * 5, [0.2] * 5])


def logits() -> Tensor:
    return (2 * Q([6, 5], 1)).requires_grad_()


def literal(x: Tensor, soft: Tensor, smoothing: float) -> float:
    """Each row's cross-entropy with its label, smoothed within its mass, over the mass of all rows."""
    total = 0.0
    for row, label in zip(torch.log_softmax(x, -1).tolist(), soft.tolist(), strict=True):
        for log_probability, share in zip(row, label, strict=True):
            total -= ((1 - smoothing) * share + smoothing * sum(label) / len(label)) * log_probability
    return total / soft.sum().item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_is_that_of_the_literal_formula(smoothing: float) -> None:
    x = logits()
    hard = torch.zeros(6, 5)
    hard[LABEL >= 0, LABEL[LABEL >= 0]] = 1
    head = CrossEntropy(smoothing)
    assert head(Features(x), None, {"label": LABEL}).item() == pytest.approx(literal(x, hard, smoothing), rel=1e-6)
    assert head(Features(x), None, {"label": SOFT}).item() == pytest.approx(literal(x, SOFT, smoothing), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_every_sample_labeled_it_is_torchs_cross_entropy(smoothing: float) -> None:
    x, label = logits(), LABEL.clamp_min(0)
    loss = CrossEntropy(smoothing)(Features(x), None, {"label": label})
    torch.testing.assert_close(loss, cross_entropy(x, label, label_smoothing=smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label", [LABEL, SOFT])
def test_unlabeled_samples_get_no_gradient(label: Tensor, smoothing: float) -> None:
    x = logits()
    loss = CrossEntropy(smoothing)(Features(x), None, {"label": label})
    (gradient,) = torch.autograd.grad(loss, x)
    unlabeled = label == -1 if label.ndim == 1 else label.sum(-1) == 0
    assert not gradient[unlabeled].any()
    assert bool(gradient[~unlabeled].any(-1).all())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label", [torch.full((6,), -1), torch.zeros(6, 5)])
def test_without_any_label_loss_and_gradient_are_zero(label: Tensor, smoothing: float) -> None:
    x = logits()
    loss = CrossEntropy(smoothing)(Features(x), None, {"label": label})
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.item() == 0.0
    assert not gradient.any()


def test_soft_labels_may_be_of_half_precision() -> None:
    x = logits()
    soft = SOFT.bfloat16()
    assert torch.equal(
        CrossEntropy()(Features(x), None, {"label": soft}), CrossEntropy()(Features(x), None, {"label": soft.double()})
    )


def test_a_label_beyond_the_classes_is_not_taken_for_unlabeled() -> None:
    for wrong in (5, -2):
        with pytest.raises(IndexError):
            CrossEntropy()(Features(logits()), None, {"label": torch.full((6,), wrong)})


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_label_smoothing_outside_its_range_is_refused(smoothing: float) -> None:
    with pytest.raises(UserError, match="label_smoothing must be at least 0 and below 1, given"):
        CrossEntropy(smoothing)


def own_gradient(label: Tensor) -> tuple[float, Tensor]:
    x = own_rows(logits()).detach().requires_grad_()
    loss = CrossEntropy(0.1)(Features(x), None, {"label": own_rows(label)})
    return loss.item(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("label", [LABEL, SOFT, torch.tensor([-1, -1, -1, 1, -1, 4]), torch.full((6,), -1)])
def test_ranks_with_different_shares_of_the_labels_equal_one_process(pool: RankPool, label: Tensor) -> None:
    loss, gradient = own_gradient(label)
    losses, gradients = zip(*pool.run(own_gradient, label), strict=True)
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(torch.stack(gradients, dim=1).flatten(0, 1) / 2, gradient, rtol=1e-12, atol=1e-15)
