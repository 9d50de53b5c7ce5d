"""Numbers that change with training progress: weights, temperatures, learning-rate factors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from distill.configurable import Configurable
from distill.errors import UserError


@dataclass(frozen=True)
class Progress:
    """The progress of training.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done, fractions included.
        steps: optimizer steps of the whole run, `None` if it has no end.
        epochs: epochs of the whole run, `None` if it has no end.
    """

    step: int = 0
    epoch: float = 0.0
    steps: int | None = None
    epochs: float | None = None


class Schedule(Configurable, ABC):
    """A number as a function of training progress. Subclasses implement `__call__`."""

    @abstractmethod
    def __call__(self, progress: Progress) -> float:
        """Return the number at `progress`."""


Number = float | Schedule
"""A constant or a schedule, for weights and temperatures."""


def value_at(number: Number, progress: Progress) -> float:
    """Return the value of a constant or a schedule at `progress`."""
    return number(progress) if isinstance(number, Schedule) else float(number)


def constant(number: Number | None) -> float | None:
    """Return a constant as it is and `None` for a schedule, whose values are known only in a run.

    So `require_above(0, temperature=constant(temperature))` checks constants and lets schedules pass.
    """
    return None if isinstance(number, Schedule) else number


class Span(Schedule):
    """A schedule over a number of steps, a number of epochs, or (by default) the whole run.

    Args:
        steps: length in optimizer steps.
        epochs: length in epochs; give one of the two or none.

    Raises:
        UserError: both lengths are given, or one that is not positive.
    """

    def __init__(self, steps: int | None = None, epochs: float | None = None) -> None:
        if steps is not None and epochs is not None:
            raise UserError(f"{type(self).__name__} takes steps or epochs, not both (given {steps} and {epochs})")
        length = steps if steps is not None else epochs
        if length is not None and length <= 0:
            raise UserError(f"{type(self).__name__} needs a positive length, given {length}")
        self.steps = steps
        self.epochs = epochs

    def share(self, progress: Progress) -> float:
        """Return the share of the span that is done, in `[0, 1]`.

        Raises:
            UserError: the span is the whole run, and the run has no end.
        """
        if self.epochs is not None:
            return min(progress.epoch / self.epochs, 1.0)
        steps = self.steps if self.steps is not None else progress.steps
        if steps is None:
            raise UserError(f"{type(self).__name__} over a run without an end needs steps or epochs, or max_epochs")
        return min(progress.step / max(steps, 1), 1.0)


class Constant(Schedule):
    """The constant `value`."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, progress: Progress) -> float:
        return self.value


class Linear(Span):
    """A straight line from `start` to `end`."""

    def __init__(self, start: float, end: float, steps: int | None = None, epochs: float | None = None) -> None:
        super().__init__(steps, epochs)
        self.start = start
        self.end = end

    def __call__(self, progress: Progress) -> float:
        return self.start + (self.end - self.start) * self.share(progress)


class Cosine(Span):
    """Half a cosine wave from `start` to `end`: slow, fast, slow.

    >>> cosine = Cosine(start=1.0, end=0.0)
    >>> [round(cosine(Progress(step, steps=4)), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """

    def __init__(self, start: float, end: float, steps: int | None = None, epochs: float | None = None) -> None:
        super().__init__(steps, epochs)
        self.start = start
        self.end = end

    def __call__(self, progress: Progress) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * self.share(progress)))


class Warmup(Span):
    """`value` (a number or another schedule), multiplied by a factor that grows from `start` to 1.

    >>> warmup = Warmup(value=2.0, epochs=4)
    >>> [warmup(Progress(epoch=epoch)) for epoch in (0, 1, 4, 9)]
    [0.0, 0.5, 2.0, 2.0]

    Args:
        value: the value after the warm-up.
        steps: length of the warm-up in optimizer steps.
        epochs: length in epochs; give one of the two.
        start: the factor at step 0.
    """

    def __init__(
        self, value: Number = 1.0, steps: int | None = None, epochs: float | None = None, start: float = 0.0
    ) -> None:
        super().__init__(steps, epochs)
        self.value = value
        self.start = start

    def __call__(self, progress: Progress) -> float:
        return value_at(self.value, progress) * (self.start + (1.0 - self.start) * self.share(progress))


class Step(Schedule):
    """`value`, multiplied by `factor` at each milestone.

    Args:
        value: the number before the first milestone.
        milestones: epochs (steps if `every_step`) of the changes, in rising order.
        factor: the factor at each milestone.
        every_step: whether milestones are counted in optimizer steps.

    Raises:
        UserError: milestones not in rising order.
    """

    def __init__(
        self, milestones: Sequence[float], value: float = 1.0, factor: float = 0.1, every_step: bool = False
    ) -> None:
        if list(milestones) != sorted(milestones):
            raise UserError(f"Step needs milestones in rising order, given {list(milestones)}")
        self.milestones = list(milestones)
        self.value = value
        self.factor = factor
        self.every_step = every_step

    def __call__(self, progress: Progress) -> float:
        now = progress.step if self.every_step else progress.epoch
        return self.value * self.factor ** sum(now >= milestone for milestone in self.milestones)


class Until(Span):
    """`value` (a number or another schedule) until the span is over, then 0."""

    def __init__(self, value: Number = 1.0, steps: int | None = None, epochs: float | None = None) -> None:
        super().__init__(steps, epochs)
        self.value = value

    def __call__(self, progress: Progress) -> float:
        return value_at(self.value, progress) if self.share(progress) < 1.0 else 0.0


class After(Span):
    """0 until the span is over, then `value` (a number or another schedule, which also counts from step 0).

    Args:
        value: the value after the span.
        steps: length of the span in optimizer steps.
        epochs: length in epochs; give one of the two.

    Raises:
        UserError: no length is given.
    """

    def __init__(self, value: Number = 1.0, steps: int | None = None, epochs: float | None = None) -> None:
        super().__init__(steps, epochs)
        if steps is None and epochs is None:
            raise UserError("After needs steps or epochs: over the whole run it would never begin")
        self.value = value

    def __call__(self, progress: Progress) -> float:
        return value_at(self.value, progress) if self.share(progress) == 1.0 else 0.0
