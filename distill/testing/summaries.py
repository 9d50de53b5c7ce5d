"""The contract of a teacher's summary: what makes a stored one as good as the teacher."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from distill.features import Summary
from distill.heads.base import Head
from distill.schedules import Progress
from distill.store.quantities import plain
from distill.testing.case import Case, evaluate

_LATER = Progress(step=1000, steps=2000, epoch=10, epochs=20)


def summaries_can_be_stored(case: Case) -> None:
    """Check that a head's summary of a teacher may be computed once, in another run, and stored.

    It is computed row by row, without gradient, and changes neither with the training of the head nor with its
    progress; a head of another run with its `summary_state` computes the same; `summary_key` is made of JSON values;
    and the head gives the same loss from the teacher's features, from their summary, and from the summary's.
    """
    head, sample = case.head(), case.sample()
    if sample.teacher is None:
        return
    teacher = sample.teacher.apply(lambda tensor: tensor.clone().requires_grad_())
    summary = head.summary(teacher, sample.batch)
    assert not any(tensor.requires_grad for tensor in _tensors(summary).values()), (
        f"the summary of {case.name} carries a gradient"
    )
    plain(f"the summary_key of {case.name}", head.summary_key())  # raises an error that names what is not JSON
    _assert_equal(summary, head.summary(summary, sample.batch), f"{case.name} summarizes a summary again")

    order = torch.randperm(case.size, generator=torch.Generator().manual_seed(0))
    parts: list[Tensor | slice] = [order, slice(0, 3), slice(3, None)]
    for rows in (*parts, *(slice(row, row + 1) for row in range(case.size))):
        part = replace(sample, teacher=teacher)[rows]
        assert part.teacher is not None
        picked = summary.apply(lambda tensor, rows=rows: tensor[rows])  # type: ignore[misc]  # bound at once
        _assert_equal(picked, head.summary(part.teacher, part.batch), f"the summary of {case.name} is not row by row")

    trained = _trained(head)
    message = f"the summary of {case.name} changes in training"
    _assert_equal(summary, trained.summary(teacher, sample.batch), message)
    _assert_equal(summary, trained.eval().summary(teacher, sample.batch), message)

    reseeded = case.head(seed=1, calls=0)
    state, restored = head.summary_state(), reseeded.summary_state()
    assert state.keys() == restored.keys(), f"the summary_state of {case.name} has other names in another run"
    with torch.no_grad():
        for name, tensor in state.items():
            restored[name].copy_(tensor)
    _assert_equal(
        summary,
        reseeded.summary(teacher, sample.batch),
        f"the summary of {case.name} is another in another run: name in summary_state what it was computed with",
    )

    found, expected = (evaluate(head, replace(sample, teacher=given)) for given in (summary, sample.teacher))
    rounding = 0 if case.device.type == "cpu" else 1e-10  # a GPU may add in another order in each call
    message = f"{case.name} has another loss from the teacher's summary than from its features"
    torch.testing.assert_close(
        {"loss": found.loss, **found.student},
        {"loss": expected.loss, **expected.student},
        rtol=rounding,
        atol=rounding,
        msg=lambda text: f"{message}\n{text}",
    )


def _trained(head: Head) -> Head:
    """Return a copy of a head in the middle of another training."""
    frozen = {tensor.data_ptr() for tensor in head.summary_state().values() if not tensor.requires_grad}
    trained = deepcopy(head)
    trained.progress = _LATER
    with torch.no_grad():
        for (_, before), (_, tensor) in zip(_state(head), _state(trained), strict=True):
            if tensor.is_floating_point() and before.data_ptr() not in frozen:
                tensor.add_(0.5)
    return trained


def _state(head: Head) -> list[tuple[str, Tensor]]:
    """Return what a training changes: trained parameters, and buffers."""
    return [*((name, each) for name, each in head.named_parameters() if each.requires_grad), *head.named_buffers()]


def _tensors(summary: Summary) -> dict[str, Tensor]:
    features = {name: getattr(summary, name) for name in ("logits", "embedding", "tokens")}
    return {**{name: tensor for name, tensor in features.items() if tensor is not None}, **summary.maps}


def _assert_equal(expected: Summary, actual: Summary, message: str) -> None:
    torch.testing.assert_close(
        {**_tensors(actual)}, {**_tensors(expected)}, rtol=1e-10, atol=1e-10, msg=lambda text: f"{message}\n{text}"
    )
