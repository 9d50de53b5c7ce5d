"""Numbers that change with training progress: weights, temperatures, learning-rate factors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from distill.configurable import Configurable
from distill.errors import UserError, require_above, require_at_least, require_finite


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

    def bounds(self) -> tuple[float, float] | None:
        """Return the lowest and the highest value at any progress, ends included; `None`, the default, if unknown."""
        return None


Number = float | Schedule
"""A constant or a schedule, for weights and temperatures."""


def value_at(number: Number, progress: Progress) -> float:
    """Return the value of a constant or a schedule at `progress`."""
    return number(progress) if isinstance(number, Schedule) else float(number)


def bounds_of(number: Number) -> tuple[float, float] | None:
    """Return the lowest and the highest value of a constant or a schedule; `None` if unknown."""
    return number.bounds() if isinstance(number, Schedule) else (float(number), float(number))


def require_values_above(bound: float, **numbers: Number | None) -> None:
    """Require every given number to be finite and above `bound` at any time; `None` passes.

    >>> require_values_above(0, temperature=Linear(4.0, 1.0), margin=None)

    Raises:
        UserError: a constant is too small or not finite, or a schedule reaches such a value; the message names it.
    """
    for name, number in numbers.items():
        if isinstance(number, Schedule):
            if (bounds := number.bounds()) is not None and not bounds[0] > bound:
                raise UserError(
                    f"{name} must be above {bound}, but {type(number).__name__} reaches {bounds[0]:g}: let it end above"
                )
        else:
            require_above(bound, **{name: number})
            require_finite(**{name: number})


def require_finite_values(schedule: Schedule, run: Progress, samples: int = 100) -> None:
    """Require finite values of a schedule over a run, at evenly spaced steps.

    Args:
        schedule: a schedule, such as one of the user's own.
        run: progress at step 0, with the length of the run; of a run without an end, only step 0 is looked at.
        samples: number of steps.

    Raises:
        UserError: a value is NaN or infinite, or the schedule does not fit the run.
    """
    last = (run.steps or 1) - 1
    for step in sorted({round(last * sample / samples) for sample in range(samples + 1)}):
        epoch = run.epochs * step / run.steps if run.steps and run.epochs else 0.0
        value = schedule(Progress(step, epoch, run.steps, run.epochs))
        if not math.isfinite(value):
            raise UserError(f"{type(schedule).__name__} gives {value} at step {step}, but every value must be finite")


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
        if length is not None and not 0 < length < math.inf:
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
        require_finite(value=value)
        self.value = value

    def __call__(self, progress: Progress) -> float:
        return self.value

    def bounds(self) -> tuple[float, float]:
        return self.value, self.value


class Linear(Span):
    """A straight line from `start` to `end`, beginning after `after` steps, or epochs if its length is in epochs.

    Raises:
        UserError: a number is out of its range, or `after` is given without a length.
    """

    def __init__(
        self, start: float, end: float, steps: int | None = None, epochs: float | None = None, after: float = 0
    ) -> None:
        super().__init__(steps, epochs)
        require_finite(start=start, end=end, after=after)
        require_at_least(0, after=after)
        if after and steps is None and epochs is None:
            raise UserError(f"{type(self).__name__} after {after:g} needs its length, steps or epochs, too")
        self.start, self.end, self.after = start, end, after

    def __call__(self, progress: Progress) -> float:
        return self.start + (self.end - self.start) * self.share(progress)

    def share(self, progress: Progress) -> float:
        begun = replace(progress, step=progress.step - int(self.after), epoch=progress.epoch - self.after)
        return max(super().share(begun), 0.0)

    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)


class Cosine(Linear):
    """Half a cosine wave from `start` to `end`: slow, fast, slow. It takes what `Linear` takes.

    >>> cosine = Cosine(start=1.0, end=0.0)
    >>> [round(cosine(Progress(step, steps=4)), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """

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

    Raises:
        UserError: both lengths are given, a number is not finite, or `start` is negative.
    """

    def __init__(
        self, value: Number = 1.0, steps: int | None = None, epochs: float | None = None, start: float = 0.0
    ) -> None:
        super().__init__(steps, epochs)
        _require_finite_constants(value=value, start=start)
        require_at_least(0, start=start)
        self.value = value
        self.start = start

    def __call__(self, progress: Progress) -> float:
        return value_at(self.value, progress) * (self.start + (1.0 - self.start) * self.share(progress))

    def bounds(self) -> tuple[float, float] | None:
        inner = bounds_of(self.value)
        return None if inner is None else _hull(factor * value for factor in (self.start, 1.0) for value in inner)


class Step(Schedule):
    """`value`, multiplied by `factor` at each milestone.

    Args:
        value: the number before the first milestone.
        milestones: epochs (steps if `every_step`) of the changes, in rising order.
        factor: the factor at each milestone.
        every_step: whether milestones are counted in optimizer steps.

    Raises:
        UserError: milestones not in rising order, or a number that is not finite or (except `value`) negative.
    """

    def __init__(
        self, milestones: Sequence[float], value: float = 1.0, factor: float = 0.1, every_step: bool = False
    ) -> None:
        require_finite(value=value, factor=factor, milestones=sum(milestones))
        require_at_least(0, factor=factor, milestones=min(milestones, default=0))
        if list(milestones) != sorted(milestones):
            raise UserError(f"Step needs milestones in rising order, given {list(milestones)}")
        self.milestones = list(milestones)
        self.value = value
        self.factor = factor
        self.every_step = every_step

    def __call__(self, progress: Progress) -> float:
        now = progress.step if self.every_step else progress.epoch
        return self.value * self.factor ** sum(now >= milestone for milestone in self.milestones)

    def bounds(self) -> tuple[float, float]:
        return _hull(self.value * self.factor**passed for passed in range(len(self.milestones) + 1))


class Until(Span):
    """`value` (a number or another schedule) until the span is over, then 0."""

    def __init__(self, value: Number = 1.0, steps: int | None = None, epochs: float | None = None) -> None:
        super().__init__(steps, epochs)
        _require_finite_constants(value=value)
        self.value = value

    def __call__(self, progress: Progress) -> float:
        return value_at(self.value, progress) if self.share(progress) < 1.0 else 0.0

    def bounds(self) -> tuple[float, float] | None:
        inner = bounds_of(self.value)
        return None if inner is None else _hull((0.0, *inner))


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
        _require_finite_constants(value=value)
        self.value = value

    def __call__(self, progress: Progress) -> float:
        return value_at(self.value, progress) if self.share(progress) == 1.0 else 0.0

    def bounds(self) -> tuple[float, float] | None:
        inner = bounds_of(self.value)
        return None if inner is None else _hull((0.0, *inner))


def _hull(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)


def _require_finite_constants(**numbers: Number) -> None:
    require_finite(**{name: number for name, number in numbers.items() if not isinstance(number, Schedule)})
