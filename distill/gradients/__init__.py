"""Gradients of the loss terms at tensors that they share, and what each term's share of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from distill.errors import UserError
from distill.gradients.accumulation import TermGradients, allow_retained_graphs
from distill.gradients.measurement import Measurement, Share, require_terms
from distill.networks import Network
from distill.objective import Losses

__all__ = [
    "Measurement",
    "Share",
    "TermGradients",
    "allow_retained_graphs",
    "gradient_shares",
    "require_terms",
    "shared_parameters",
]


def gradient_shares(
    losses: Losses, reference: str, at: Sequence[Tensor], scale: float | Tensor = 1.0
) -> Mapping[str, Share]:
    """Compare the gradients of all terms of a step with the gradient of one of them.

    Each term takes one backward pass through the step's own graph, which is retained: call this before the step's
    backward pass. No `grad` is written, and no hook of DDP is called. In a process group every rank must call it; the
    gradient is then that of the batch of all ranks.

    >>> import torch
    >>> from distill.features import Features, FeatureSpec
    >>> from distill.heads import KD, CrossEntropy
    >>> from distill.objective import Objective, Term
    >>> from distill.schedules import Progress
    >>> weight, teacher = torch.randn(10, 64, requires_grad=True), Features(logits=torch.randn(8, 10))
    >>> shapes = FeatureSpec(logits=(10,))
    >>> objective = Objective({"task": Term(CrossEntropy()), "kd": Term(KD(), weight=0.5)}, shapes, shapes)
    >>> student = Features(logits=torch.randn(8, 64) @ weight.T)
    >>> losses = objective(student, teacher, {"label": torch.arange(8)}, Progress())
    >>> shares = gradient_shares(losses, "task", [weight])
    >>> shares["kd"].share == 0.5 * shares["kd"].ratio
    True

    Args:
        losses: the losses of a step, before its backward pass.
        reference: name of the term to compare with.
        at: tensors of the step's graph: parameters, see `shared_parameters`, or activations such as an embedding. An
            activation that is a view or a copy of another one stands for that one, and one that joins the rows of
            several (`torch.cat`) for these.
        scale: factor of the losses in the backward pass, that of a `GradScaler`; it is divided out again.

    Returns:
        Shares by term name, without terms that do not reach `at`.

    Raises:
        UserError: there is one term only, or no term of that name; the reference does not reach `at`; or a gradient is
            not finite, in which case the message names the term.
    """
    gradients = TermGradients()
    gradients.add(losses, at, scale)
    measurement = gradients.measure()
    if broken := measurement.not_finite():
        raise UserError(
            f"the gradient of the term {' and '.join(map(repr, broken))} is not finite: try a smaller learning rate "
            "or weight"
        )
    return measurement.shares(reference)


def shared_parameters(student: Network) -> list[Tensor]:
    """Return the trainable parameters of a student below its classifier, or all if it has no known classifier.

    Raises:
        UserError: there is none.
    """
    above = tuple(f"{layer}." for layer in student.classifier)
    parameters: list[Tensor] = [
        parameter
        for name, parameter in student.model.named_parameters()
        if parameter.requires_grad and not name.startswith(above)
    ]
    if not parameters:
        raise UserError(
            f"{student.name} has no trainable parameter below its classifier, so its terms share no layer: compare "
            "gradients only of a student whose backbone is trained"
        )
    return parameters
