from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.heads.kd import KD
from distill.schedules import (
    After,
    Constant,
    Cosine,
    Linear,
    Progress,
    Schedule,
    Span,
    Step,
    Until,
    Warmup,
    require_finite_values,
    require_values_above,
    value_at,
)


def at(step: int, steps: int | None = 100, per_epoch: int = 10) -> Progress:
    return Progress(step, step / per_epoch, steps, None if steps is None else steps / per_epoch)


def test_a_plain_number_is_its_own_value() -> None:
    assert value_at(3, at(7)) == 3.0
    assert isinstance(value_at(3, at(7)), float)


def test_a_constant_never_changes() -> None:
    assert [value_at(Constant(0.5), at(step)) for step in (0, 50, 100)] == [0.5, 0.5, 0.5]


def test_linear_runs_over_the_whole_run_by_default() -> None:
    schedule = Linear(4.0, 1.0)
    assert [schedule(at(step)) for step in (0, 50, 100, 200)] == [4.0, 2.5, 1.0, 1.0]


def test_linear_over_a_number_of_steps_ends_there() -> None:
    schedule = Linear(0.0, 1.0, steps=20)
    assert [schedule(at(step)) for step in (0, 5, 20, 90)] == [0.0, 0.25, 1.0, 1.0]


def test_linear_over_epochs_counts_fractions_of_an_epoch() -> None:
    schedule = Linear(0.0, 1.0, epochs=2)
    assert [schedule(at(step)) for step in (0, 5, 10, 20, 30)] == [0.0, 0.25, 0.5, 1.0, 1.0]


