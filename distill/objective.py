"""Weighted sum of a student's loss terms, independent of the training loop."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from distill.errors import UserError, did_you_mean, under
from distill.features import Features, FeatureSpec, Summary
from distill.heads.base import Batch, Head, RunInfo
from distill.heads.parts.summaries import request_of
from distill.precision import rounded
from distill.randomness import seeded_by
from distill.schedules import Progress, Schedule, require_finite_values
from distill.store import Request, StoredFeatures
from distill.terms import TASK, TEACHER, Term, key_of, teacher_key
from distill.views import batch_of_views, count_views, rows_of_views

__all__ = ["TASK", "TEACHER", "Losses", "Objective", "Teachers", "Term", "key_of", "teacher_key"]

_RESERVED = ("loss", "lr")

Teachers: TypeAlias = Features | Mapping[str, Features] | None
"""Features of the only teacher, features by teacher name, or summaries by term name."""


@dataclass(frozen=True)
class Losses:
    """The losses of one step, by term name.

    Attributes:
        total: scalar, the weighted sum to minimize.
        values: unweighted value of each term, attached to the graph; a term whose teacher did not run has none.
        weights: weight of each term at this step (schedule x factor).
        diagnostics: further scalars of each term's head, detached from the graph.
    """

    total: Tensor
    values: Mapping[str, Tensor]
    weights: Mapping[str, float]
    diagnostics: Mapping[str, Mapping[str, Tensor]]


class Objective(nn.Module):
    """Weighted sum of loss terms.

    >>> from distill.heads import KD, RKD
    >>> shapes = FeatureSpec(logits=(10,), embedding=(64,))
    >>> objective = Objective({"kd": Term(KD()), "rkd": Term(RKD(), weight=0.5)}, shapes, shapes)
    >>> student, teacher = (Features(logits=torch.randn(8, 10), embedding=torch.randn(8, 64)) for _ in range(2))
    >>> losses = objective(student, teacher, {"image": torch.rand(8, 3, 32, 32)}, Progress(step=0))
    >>> sorted(losses.values), losses.weights["rkd"]
    (['kd', 'rkd'], 0.5)

    Args:
        terms: terms by name; `None` and terms with the constant weight 0 are dropped. The term named `task` is the
            loss on the labels.
        student: shapes of the student's features.
        teachers: shapes of the teacher's features, or of several teachers' features by name; `None` without a teacher.

    Attributes:
        terms: the active terms by name.
        heads: the heads of the active terms by name, as submodules.
        factors: buffer `[terms]` that multiplies the weights; 1 unless changed by `set_factors`.
        views: number of views of each image in a training batch, `None` before `prepare` or if it is not known.

    Raises:
        UserError: no term is active, a name is reserved, or a head does not fit the networks; the message begins with
            the term's configuration key.
    """

    factors: Tensor

    def __init__(
        self,
        terms: Mapping[str, Term | None],
        student: FeatureSpec,
        teachers: FeatureSpec | Mapping[str, FeatureSpec] | None = None,
    ) -> None:
        super().__init__()
        specs = {TEACHER: teachers} if isinstance(teachers, FeatureSpec) else dict(teachers or {})
        self.terms: dict[str, Term] = {}
        self.heads = nn.ModuleDict()
        for name, term in terms.items():
            if not name or name in _RESERVED or "." in name or hasattr(nn.ModuleDict, name):
                raise UserError(f"model.heads: a term cannot be called {name!r}; choose another name")
            if term is None or term.is_off:
                continue
            if not isinstance(term.weight, Schedule) and not math.isfinite(term.weight):
                raise UserError(f"{key_of(name)}.weight must be finite, given {term.weight}")
            with under(f"{key_of(name)}.head"):
                teacher = specs.get(self._teacher_of(term, specs) or "")
                term.head.check(student, teacher)
                # By a key, so that it depends neither on other terms nor on networks that were made before.
                with seeded_by("head", name, torch.initial_seed()):
                    term.head.build(student, teacher if teacher is not None else student)
            with under(key_of(name)):
                term.require_comparable_views(student, teacher)
            self.terms[name] = term
            self.heads[name] = term.head
        if not self.terms:
            raise UserError(
                "model.task: no term of the loss has a weight; set a weight for the task or for one of model.heads"
            )
        self.teacher_names = tuple(specs)
        self.views: int | None = None
        self.register_buffer("factors", torch.ones(len(self.terms), dtype=torch.float32))
        self._factors = dict.fromkeys(self.terms, 1.0)  # on the host, so that no step synchronizes
        self.register_load_state_dict_post_hook(_read_factors)  # type: ignore[no-untyped-call]  # torch's

    def set_factors(self, factors: Mapping[str, float]) -> None:
        """Set the factors of the named terms; all others keep theirs."""
        rounded = torch.tensor(list({**self._factors, **factors}.values()), dtype=self.factors.dtype)
        self._factors = dict(zip(self.terms, rounded.tolist(), strict=True))  # as a checkpoint will restore them
        self.factors.copy_(rounded)

    def factor(self, name: str) -> float:
        """Return the factor of a term, without waiting for a device."""
        return self._factors[name]

    def prepare(self, run: RunInfo) -> None:
        """Prepare all terms for a run and check that they fit it, before step 0.

        Raises:
            UserError: a term does not fit the run; the message begins with the term's configuration key.
        """
        self.views = run.views
        for name, term in self.terms.items():
            schedules = {"weight": term.weight} | {f"head.{key}": value for key, value in vars(term.head).items()}
            for key, schedule in schedules.items():
                if isinstance(schedule, Schedule):
                    with under(f"{key_of(name)}.{key}"):
                        require_finite_values(schedule, run.progress)
            with under(key_of(name)):
                run_of_term = term.run_on_its_views(run)
            with under(f"{key_of(name)}.head"):
                for need in sorted(term.head.batch_needs - run_of_term.provides):
                    raise UserError(
                        f"{type(term.head).__name__} needs {need}: {_REMEDIES.get(need, 'the batches hold none')}"
                    )
                term.head.progress = run.progress
                term.head.prepare(run_of_term)

    def active(self, progress: Progress) -> Mapping[str, Sequence[str]]:
        """Return the names of the terms that read each teacher, by teacher name.

        A teacher is left out while none of its terms has a weight or keeps a memory.
        """
        found: dict[str, list[str]] = {}
        needed: set[str] = set()
        for name, term in self.terms.items():
            if (teacher := self.teacher_of(name)) is not None:
                found.setdefault(teacher, []).append(name)
                if self._weight(name, progress) != 0 or any(True for _ in term.head.buffers()):
                    needed.add(teacher)
        return {teacher: names for teacher, names in found.items() if teacher in needed}

    def requests(self, teacher: str) -> dict[str, Request]:
        """Return what the terms that compare with a teacher would read of it if it is stored, by term name."""
        return {
            name: request_of(term.head, term.summary_dtype)
            for name, term in self.terms.items()
            if self.teacher_of(name) == teacher
        }

    def teacher_of(self, name: str) -> str | None:
        """Return the name of the teacher that a term compares with; `None` for a loss on labels."""
        return self._teacher_of(self.terms[name], self.teacher_names)

    def summarize(self, teachers: Teachers, batch: Batch, progress: Progress) -> dict[str, Summary]:
        """Reduce the teachers' features to what each head compares.

        A batch's views are summarized one after the other, as they are stored.

        Args:
            teachers: features of the only teacher, or features by teacher name; summaries by term name are passed
                through.
            batch: the networks' input.
            progress: training progress.

        Returns:
            Summaries by term name.
        """
        if teachers is None:
            return {}
        if isinstance(teachers, Features):
            if len(self.teacher_names) > 1:
                raise UserError(f"there are several teachers, {', '.join(self.teacher_names)}: give features by name")
            teachers = dict.fromkeys(self.teacher_names, teachers)
        summaries: dict[str, Summary] = {}
        for teacher, names in self.active(progress).items():
            for name in names:
                given = teachers.get(name)  # a summary, unless a teacher has the term's name
                features = given if isinstance(given, Summary) else teachers[teacher]
                summaries[name] = self.summary(name, features, batch)
        return summaries

    def summary(self, name: str, teacher: Features, batch: Batch) -> Summary:
        """Reduce a teacher's features to what one term compares with, or take them from what was stored for it."""
        if isinstance(teacher, Summary):
            return self.terms[name].head.summary(teacher, batch)
        if (views := self.count_views(batch)) == 1:
            return self._summary_of_view(name, teacher, batch)
        chosen = self.terms[name].teacher_views_of(views)
        parts = {
            view: self._summary_of_view(
                name, rows_of_views(teacher, [view], views), batch_of_views(batch, [view], views)
            )
            for view in dict.fromkeys(chosen)
        }
        return Summary.joined([parts[view] for view in chosen])

    def count_views(self, batch: Batch) -> int:
        """Return the number of views of each image in a batch."""
        return count_views(batch, self.views)

    def _summary_of_view(self, name: str, teacher: Features, batch: Batch) -> Summary:
        term = self.terms[name]
        if isinstance(teacher, StoredFeatures):
            if name not in teacher.summaries:
                raise UserError(f"{key_of(name)}: the batch has no stored rows: `attach` them to its data module")
            return term.head.summary(teacher.summaries[name], batch)
        summary = term.head.summary(teacher, batch)
        dtype = getattr(torch, term.summary_dtype)
        return summary if dtype == torch.float32 else summary.apply(lambda tensor: rounded(tensor, dtype))

    def forward(self, student: Features, teachers: Teachers, batch: Batch, progress: Progress) -> Losses:
        """Compute all terms and their weighted sum; the other arguments are those of `summarize`."""
        summaries = self.summarize(teachers, batch, progress)
        weights = {name: self._weight(name, progress) for name in self.terms}
        values: dict[str, Tensor] = {}
        parts: list[Tensor] = []
        views = self.count_views(batch)
        for name, term in self.terms.items():
            term.head.progress = progress
            if term.head.needs_teacher and name not in summaries:
                parts.append(self._zero(term.head, student))
                continue
            chosen = term.views_of(views)
            values[name] = term.head(
                rows_of_views(student, chosen, views), summaries.get(name), batch_of_views(batch, chosen, views)
            )
            parts.append(weights[name] * values[name])
        diagnostics = {name: self.terms[name].head.diagnostics() for name in values}
        return Losses(torch.stack(parts).sum(), values, weights, diagnostics)

    def _zero(self, head: Head, student: Features) -> Tensor:
        """Return 0 with a gradient of 0 for all that a head reads, so that DDP and the optimizer miss no parameter."""
        read = [*(student[name] for name in sorted(head.needs_of("student"))), *head.parameters()]
        zero = self.factors.new_zeros((), dtype=torch.float32)
        return sum(((0 * tensor).sum() for tensor in read), zero)  # first times 0, as a sum of float16 may overflow

    def _weight(self, name: str, progress: Progress) -> float:
        return self.terms[name].weight_at(progress) * self._factors[name]

    @staticmethod
    def _teacher_of(term: Term, names: Collection[str]) -> str | None:
        if term.teacher is not None and not term.head.needs_teacher:
            raise UserError(f"{type(term.head).__name__} compares with no teacher: remove the term's teacher")
        if term.teacher is not None and term.teacher not in names:
            raise UserError(f"there is no teacher {term.teacher!r}: {did_you_mean(term.teacher, names)}")
        if term.teacher is not None or not term.head.needs_teacher:
            return term.teacher
        if len(names) > 1:
            raise UserError(f"there are several teachers, {', '.join(names)}: name one of them as the term's teacher")
        return next(iter(names), None)


def _read_factors(objective: Any, _: Any) -> None:
    objective._factors = dict(zip(objective.terms, objective.factors.tolist(), strict=True))


_REMEDIES = {
    "view": "give two views of each image, such as data.train_views [weak, strong]",
    "index": "give each image's place in the data set as the third of (image, label, index)",
    "segments": "add the callback SuperpixelSegments to trainer.callbacks",
}
