"""The base of losses between class distributions that a temperature softens."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from distill import functional
from distill.errors import UserError, under
from distill.features import Features, FeatureSpec
from distill.heads.base import LogitHead, RunInfo
from distill.heads.parts.temperature import LearnedTemperature, Temperature
from distill.schedules import Schedule, require_finite_values, require_values_above, value_at


class SoftenedLogitHead(LogitHead):
    """A loss on logits that are divided by a temperature and may be standardized before.

    A subclass calls `soften` in its constructor, and reads `class_scores` and `temperature_now` in `forward`.

    Attributes:
        temperature: T, a number, a schedule or a learned temperature.
        standardize: whether each sample's logits get mean 0 and standard deviation 1 before T, in both networks
            (`functional.standardize`).
    """

    temperature: Temperature
    standardize: bool
    learned_temperature_key: ClassVar[str] = "temperature."
    """What the key of a learned temperature's setting begins with, below the head's own."""

    def soften(self, temperature: Temperature, standardize: bool) -> None:
        """Set the temperature, and whether logits are standardized.

        Raises:
            UserError: a temperature not above 0.
        """
        if not isinstance(temperature, LearnedTemperature):
            require_values_above(0, temperature=temperature)
        self.temperature = temperature
        self.standardize = standardize

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Check the numbers of classes.

        Raises:
            UserError: they differ, or there is only one class to standardize.
        """
        super().build(student, teacher)
        if self.standardize and student["logits"] == (1,):
            raise UserError(
                f"{type(self).__name__} cannot standardize the logits of 1 class, which have no deviation: it needs 2 "
                "or more, or standardize false"
            )

    def prepare(self, run: RunInfo) -> None:
        """Check the schedules of a learned temperature over the run.

        Raises:
            UserError: a value is not finite, or a schedule does not fit the run.
        """
        super().prepare(run)
        if isinstance(self.temperature, LearnedTemperature):
            for name, schedule in vars(self.temperature).items():
                if isinstance(schedule, Schedule):
                    with under(f"{self.learned_temperature_key}{name}"):
                        require_finite_values(schedule, run.progress)

    def class_scores(self, features: Features) -> Tensor:
        """Return the logits `[B, K]`, standardized if they are to be."""
        logits = features["logits"]
        return functional.standardize(logits) if self.standardize else logits

    def temperature_now(self) -> float | Tensor:
        """Return the temperature at the head's progress, a tensor with gradient if it is learned."""
        if isinstance(self.temperature, LearnedTemperature):
            temperature: Tensor = self.temperature(self.progress)
            return temperature
        return value_at(self.temperature, self.progress)

    def diagnostics(self) -> dict[str, Tensor]:
        """Return the temperature if it is learned."""
        temperature = self.temperature_now()
        return {"temperature": temperature.detach()} if isinstance(temperature, Tensor) else {}