def test_cosine_falls_along_half_a_wave() -> None:
    schedule = Cosine(0.5, 0.07)
    assert schedule(at(0)) == 0.5
    assert schedule(at(25)) == pytest.approx(0.07 + 0.43 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule(at(50)) == pytest.approx(0.285)
    assert schedule(at(100)) == 0.07


def test_a_wave_may_begin_later_as_the_weights_of_wkd_do() -> None:
    figures = json.loads((Path(__file__).parent / "new_methods.json").read_text())["schedules"]
    schedule = Cosine(1.0, 0.0, epochs=90, after=150)
    for epoch, factor in figures["wkd_weight_factor (start 150, 240 epochs)"].items():
        assert schedule(Progress(epoch=int(epoch))) == pytest.approx(factor, rel=1e-12)
    line = Linear(2.0, 4.0, steps=10, after=5)
    assert [line(at(step)) for step in (0, 5, 10, 15, 90)] == [2.0, 2.0, 3.0, 4.0, 4.0]


def test_a_later_beginning_needs_a_length_and_is_not_negative() -> None:
    with pytest.raises(UserError, match="Cosine after 5 needs its length, steps or epochs, too"):
        Cosine(1.0, 0.0, after=5)
    with pytest.raises(UserError, match="after must be at least 0, given -1"):
        Linear(1.0, 0.0, steps=3, after=-1)


@given(step=st.integers(0, 300), start=st.floats(-9, 9), end=st.floats(-9, 9))
def test_linear_and_cosine_stay_between_their_ends(step: int, start: float, end: float) -> None:
    low, high = min(start, end) - 1e-9, max(start, end) + 1e-9
    assert low <= Linear(start, end)(at(step)) <= high
    assert low <= Cosine(start, end)(at(step)) <= high


def test_warmup_multiplies_a_number_by_a_growing_factor() -> None:
    schedule = Warmup(2.0, steps=10)
    assert [schedule(at(step)) for step in (0, 5, 10, 50)] == [0.0, 1.0, 2.0, 2.0]


def test_warmup_can_start_above_zero() -> None:
    assert Warmup(2.0, epochs=1, start=0.5)(at(0)) == 1.0


def test_warmup_multiplies_another_schedule() -> None:
    schedule = Warmup(Linear(4.0, 0.0), steps=50)
    assert [schedule(at(step)) for step in (25, 50, 75)] == [3.0 * 0.5, 2.0, 1.0]


def test_step_falls_at_each_milestone() -> None:
    schedule = Step([2, 4], value=1.0, factor=0.5)
    assert [schedule(at(step)) for step in (0, 19, 20, 39, 40, 90)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_step_can_count_steps() -> None:
    schedule = Step([5], factor=0.1, every_step=True)
    assert [schedule(at(step)) for step in (4, 5)] == [1.0, 0.1]


def test_until_is_zero_once_its_span_is_over() -> None:
    schedule = Until(0.7, epochs=3)
    assert [schedule(at(step)) for step in (0, 29, 30, 99)] == [0.7, 0.7, 0.0, 0.0]


@pytest.mark.parametrize("schedule", [Linear(1, 0), Cosine(1, 0), Warmup(), Until()])
def test_a_span_over_an_endless_run_is_refused(schedule: Schedule) -> None:
    with pytest.raises(UserError, match=f"{type(schedule).__name__} over a run without an end"):
        schedule(at(3, steps=None))


def test_a_span_of_its_own_length_needs_no_end_of_the_run() -> None:
    assert Warmup(1.0, steps=10)(at(5, steps=None)) == 0.5


def test_a_span_takes_steps_or_epochs_not_both() -> None:
    with pytest.raises(UserError, match="Linear takes steps or epochs, not both"):
        Linear(0, 1, steps=5, epochs=1)


@pytest.mark.parametrize("length", [{"steps": 0}, {"steps": -3}, {"epochs": 0.0}])
def test_a_span_needs_a_positive_length(length: dict[str, int]) -> None:
    with pytest.raises(UserError, match="needs a positive length"):
        Warmup(1.0, **length)


def test_step_needs_rising_milestones() -> None:
    with pytest.raises(UserError, match="rising order"):
        Step([4, 2])


def test_a_users_schedule_is_a_function_of_progress() -> None:
    class Halving(Span):
        def __call__(self, progress: Progress) -> float:
            return 0.5**progress.step

    assert value_at(Halving(), at(3)) == 0.125


def test_after_is_zero_until_its_span_is_over() -> None:
    schedule = After(0.7, epochs=3)
    assert [schedule(at(step)) for step in (0, 29, 30, 90)] == [0.0, 0.0, 0.7, 0.7]


@given(step=st.integers(0, 300), length=st.integers(1, 200))
def test_start_begins_where_stop_ends(step: int, length: int) -> None:
    assert After(steps=length)(at(step)) + Until(steps=length)(at(step)) == 1.0


def test_start_without_a_length_is_refused() -> None:
    with pytest.raises(UserError, match="After needs steps or epochs"):
        After(2.0)


NUMBERS = st.floats(-9, 9)
SCHEDULES = st.one_of(
    st.builds(Constant, NUMBERS),
    st.builds(Linear, NUMBERS, NUMBERS),
    st.builds(Cosine, NUMBERS, NUMBERS, steps=st.integers(1, 50)),
    st.builds(Step, st.lists(st.floats(0, 9), max_size=3).map(sorted), NUMBERS, st.floats(0, 2)),
)
NESTED = st.one_of(
    SCHEDULES,
    st.builds(Warmup, st.one_of(NUMBERS, SCHEDULES), epochs=st.floats(0.1, 9), start=st.floats(0, 2)),
    st.builds(Until, st.one_of(NUMBERS, SCHEDULES), steps=st.integers(1, 99)),
    st.builds(After, st.one_of(NUMBERS, SCHEDULES), steps=st.integers(1, 99)),
)


@given(schedule=NESTED, step=st.integers(0, 120))
def test_no_schedule_leaves_its_bounds(schedule: Schedule, step: int) -> None:
    bounds = schedule.bounds()
    assert bounds is not None
    assert bounds[0] - 1e-9 <= schedule(at(step)) <= bounds[1] + 1e-9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "make",
    [
        Constant,
        lambda bad: Linear(bad, 1),
        lambda bad: Linear(1, bad),
        lambda bad: Cosine(1, bad),
        lambda bad: Linear(1, 0, epochs=bad),
        lambda bad: Warmup(bad),
        lambda bad: Warmup(1.0, start=bad),
        lambda bad: Step([2], value=bad),
        lambda bad: Step([2], factor=bad),
        lambda bad: Step([bad]),
        Until,
        lambda bad: After(bad, steps=1),
    ],
)
def test_numbers_that_are_not_finite_are_refused(make: Callable[[float], Schedule], bad: float) -> None:
    with pytest.raises(UserError, match="must be finite, given|needs a positive length, given"):
        make(bad)


@pytest.mark.parametrize("make", [lambda: Warmup(1.0, start=-0.1), lambda: Step([-1]), lambda: Step([1], factor=-1.0)])
def test_numbers_that_cannot_be_negative_are_refused(make: Callable[[], Schedule]) -> None:
    with pytest.raises(UserError, match="must be at least 0, given -"):
        make()


@pytest.mark.parametrize(
    "schedule",
    [
        Linear(4.0, 0.0),
        Cosine(0.0, 4.0),
        Cosine(4.0, -1.0),
        Warmup(4.0),
        Until(4.0),
        After(4.0, steps=2),
        Constant(0.0),
    ],
)
def test_a_temperature_that_reaches_0_is_refused(schedule: Schedule) -> None:
    with pytest.raises(UserError, match=f"temperature must be above 0, but {type(schedule).__name__} reaches"):
        require_values_above(0, temperature=schedule)
    with pytest.raises(UserError, match="temperature must be above 0"):
        KD(temperature=schedule)


def test_a_temperature_that_stays_above_0_passes() -> None:
    for schedule in (Linear(4.0, 1.0), Warmup(4.0, start=0.5), Step([2], 4.0)):
        assert KD(temperature=schedule).temperature is schedule
    with pytest.raises(UserError, match="temperature must be finite, given inf"):
        KD(temperature=math.inf)


def test_a_users_schedule_is_checked_over_the_run() -> None:
    class Vanishing(Schedule):
        def __call__(self, progress: Progress) -> float:
            return 1.0 if progress.step < 7 else math.inf

    require_values_above(0, temperature=Vanishing())
    require_finite_values(Vanishing(), at(0, steps=7))
    with pytest.raises(UserError, match="Vanishing gives inf at step 7, but every value must be finite"):
        require_finite_values(Vanishing(), at(0, steps=8))
