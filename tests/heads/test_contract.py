"""Every shipped head against the whole contract, and the contract against heads that break it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from distill.distributed import gather
from distill.errors import UserError
from distill.features import Features, FeatureSpec, Summary
from distill.heads import CTKD, FSP, FT, Batch, Head, RepDistillerCC, SeRKD, shipped
from distill.schedules import Progress
from distill.testing import (
    CHECKS,
    Case,
    arguments_have_defaults_and_words,
    batch_order_does_not_matter,
    check_head,
    copies_behave_alike,
    degenerate_inputs_stay_finite,
    everything_is_trained,
    gradient_is_the_derivative,
    half_precision_computes_in_float32,
    inputs_stay_as_they_are,
    nothing_waits_for_the_device,
    summaries_can_be_stored,
    teacher_gets_no_gradient,
    two_ranks_equal_one,
)
from tests.two_ranks import RankPool

every_head = pytest.mark.parametrize("make", shipped().values(), ids=shipped().keys())

EXPECTED: dict[type[Head], dict[str, Any]] = {
    CTKD: {"exact_gradient": {"gradient_scale": 1.0}, "progress": Progress(epoch=10)},  # after its ramp
    FSP: {"same_widths": True},
    FT: {"exact_gradient": {"initialization": 0.0}},
    RepDistillerCC: {"ordered": True},
    SeRKD: {"exact_gradient": {"gradient": "full"}},
}
"""Arguments of the contract for the heads that need any."""


def case_of(make: type[Head], device: str = "cpu") -> Case:
    return Case(make, **EXPECTED.get(make, {}), device=torch.device(device))


@every_head
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_shipped_head(make: type[Head], check: Callable[[Case], None], device: torch.device) -> None:
    check(case_of(make, device.type))


@every_head
def test_shipped_head_on_two_ranks_equals_one_process(make: type[Head], pool: RankPool) -> None:
    two_ranks_equal_one(case_of(make), pool.run)


@every_head
def test_shipped_head_on_two_devices_equals_one_process(make: type[Head], cuda_pool: RankPool) -> None:
    two_ranks_equal_one(case_of(make, "cuda"), cuda_pool.run)


class Good(Head):
    """Keeps the whole contract, with a projection and a memory.

    Args:
        size: rows of the memory.
    """

    needs = frozenset({"embedding", "tap"})
    memory: Tensor
    project: Callable[[Tensor], Tensor]

    def __init__(self, size: int = 5) -> None:
        super().__init__()
        self.size = size

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        self.project = nn.Linear(student["embedding"][0], teacher["embedding"][0])
        self.register_buffer("memory", torch.zeros(teacher["embedding"]))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        fresh = gather(teacher["embedding"]).mean(0)
        loss = (self.project(student["embedding"]) - self.memory).square().mean()
        with torch.no_grad():
            self.memory.lerp_(fresh, 1 / self.size)
        return loss + student["tap"].square().mean()


def test_a_head_with_projection_memory_and_tap_passes(pool: RankPool) -> None:
    check_head(Good, run=pool.run)


def test_a_head_on_shapes_of_its_own_passes(pool: RankPool) -> None:
    spec = FeatureSpec(embedding=(4,), maps={"tap": (2, 3, 3)})
    check_head(Good, student=spec, teacher=spec, run=pool.run)


class Undocumented(Good):
    """No word about its argument."""

    def __init__(self, rows: int = 5) -> None:
        super().__init__(rows)


class Untyped(Good):
    """Has no types."""

    def __init__(self, size=5) -> None:  # type: ignore[no-untyped-def]  # that is what is wrong with it
        super().__init__(size)


class WithoutDefault(Good):
    """Has no default.

    Args:
        size: rows.
        other: without a default.
    """

    def __init__(self, other: int, size: int = 5) -> None:
        super().__init__(size)


class WrongGradient(Good):
    """Stops half of its gradient."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        tap = student["tap"]
        return super().forward(student, teacher, batch) + (tap * tap.detach()).mean()


