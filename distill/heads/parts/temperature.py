"""Temperatures that are trained with the student, for heads that soften logits."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from distill.configurable import Configurable
from distill.errors import require_above, require_finite
from distill.schedules import Cosine, Number, Progress, Schedule, value_at


class LearnedTemperature(Configurable, nn.Module, ABC):
    """A temperature with trained parameters. Subclasses implement `forward`."""

    @abstractmethod
    def forward(self, progress: Progress) -> Tensor:
        """Return the temperature at `progress`, a scalar above 0."""


Temperature = Number | LearnedTemperature
"""A constant, a schedule or a learned temperature."""


class CurriculumTemperature(LearnedTemperature):
    """T = `start` + `span` sigmoid(theta) with a trained theta that climbs the loss which the student descends (CTKD).

    The gradient of theta is multiplied by `gradient_scale`, lambda in the paper, which is negative; the student's
    gradient stays as it is. theta is in the optimizer with the student and has its learning rate, momentum and weight
    decay.

    All defaults are those of the authors' code, which has one theta for all samples (its global form) and calls `start`
    and `span` t_start and t_end, so that T stays below 21. There epochs are numbered from 1 and lambda is constant
    within each; here it changes with every step.

    Args:
        start: the lower end of T, tau_init in the paper.
        span: the width of the range of T, tau_range in the paper.
        theta: theta at step 0; 1 makes T 15.6.
        gradient_scale: lambda, a number or a schedule; by default half a cosine wave from 0 to -1 over 10 epochs.

    Attributes:
        theta: the parameter, a scalar.

    Raises:
        UserError: `start` or `span` not above 0, or a number that is not finite.
    """

    def __init__(
        self, start: float = 1.0, span: float = 20.0, theta: float = 1.0, gradient_scale: Number | None = None
    ) -> None:
        super().__init__()
        require_above(0, start=start, span=span)
        require_finite(start=start, span=span, theta=theta)
        if gradient_scale is not None and not isinstance(gradient_scale, Schedule):
            require_finite(gradient_scale=gradient_scale)
        self.start, self.span = start, span
        self.gradient_scale = Cosine(0.0, -1.0, epochs=10) if gradient_scale is None else gradient_scale
        self.theta = nn.Parameter(torch.tensor(float(theta)))

    def forward(self, progress: Progress) -> Tensor:
        theta = self.theta if self.theta.dtype == torch.float64 else self.theta.float()
        scaled = theta.detach().lerp(theta, value_at(self.gradient_scale, progress))  # theta, with a scaled gradient
        return self.start + self.span * scaled.sigmoid()
