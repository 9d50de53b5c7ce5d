"""The contract of a head as checks that run on any head and need only torch.

In a test of your own head::

    def test_my_head_keeps_the_contract():
        check_head(MyHead)

Each check raises an AssertionError whose first line names the failure. The features are random tensors of the shapes
`STUDENT` and `TEACHER`, of which a head receives exactly those that it names in `needs` or, if it has one, `needs_of`.
A head that calls a network's classifier gets a fixed linear one.
"""

from __future__ import annotations

import inspect
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from distill.distributed import all_mean, gather, world_size
from distill.features import Features, FeatureSpec
from distill.schedules import Progress
from distill.testing.case import STUDENT, TEACHER, Case, Make, Result, Sample, evaluate, seeded
from distill.testing.devices import no_waiting, nothing_waits_for_the_device
from distill.testing.summaries import summaries_can_be_stored

__all__ = [
    "CHECKS",
    "DEGENERATE",
    "STUDENT",
    "TEACHER",
    "Case",
    "Result",
    "Sample",
    "check_head",
    "evaluate",
    "no_waiting",
]

Runner = Callable[..., Sequence[Any]]
"""`run(function, *arguments)` runs the function on two ranks and returns both results."""


def check_head(
    make: Make,
    student: FeatureSpec = STUDENT,
    teacher: FeatureSpec = TEACHER,
    run: Runner | None = None,
    *,
    exact_gradient: Mapping[str, Any] | None = None,
    ordered: bool = False,
    same_widths: bool = False,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Check a head against the whole contract.

    Args:
        make: returns a new head: its class, or a `functools.partial` of it.
        student: the student's shapes; taps that the head needs and the spec lacks get a made-up map.
        teacher: the teacher's shapes.
        run: runs a function on two ranks; without it, the check of two ranks is skipped.
        exact_gradient: arguments under which the head's gradient is the derivative of its value, for a head that by
            default stops a part of the gradient.
        ordered: whether the value is meant to depend on the order of the batch.
        same_widths: whether the head requires both networks to have the same channels; the teacher then gets the
            student's.
        progress: the progress of training at which the head is called, by default step 0.
        device: the device to check it on; on CUDA, torch itself tells `nothing_waits_for_the_device` of waits.

    Raises:
        AssertionError: the head fails one of `CHECKS`.
    """
    given = (exact_gradient or {}, ordered, same_widths, progress or Progress(), torch.device(device))
    case = Case(make, student, teacher, Case.size, *given)
    for check in CHECKS:
        check(case)
    if run is not None:
        two_ranks_equal_one(case, run)


def arguments_have_defaults_and_words(case: Case) -> None:
    """Check that every argument of `__init__` has a type, a default and a line under `Args:`."""
    kind = type(case.make())
    words = "".join((inspect.getdoc(base) or "").partition("\nArgs:")[2] for base in kind.__mro__)
    for argument in list(inspect.signature(kind.__init__).parameters.values())[1:]:
        subject = f"argument {argument.name!r} of {kind.__name__}"
        assert argument.annotation is not argument.empty, f"{subject} has no type"
        assert argument.default is not argument.empty, f"{subject} has no default"
        assert f"\n    {argument.name}: " in words, f"{subject} is not described under Args: in the docstring"


def gradient_is_the_derivative(case: Case) -> None:
    """Compare the gradient with finite differences in float64, for the student's features and the head's parameters.

    The head is made with the arguments of the case's `exact_gradient`.
    """
    if case.exact_gradient:
        case = replace(case, make=partial(case.make, **case.exact_gradient))
    head, sample = case.head(), case.sample()
    names = sorted(head.needs_of("student"))
    parameters = {key: value.detach() for key, value in head.named_parameters() if value.requires_grad}

    def loss(*tensors: Tensor) -> Tensor:
        features = dict(zip(names, tensors, strict=False))
        values = dict(zip(parameters, tensors[len(names) :], strict=True))
        student = replace(
            sample.student,
            **{key: value for key, value in features.items() if key not in sample.student.maps},  # type: ignore[arg-type]
            maps={key: features[key] for key in sample.student.maps},
        )
        arguments = (student, sample.teacher, sample.batch)
        value: Tensor = torch.func.functional_call(deepcopy(head), values, arguments)
        return value

    inputs = [tensor.clone().requires_grad_() for tensor in (*(sample.student[n] for n in names), *parameters.values())]
    with seeded(0):
        try:
            # Sums over atomic additions, as on CUDA, differ in their last digits from call to call.
            gradcheck(
                loss, inputs, atol=1e-7, rtol=1e-4, fast_mode=True, nondet_tol=0 if case.device.type == "cpu" else 1e-9
            )
        except GradcheckError as error:
            raise AssertionError(f"the gradient of {case.name} is not the derivative of its value\n{error}") from None


def everything_is_trained(case: Case) -> None:
    """Check that the student and every parameter of the head get a gradient (DDP fails if a parameter gets none)."""
    result = evaluate(case.head(), case.sample())
    assert any(bool(gradient.any()) for gradient in result.student.values()), (
        f"{case.name} gives the student no gradient"
    )
    for key, gradient in result.parameters.items():
        assert bool(gradient.any()), f"parameter {key!r} of {case.name} gets no gradient: freeze it or use it"


def teacher_gets_no_gradient(case: Case) -> None:
    """Check that the teacher gets no gradient, even if its features require one."""
    head, sample = case.head(), case.sample()
    if sample.teacher is None:
        return
    teacher = sample.teacher.apply(lambda tensor: tensor.requires_grad_())
    evaluate(head, replace(sample, teacher=teacher))
    for key in sorted(head.needs_of("teacher")):
        assert teacher[key].grad is None, f"{case.name} gives the teacher's {key!r} a gradient"


def inputs_stay_as_they_are(case: Case) -> None:
    """Check that the head changes neither features nor batch, which the next head reads too."""
    head, sample, before = case.head(), case.sample(), case.sample()
    evaluate(head, sample)
    sides: tuple[tuple[Literal["student", "teacher"], Features | None, Features | None], ...] = (
        ("student", sample.student, before.student),
        ("teacher", sample.teacher, before.teacher),
    )
    for side, features, expected in sides:
        if features is None or expected is None:
            continue
        for key in sorted(head.needs_of(side)):
            assert torch.equal(features[key], expected[key]), f"{case.name} changes the {side}'s {key!r}"
    assert list(sample.batch) == list(before.batch), f"{case.name} adds to the batch or removes from it"
    for key, value in before.batch.items():
        assert torch.equal(sample.batch[key], value), f"{case.name} changes {key!r} of the batch"


def degenerate_inputs_stay_finite(case: Case) -> None:
    """Check loss and gradients in float32, with each of `DEGENERATE` in either or both networks and without labels."""
    head, sample = case.head(torch.float32), case.sample(dtype=torch.float32)
    unlabeled = replace(sample, batch=sample.batch | {"label": torch.full_like(sample.batch["label"], -1)})
    cases = {"unlabeled samples": unlabeled}
    for name, change in DEGENERATE.items():
        both = sample.apply(change)
        cases |= {
            f"{name} in student and teacher": both,
            f"{name} in the student": replace(both, teacher=sample.teacher),
            f"{name} in the teacher": replace(both, student=sample.student),
        }
    for name, changed in cases.items():
        result = evaluate(head, changed)
        finite = all(
            bool(t.isfinite().all()) for t in (result.loss, *result.student.values(), *result.parameters.values())
        )
        assert finite, f"{case.name} has a loss or gradient that is not finite with {name}"


def half_precision_computes_in_float32(case: Case) -> None:
    """Check that head and features in half precision, under autocast, give the float32 result of these features."""
    for dtype in (torch.bfloat16, torch.float16):
        half = case.sample(dtype=torch.float32).apply(lambda tensor, dtype=dtype: tensor.to(dtype))  # type: ignore[misc]
        expected = evaluate(case.head(torch.float32), half.apply(Tensor.float))
        result = evaluate(case.head(torch.float32).to(dtype), half, autocast=dtype)
        rounded = {key: value.to(dtype) for key, value in expected.student.items()}
        _assert_same(
            replace(expected, student=rounded), result, f"{case.name} does not compute in float32 for {dtype} features"
        )


def batch_order_does_not_matter(case: Case) -> None:
    """Check that a permuted batch has the same loss and the permuted gradient, or another loss if `ordered`."""
    head, sample = case.head(), case.sample()
    order = case.order(sample.batch)
    straight, permuted = evaluate(head, sample), evaluate(head, sample[order])
    if case.ordered:
        assert not torch.allclose(straight.loss, permuted.loss), (
            f"{case.name} is declared ordered, but no order matters"
        )
        return
    expected = replace(straight, student={key: value[order] for key, value in straight.student.items()}, state={})
    _assert_same(expected, replace(permuted, state={}), f"{case.name} depends on the order of the batch")


def copies_behave_alike(case: Case) -> None:
    """Check that a deep copy, a pickled copy and a new head with the same state continue exactly alike."""
    head, sample = case.head(), case.sample()
    restored = case.head(seed=1, calls=0)
    stored = io.BytesIO()
    torch.save(head.state_dict(), stored)
    stored.seek(0)
    restored.load_state_dict(torch.load(stored, weights_only=True))
    expected = evaluate(head, sample)
    for name, copy in {
        "a deep copy": deepcopy(head),
        "a pickled copy": pickle.loads(pickle.dumps(head)),
        "a new head with the state_dict": restored,
    }.items():
        _assert_same(
            expected, evaluate(copy, sample), f"{name} of {case.name} behaves differently: keep all memory in buffers"
        )


def two_ranks_equal_one(case: Case, run: Runner) -> None:
    """Check that two ranks with half a batch each give one process's loss, gradients and state, in float64.

    Loss and gradients are averaged as DDP does. A relation within one process's batch (scope `batch`) is another loss
    on two ranks and is skipped.
    """
    if case.make().scope == "batch":
        return
    expected = averaged(case)
    for result in run(averaged, case):
        _assert_same(expected, result, f"two ranks do not equal one process in {case.name}")


def averaged(case: Case) -> Result:
    """Return this rank's state with loss and gradients as DDP averages them, and all ranks' feature gradients."""
    result = evaluate(case.head(), case.sample())
    averaged = Result(
        all_mean(result.loss),
        {key: gather(value) / world_size() for key, value in result.student.items()},
        {key: all_mean(value) for key, value in result.parameters.items()},
        result.state,
    )
    return averaged.to("cpu")


CHECKS: tuple[Callable[[Case], None], ...] = (
    arguments_have_defaults_and_words,
    gradient_is_the_derivative,
    everything_is_trained,
    teacher_gets_no_gradient,
    inputs_stay_as_they_are,
    degenerate_inputs_stay_finite,
    half_precision_computes_in_float32,
    batch_order_does_not_matter,
    copies_behave_alike,
    nothing_waits_for_the_device,
    summaries_can_be_stored,
)
"""The checks of `check_head`; `two_ranks_equal_one` comes in addition."""

DEGENERATE: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "equal values": torch.ones_like,
    "equal images": lambda tensor: tensor[:1].expand_as(tensor),
    "pairs of equal images": lambda tensor: tensor.roll(len(tensor) // 2, 0).where(_first_half(tensor), tensor),
    "equal tokens in an image": lambda tensor: tensor[:, :1].expand_as(tensor),
    "huge values": lambda tensor: 1e4 * tensor,
    "tiny values": lambda tensor: 1e-12 * tensor,
}
"""Degenerate features, by name, for which loss and gradients must be finite."""


def _first_half(tensor: Tensor) -> Tensor:
    is_first = torch.arange(len(tensor), device=tensor.device) < len(tensor) // 2
    return is_first.view(-1, *[1] * (tensor.ndim - 1))


def _assert_same(expected: Result, actual: Result, message: str) -> None:
    tolerance = 1e-10 if expected.loss.dtype == torch.float64 else None  # None: torch's default for the type
    torch.testing.assert_close(
        vars(actual), vars(expected), rtol=tolerance, atol=tolerance, msg=lambda text: f"{message}\n{text}"
    )