class Unused(Good):
    """Has a parameter that takes no part."""

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        super().build(student, teacher)
        self.unused = nn.Parameter(torch.ones(1))


class Careless(Good):
    """Runs without the base class's care for types and for the teacher."""

    def __call__(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        return cast(Tensor, nn.Module.__call__(self, student, teacher, batch))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        x, y = student["embedding"], teacher["embedding"]
        return ((x @ x.T) - (y @ y.T)).square().mean().to(x.dtype) + student["tap"].mean()


class Overwriting(Good):
    """Normalizes the teacher in place."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        teacher["embedding"].div_(2)
        return super().forward(student, teacher, batch)


class Writing(Good):
    """Leaves something in the batch."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        batch["own"] = batch["index"]
        return super().forward(student, teacher, batch)


class Fragile(Good):
    """Divides by a norm."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        x = student["embedding"]
        return super().forward(student, teacher, batch) + (x / x.square().sum(-1, keepdim=True).sqrt()).mean()


class Ordered(Good):
    """Compares each image with the next."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        x = student["embedding"]
        return super().forward(student, teacher, batch) + (x[1:] * x[:-1]).mean()


class Forgetful(Good):
    """Keeps its memory outside of the state."""

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        super().build(student, teacher)
        self.calls = 0

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        self.calls += 1
        return super().forward(student, teacher, batch) * self.calls


class Waiting(Good):
    """Branches on a value."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        loss = super().forward(student, teacher, batch)
        return loss if loss.item() > 0 else loss * 0


class Indexing(Good):
    """Picks rows by a mask."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return super().forward(student, teacher, batch) + student["embedding"][batch["label"] >= 0].sum()


class Lonely(Good):
    """Relates the images of its own process."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return super().forward(student, teacher, batch) + torch.pdist(student["embedding"]).mean()


class PrivateMemory(Good):
    """Remembers its own process's images."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        loss = student["tap"].mean() + self.project(student["embedding"]).square().mean()
        self.memory.copy_(teacher["embedding"].mean(0))
        return loss


class Unequal(Good):
    """Gives each image its own loss."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return student["tap"].flatten(1).mean(1)


class Summarizing(Good):
    """Compares with a fixed projection of the teacher, and keeps the contract."""

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        super().build(student, teacher)
        self.fixed = nn.Linear(teacher["embedding"][0], teacher["embedding"][0]).requires_grad_(False)

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        return Summary(embedding=self.fixed(teacher["embedding"]))

    def summary_state(self) -> dict[str, Tensor]:
        return dict(self.fixed.named_parameters())


class OfTheBatch(Summarizing):
    """Centers its summary over the batch."""

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        return Summary(embedding=teacher["embedding"] - teacher["embedding"].mean(0))


class OfThePlace(Summarizing):
    """Counts the images of the batch."""

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        places = torch.arange(len(teacher["embedding"])).unsqueeze(1)
        return Summary(embedding=teacher["embedding"] + places)


class OfTheRun(Summarizing):
    """Keeps for itself what its summary was computed with."""

    def summary_state(self) -> dict[str, Tensor]:
        return {}


class Training(Summarizing):
    """Trains its projection of the teacher."""

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        super().build(student, teacher)
        self.fixed.requires_grad_()

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return super().forward(student, teacher, batch) + sum(value.sum() for value in self.fixed.parameters())


class Remembering(Summarizing):
    """Compares with the teacher's difference from a memory."""

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        return Summary(embedding=teacher["embedding"] - self.memory)


class Progressing(Summarizing):
    """Scales its summary by its progress."""

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        return Summary(embedding=teacher["embedding"] * (1 + self.progress.step))


class WithoutJson(Summarizing):
    """Describes itself by what no file can hold."""

    def summary_key(self) -> dict[str, Any]:
        return {"type": torch.float32}


class Twice(Summarizing):
    """Tells a summary from the teacher's features, and treats it differently."""

    def __call__(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        loss = super().__call__(student, teacher, batch)
        return loss * 2 if isinstance(teacher, Summary) else loss


class Greedy(Good):
    """Reads what it does not name."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return super().forward(student, teacher, batch) + student["logits"].mean()


@pytest.mark.parametrize(
    ("make", "check", "message"),
    [
        (Untyped, arguments_have_defaults_and_words, "argument 'size' of Untyped has no type"),
        (Undocumented, arguments_have_defaults_and_words, "argument 'rows' of Undocumented is not described"),
        (WithoutDefault, arguments_have_defaults_and_words, "argument 'other' of WithoutDefault has no default"),
        (WrongGradient, gradient_is_the_derivative, "not the derivative"),
        (Unused, everything_is_trained, "parameter 'unused' of Unused gets no gradient"),
        (Careless, teacher_gets_no_gradient, "gives the teacher's 'embedding' a gradient"),
        (Careless, half_precision_computes_in_float32, "does not compute in float32"),
        (Overwriting, inputs_stay_as_they_are, "changes the teacher's 'embedding'"),
        (Writing, inputs_stay_as_they_are, "adds to the batch"),
        (Fragile, degenerate_inputs_stay_finite, "zeros in"),
        (Ordered, batch_order_does_not_matter, "depends on the order"),
        (Forgetful, copies_behave_alike, "a new head with the state_dict of Forgetful behaves differently"),
        (Waiting, nothing_waits_for_the_device, "on the host"),
        (Indexing, nothing_waits_for_the_device, "on the host"),
        (Unequal, everything_is_trained, "instead of a scalar"),
        (OfTheBatch, summaries_can_be_stored, "is not row by row"),
        (OfThePlace, summaries_can_be_stored, "is not row by row"),
        (OfTheRun, summaries_can_be_stored, "name in summary_state what it was computed with"),
        (Training, summaries_can_be_stored, "changes in training"),
        (Remembering, summaries_can_be_stored, "changes in training"),
        (Progressing, summaries_can_be_stored, "changes in training"),
        (Twice, summaries_can_be_stored, "has another loss from the teacher's summary than from its features"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_head_that_breaks_the_contract_is_reported(make: Any, check: Callable[[Case], None], message: str) -> None:
    broken = (lambda: make(other=1)) if make is WithoutDefault else make
    check(Case(Good))
    with pytest.raises(AssertionError, match=message):
        check(Case(broken))


def test_a_summary_with_a_fixed_projection_can_be_stored() -> None:
    check_head(Summarizing)


def test_a_key_that_no_file_can_hold_is_reported() -> None:
    with pytest.raises(UserError, match="the summary_key of WithoutJson must be made of JSON values"):
        summaries_can_be_stored(Case(WithoutJson))


@pytest.mark.parametrize("make", [partial(SeRKD, "segments", features=1.0), partial(SeRKD, of="tap", cell=(1, 1))])
def test_summaries_of_segments_and_of_maps_can_be_stored(make: Any) -> None:
    summaries_can_be_stored(Case(make))


def test_a_head_declared_ordered_must_depend_on_the_order_and_may() -> None:
    batch_order_does_not_matter(Case(Ordered, ordered=True))
    with pytest.raises(AssertionError, match="Good is declared ordered, but no order matters"):
        batch_order_does_not_matter(Case(Good, ordered=True))


def test_a_stopped_gradient_is_checked_with_the_arguments_that_let_it_through() -> None:
    check_head(SeRKD, exact_gradient={"gradient": "full"})
    with pytest.raises(AssertionError, match="not the derivative"):
        gradient_is_the_derivative(Case(SeRKD))


@pytest.mark.parametrize("make", [Lonely, PrivateMemory])
def test_a_head_that_differs_on_two_ranks_is_reported(make: type[Head], pool: RankPool) -> None:
    with pytest.raises(AssertionError, match="two ranks do not equal one process"):
        two_ranks_equal_one(Case(make), pool.run)


def test_a_head_is_given_only_what_it_names() -> None:
    with pytest.raises(UserError, match="gives no 'logits'"):
        check_head(Greedy)
