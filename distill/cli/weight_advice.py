"""Weights at which the terms have a share of the gradient, from measurements."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import copysign, isfinite, nan
from statistics import median, quantiles
from typing import Any

from lightning.pytorch import Trainer

from distill.callbacks.weighing import Weighing
from distill.errors import UserError
from distill.gradients import Measurement, Share
from distill.objective import TASK, Objective, Term
from distill.schedules import Schedule
from distill.training.run_info import progress_of

_PLACES = {"parameters": "student's parameters below the classifier", "embedding": "embedding", "tokens": "tokens"}


@dataclass(frozen=True)
class TermAdvice:
    """Figures of one term: medians over the measured steps.

    Attributes:
        name: name of the term.
        value: its unweighted value.
        ratios: quartiles of the norm of its unweighted gradient relative to the reference's; NaN if not measured.
        cosine: of the angle to the reference's gradient.
        weight: its configured weight; of a schedule, the largest.
        share: its share of the gradient at that weight.
        advised: the weight that gives it the share asked for; `None` if there is none.
    """

    name: str
    value: float
    ratios: tuple[float, float, float]
    cosine: float
    weight: float
    share: float
    advised: float | None


@dataclass(frozen=True)
class Advice:
    """Advice for all terms.

    Attributes:
        reference: the term that shares are relative to.
        share: the share asked for.
        title: what was measured where.
        terms: the terms, the reference first.
        cosines: medians of the cosines between the gradients of measured terms.
        notes: sentences on what was not measured, and on what the figures do not say.
        heads: `weight` of each head, as `model.heads` takes it.
    """

    reference: str
    share: float
    title: str
    terms: Sequence[TermAdvice]
    cosines: Mapping[str, Mapping[str, float]]
    notes: Sequence[str]
    heads: Mapping[str, Any]


def advise(weighing: Weighing, objective: Objective, trainer: Trainer, share: float) -> Advice:
    """Compute the advice from the measurements of a run.

    Args:
        weighing: the callback with the measurements.
        objective: the run's objective.
        trainer: the trainer of the run, which knows the length of schedules.
        share: the share asked for.

    Raises:
        UserError: the terms cannot be compared.
    """
    location = _PLACES[weighing.at]
    reference = _reference(weighing.measurements, objective, location)
    usable = [
        shares
        for measured in weighing.measurements
        if reference in measured.products and (shares := measured.shares(reference))[reference].norm > 0
    ]
    if not usable:
        raise UserError(
            f"the gradient of {reference!r} was 0 in all {len(weighing.measurements)} measured steps, so nothing can "
            "be compared with it: are there labels in the batches, and is its weight not 0?"
        )
    schedules = {name: _weights(term, trainer) for name, term in objective.terms.items()}
    peaks = {name: max(weights, key=abs) for name, weights in schedules.items()}
    taking_turns = [name for name in objective.terms if _take_turns(schedules[name], schedules[reference])]
    names = [reference, *(name for name in objective.terms if name != reference)]
    notes = _notes(weighing, objective, reference, usable, location, taking_turns)
    terms, heads = [], {}
    for name in names:
        found = [part[name] for part in usable if name in part]
        ratios = _quartiles([part.ratio for part in found])
        advised = None
        if name != reference and ratios[1] > 0 and name not in taking_turns:
            advised = copysign(share * abs(peaks[reference]) / ratios[1], peaks[name])
        terms.append(
            TermAdvice(
                name=name,
                value=median([measured.values[name] for measured in weighing.measurements]),
                ratios=ratios,
                cosine=_median([part.cosine for part in found]),
                weight=peaks[name],
                share=abs(peaks[name] / peaks[reference]) * ratios[1],
                advised=advised,
            )
        )
        if name == TASK:
            continue
        factor = 1.0 if advised is None else advised / peaks[name]
        weight = scaled_weight(objective.terms[name].weight, factor)
        heads[name] = {} if weight is None else {"weight": weight}
        if weight is None:
            notes.append(
                f"{name}: its weight is a schedule of another kind, {type(objective.terms[name].weight).__name__}: "
                f"multiply it by {factor:.3g}."
            )
    title = f"Gradients at the {location}: {len(usable)} steps from step {weighing.first}"
    cosines = _cosines([term.name for term in terms if term.ratios[1] > 0], usable)
    return Advice(reference, share, title, terms, cosines, notes, heads)


def scaled_weight(weight: float | Schedule, factor: float) -> Any:
    """Return a weight times a factor, as a configuration writes it; `None` for a schedule of an unknown kind."""
    if not isinstance(weight, Schedule):
        return float(f"{weight * factor:.3g}")
    kind = type(weight)
    arguments: dict[str, Any] = {
        name: value for name in inspect.signature(kind).parameters if (value := getattr(weight, name, None)) is not None
    }
    scaled = ["value"] if "value" in arguments else ["start", "end"]
    if not set(scaled) <= arguments.keys():
        return None
    for name in scaled:
        if (value := scaled_weight(arguments[name], factor)) is None:
            return None
        arguments[name] = value
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def _reference(measurements: Sequence[Measurement], objective: Objective, location: str) -> str:
    """Return the task, or without one the term with the largest weighted gradient."""
    measured = {name for measurement in measurements for name in measurement.products}
    if TASK in objective.terms:
        if TASK not in measured:
            raise UserError(f"at: the task's gradient does not reach the {location}: measure at the parameters")
        return TASK
    pulls = {
        name: _median([abs(m.weights[name]) * m.norm(name) for m in measurements if name in m.products])
        for name in objective.terms
        if name in measured
    }
    if not any(pulls.values()):
        raise UserError(f"at: no term has a gradient at the {location}, so there is nothing to compare")
    return max(pulls, key=lambda name: pulls[name])


def _weights(term: Term, trainer: Trainer) -> list[float]:
    """Return a term's weight at a hundred steps of the run."""
    length = progress_of(trainer, 0).steps or 10**6
    return [term.weight_at(progress_of(trainer, round(part * (length - 1) / 100))) for part in range(101)]


