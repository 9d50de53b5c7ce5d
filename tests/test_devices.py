"""Whole steps on a device: no wait at any precision, and the losses of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distill.distiller import Distiller
from distill.heads import CRD, KD, RKD, RRD, SP, TRG, CrossEntropy, RunInfo, SeRKD
from distill.networks import FrozenTeacher, Timm
from distill.objective import Objective, Term
from distill.schedules import Linear, Progress
from distill.superpixels import add_segments
from distill.testing import no_waiting
from distill.training.non_finite import NonFiniteGuard

IMAGES, CLASSES, STEPS = 8, 10, 3
OPTIONS: dict[str, dict[str, Any]] = {"test_vit": {"patch_size": 4}, "resnet8x4_cifar": {}}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

FAST = {("test_vit", "float32"), ("resnet8x4_cifar", "bfloat16")}
"""Students and precisions of the fast suite."""


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand(IMAGES, 3, 32, 32, generator=generator),
            "label": torch.randint(CLASSES, (IMAGES,), generator=generator),
            "index": torch.arange(IMAGES) + IMAGES * step,
        }
        for step in range(STEPS)
    ]


def distiller(student: str, teacher_dtype: torch.dtype | None = None) -> Distiller:
    torch.manual_seed(0)
    pupil, teacher = (Timm(name, options=OPTIONS[name]) for name in (student, "test_vit"))
    for network in (pupil, teacher):
        network.build(num_classes=CLASSES, image_shape=(3, 32, 32))
    terms: dict[str, Term | None] = {
        "task": Term(CrossEntropy()),
        "kd": Term(KD()),
        "rkd": Term(RKD(), weight=Linear(0.0, 1.0)),
        "sp": Term(SP(of="tokens")),
        "rrd": Term(RRD(size=20, width=16)),
        "crd": Term(CRD(samples=STEPS * IMAGES, negatives=5, width=16)),
        "trg": Term(TRG(tokens_per_image=4, neighbors=3)),
        "serkd": Term(SeRKD(count=4)),
        "segments": Term(SeRKD(superpixels="segments", count=9)),
    }
    frozen = FrozenTeacher(teacher, teacher_dtype)
    objective = Objective(terms, pupil.spec, frozen.spec)
    facts = RunInfo(
        Progress(0, 0.0, STEPS, 1),
        batch_size=IMAGES,
        samples=STEPS * IMAGES,
        provides=RunInfo().provides | {"segments"},
    )
    objective.prepare(facts)
    return Distiller(pupil, frozen, objective)


def losses(student: str, device: torch.device, precision: torch.dtype | None, **settings: Any) -> list[Tensor]:
    """The terms of each step of a loop in which nothing waits for the device."""
    model = distiller(student, **settings).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    guard = NonFiniteGuard()
    found = []
    for step, batch in enumerate(batches()):
        on_device = {key: value.to(device) for key, value in batch.items()}
        segmented = add_segments(on_device, segments=9, backend="torch" if device.type == "cuda" else "auto")
        with no_waiting(device):
            with torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None):
                result = model(segmented, Progress(step, step / STEPS, STEPS, 1))
            guard.check(step, result.values)
            optimizer.zero_grad()
            result.total.backward()
            optimizer.step()
        found.append(torch.stack([value.detach().double() for value in result.values.values()]).cpu())
    guard.flush()
    return found


@pytest.mark.parametrize(
    ("student", "precision"),
    [
        pytest.param(student, precision, marks=[] if (student, precision) in FAST else pytest.mark.slow)
        for student in OPTIONS
        for precision in PRECISIONS
    ],
)
def test_no_step_waits_for_the_device(student: str, precision: str, device: torch.device) -> None:
    assert all(found.isfinite().all() for found in losses(student, device, PRECISIONS[precision]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_step_with_a_teacher_in_half_precision_waits(dtype: torch.dtype, device: torch.device) -> None:
    assert all(found.isfinite().all() for found in losses("test_vit", device, None, teacher_dtype=dtype))


def test_the_losses_of_a_gpu_are_those_of_the_cpu(cuda: torch.device) -> None:
    expected, found = (losses("test_vit", device, None) for device in (torch.device("cpu"), cuda))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)  # after steps that round differently


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        torch.nonzero,
        lambda x: x.clone().index_put_((x > 0,), x[1:]),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_a_wait_is_found(work: Any, device: torch.device) -> None:
    tensor = torch.arange(4.0, device=device)
    work(tensor)
    with pytest.raises((AssertionError, RuntimeError), match="on the host|synchroniz"), no_waiting(device):
        work(tensor)
    work(tensor)
