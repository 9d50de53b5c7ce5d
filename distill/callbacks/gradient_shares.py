"""Each term's share of the student's gradient during training, and weights that keep to a share."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from distill.callbacks.gradient_meter import At, GradientMeter
from distill.callbacks.pictures import pictures_folder
from distill.errors import did_you_mean, require_above, require_at_least
from distill.gradients import Measurement, Share
from distill.objective import TASK, Objective
from distill.plotting.curves import Section, draw_sections
from distill.plotting.saving import save_figure
from distill.training.classification import ClassificationModule

FACTORS = (1e-3, 1e3)
"""Range of the factors that `balance` may set."""
SMOOTHING = 10
"""Number of measurements over which `balance` averages the logarithm of a gradient's ratio to the reference's."""
_LONGEST = 2000
"""Number of measurements that are kept for the picture; of more, every second one is."""


class GradientShares(GradientMeter):
    """Measures what each term does to the student, and keeps named terms at a share.

    Every `every` steps, for each term NAME:

    - `train/NAME/gradient_norm`: the norm of its unweighted gradient;
    - `train/NAME/gradient_share`: the norm of its weighted gradient relative to that of the task's, or without a task,
      of the term that had the largest one at the first measurement;
    - `train/NAME/gradient_cosine`: of the angle to the reference's gradient, and `train/NAME/gradient_cosine/OTHER` to
      each other term's: 1 if both pull in the same direction, 0 if neither helps the other, below 0 if they disagree.

    They go to the loggers at once. At the end of training they are drawn over time in `pictures/gradient_shares.png`
    of the run's folder.

    `balance` sets the factors of the named terms (the objective's `factors`, which checkpoints contain) after each
    measurement, such that the effective weight, schedule x factor, has the share asked for on average over the last
    measurements: the logarithm of the ratio of the gradients is averaged over ten of them. A factor stays within 0.001
    and 1000. `train/NAME/factor` and `train/NAME_weight` (the effective weight) are logged. A schedule of a
    balanced term can switch it on and off, but not change its share.

    It costs a backward pass per term at each measurement, and holds a copy of the student's parameters per term in it.
    At `embedding` or `tokens` the backward pass ends there, but terms that read other layers are not measured. With
    several views of the images, the gradient is that at all of them.

    Args:
        every: number of optimizer steps from one measurement to the next; the first is at step 0.
        at: where the gradients are compared: at the student's `parameters` below its classifier, its `embedding` or
            its `tokens`.
        balance: share of each balanced term, above 0, by term name. It may exceed 1.

    Raises:
        UserError: an argument out of its range; there is one term only, or no term of that name; the student's
            backbone is frozen.
    """

    def __init__(self, every: int = 100, at: At = "parameters", balance: Mapping[str, float] | None = None) -> None:
        super().__init__(at)
        require_at_least(1, every=every)
        for name, share in (balance or {}).items():
            require_above(0, **{f"balance: the share of {name!r}": share})
        self.every = every
        self.balance = dict(balance or {})
        self.reference: str | None = None
        self._ratios: dict[str, tuple[float, int]] = {}  # mean logarithm of the ratio to the reference, and its count
        self._history: list[dict[str, Any]] = []
        self._cosines: dict[str, dict[str, tuple[float, int]]] = {}  # sum and count

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return self._generate_state_key(at=self.at, balance=self.balance)

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements so far."""
        return {
            "reference": self.reference,
            "ratios": dict(self._ratios),
            "history": list(self._history),
            "cosines": {name: dict(row) for name, row in self._cosines.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the measurements so far."""
        self.reference, self._ratios = state_dict["reference"], dict(state_dict["ratios"])
        self._history = list(state_dict["history"])
        self._cosines = {name: dict(row) for name, row in state_dict["cosines"].items()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the terms before step 0."""
        super().on_fit_start(trainer, pl_module)
        assert isinstance(pl_module, ClassificationModule)
        names = list(pl_module.terms)
        for name in self.balance:
            if name not in names:
                raise self.error(f"balance: there is no term {name!r}: {did_you_mean(name, names)}")
        if TASK in self.balance or not set(names) - set(self.balance):
            raise self.error("balance: shares are relative to the task's gradient, or to that of a term without one")
        if TASK in names:
            self.reference = TASK

    def is_measured(self, trainer: Trainer, objective: Objective) -> bool:
        """Measure every `every` optimizer steps."""
        return trainer.global_step % self.every == 0

    def on_measured(self, trainer: Trainer, objective: Objective, measurement: Measurement) -> None:
        """Log the shares, and balance the terms."""
        if self.reference is None:
            self.reference = measurement.without(self.balance).largest()
        missing = set(objective.terms) - set(measurement.products) - set(self.unfilled)
        if self.reference is None or self.reference not in measurement.products:
            self.warn_once("reference", f"the gradient of {self.reference!r} does not reach the {self.at}")
            return
        if missing:
            self._report_missing(missing, measurement)
        shares = measurement.shares(self.reference)
        self._remember(trainer.global_step, shares)
        values = {f"train/{name}/{key}": value for name, share in shares.items() for key, value in _curves(share)}
        against = abs(measurement.weights[self.reference])
        objective.set_factors(
            {name: self._factor(name, shares[name], against, objective) for name in self.balance if name in shares}
        )
        values |= {f"train/{name}/factor": objective.factor(name) for name in self.balance}
        values = {key: value for key, value in values.items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the shares over time."""
        super().on_train_end(trainer, pl_module)
        if not self._history or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # it has
            return
        path = save_figure(self._figure(), pictures_folder(trainer) / "gradient_shares.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("pictures/gradient_shares", [str(path)], step=trainer.global_step)

    def _factor(self, name: str, share: Share, against: float, objective: Objective) -> float:
        """Return the new factor of a balanced term, given the weight of the reference."""
        now = objective.factor(name)
        if not 0 < share.ratio < math.inf:
            return now
        mean, count = self._ratios.get(name, (0.0, 0))
        count = min(count + 1, SMOOTHING)
        mean += (math.log(share.ratio) - mean) / count
        self._ratios[name] = mean, count
        scheduled = abs(share.weight) / now
        if not scheduled or not against:  # in a stage of the schedule without one of them
            return now
        return min(max(self.balance[name] * against / (scheduled * math.exp(mean)), FACTORS[0]), FACTORS[1])

    def _remember(self, step: int, shares: Mapping[str, Share]) -> None:
        self._history.append({"step": step, **{name: list(_triple(share)) for name, share in shares.items()}})
        if len(self._history) > _LONGEST:
            self._history = self._history[::2]
        for name, share in shares.items():
            row = self._cosines.setdefault(name, {})
            for partner, cosine in share.cosines.items():
                if math.isfinite(cosine):
                    total, count = row.get(partner, (0.0, 0))
                    row[partner] = total + cosine, count + 1

    def _report_missing(self, missing: Collection[str], measurement: Measurement) -> None:
        for name in sorted(missing):
            if name in self.balance and measurement.weights.get(name):
                raise self.error(f"balance: the gradient of {name!r} does not reach the {self.at} of the student")
        named = " and ".join(map(repr, sorted(missing)))
        self.warn_once("missing", f"the gradient of {named} does not reach the {self.at} and is not measured")

    def _figure(self) -> Any:
        names = list(dict.fromkeys(name for row in self._history for name in row if name != "step"))
        rows = []
        for name in names:
            points = [(row["step"], row[name]) for row in self._history if name in row]
            panels = []
            for index in range(3):
                finite = [(step, values[index]) for step, values in points if math.isfinite(values[index])]
                curve = [step for step, _ in finite], [value for _, value in finite]
                panels.append(("", {"": curve}) if finite else None)
            rows.append((name, panels))
        columns = (f"share, relative to {self.reference}", "norm of the gradient", f"cosine with {self.reference}")
        cosines = {
            name: {partner: total / count for partner, (total, count) in row.items()}
            for name, row in self._cosines.items()
        }
        return draw_sections([Section(f"Gradients at the student's {self.at}", columns, rows)], [""], cosines)


def _triple(share: Share) -> tuple[float, float, float]:
    return share.share, share.norm, share.cosine


def _curves(share: Share) -> list[tuple[str, float]]:
    named = zip(("gradient_share", "gradient_norm", "gradient_cosine"), _triple(share), strict=True)
    return [*named, *((f"gradient_cosine/{partner}", cosine) for partner, cosine in share.cosines.items())]