def _take_turns(weights: Sequence[float], of_reference: Sequence[float]) -> bool:
    """Return True if the two weights are never both different from 0."""
    return not any(weight and partner for weight, partner in zip(weights, of_reference, strict=True))


def _notes(
    weighing: Weighing,
    objective: Objective,
    reference: str,
    usable: Sequence[Mapping[str, Share]],
    location: str,
    taking_turns: Sequence[str],
) -> list[str]:
    notes = []
    if reference != TASK:
        notes.append(f"{reference}: the reference, as there is no task and its weighted gradient is the largest.")
    if missing := len(weighing.measurements) - len(usable):
        notes.append(f"{reference}: its gradient was 0 in {missing} of the steps; they are left out.")
    for name in objective.terms:
        found = [shares[name] for shares in usable if name in shares]
        weight = weighing.measurements[0].weights[name]
        filled = weighing.memories.get(name, 0.0)
        if name in weighing.unfilled:
            notes.append(f"{name}: not measured, as its memory was filled to {filled:.0%} when the run ended.")
        elif not found:
            notes.append(f"{name}: not measured, as its gradient does not reach the {location}.")
        elif not any(share.norm for share in found):
            notes.append(f"{name}: it has no gradient there in these steps, as in an initialization stage of its head.")
        if name in taking_turns:
            notes.append(
                f"{name}: never on at the same time as {reference} by their schedules (an initialization stage), so "
                "they never share a step, and its weight stays."
            )
        elif weight == 0:
            notes.append(
                f"{name}: its weight is 0 in these steps by its schedule (an initialization stage); the ratios are "
                "those of a student that it did not train yet."
            )
    return notes


def _cosines(names: Sequence[str], usable: Sequence[Mapping[str, Share]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            partner: _median([found[name].cosines[partner] for found in usable if name in found and partner in found])
            for partner in names
            if partner != name
        }
        for name in names
    }


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3 if values else (nan, nan, nan)
    first, middle, last = quantiles(values, n=4, method="inclusive")
    return first, middle, last


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if isfinite(value)]
    return median(finite) if finite else nan
