"""A head under test, with made-up features and the results of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from distill.distributed import rank, world_size
from distill.features import Features, FeatureSpec, Shape
from distill.heads.base import Batch, Head
from distill.heads.parts.classifier import ClassifierHead
from distill.schedules import Progress

STUDENT = FeatureSpec(logits=(5,), embedding=(6,), tokens=(16, 6), grid=(4, 4))
TEACHER = FeatureSpec(logits=(5,), embedding=(9,), tokens=(36, 9), grid=(6, 6))

CPU = torch.device("cpu")
Make = Callable[[], Head]


@dataclass(frozen=True)
class Sample:
    """A batch with both networks' features of it."""

    student: Features
    teacher: Features | None
    batch: Batch

    def apply(self, function: Callable[[Tensor], Tensor]) -> Sample:
        """Return the sample with `function` applied to every feature of both networks."""
        teacher = None if self.teacher is None else self.teacher.apply(function)
        return replace(self, student=self.student.apply(function), teacher=teacher)

    def to(self, device: torch.device) -> Sample:
        """Return the sample on a device."""
        moved = self.apply(lambda tensor: tensor.to(device))
        return replace(moved, batch={key: value.to(device) for key, value in self.batch.items()})

    def __getitem__(self, rows: Tensor | slice) -> Sample:
        picked = self.apply(lambda tensor: tensor[rows])
        return replace(picked, batch={key: value[rows] for key, value in self.batch.items()})


@dataclass(frozen=True)
class Result:
    """The loss of one call of a head, its gradients, and the head's state after the call."""

    loss: Tensor
    student: dict[str, Tensor]
    parameters: dict[str, Tensor]
    state: dict[str, Tensor]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Result:
        """Return the result on a device, its floating-point numbers in another type if one is given."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        named = (self.student, self.parameters, self.state)
        return Result(moved(self.loss), *({key: moved(value) for key, value in each.items()} for each in named))


@dataclass(frozen=True)
class Case:
    """A head under test, the shapes it is called with, and what is expected of it.

    Attributes:
        make: returns a new head.
        student: the student's shapes.
        teacher: the teacher's shapes.
        size: B, images per batch.
        exact_gradient: arguments under which the gradient is the derivative of the value.
        ordered: whether the value is meant to depend on the order of the batch.
        same_widths: whether the teacher gets the student's channels.
        progress: the progress of training at which the head is called.
        device: the device that the head runs on.
    """

    make: Make
    student: FeatureSpec = STUDENT
    teacher: FeatureSpec = TEACHER
    size: int = 8
    exact_gradient: Mapping[str, Any] = field(default_factory=dict)
    ordered: bool = False
    same_widths: bool = False
    progress: Progress = field(default_factory=Progress)
    device: torch.device = CPU

    @property
    def name(self) -> str:
        """The head's class name."""
        return type(self.make()).__name__

    def head(self, dtype: torch.dtype = torch.float64, seed: int = 0, calls: int = 2) -> Head:
        """Return a built head whose memory, if it has one, has been filled by earlier calls."""
        with seeded(seed):
            head = self.make()
            student, teacher = self._specs(head)
            head.check(student, teacher)
            head.build(student, teacher)
        head.to(self.device, dtype)
        head.progress = self.progress
        for number in range(calls):
            sample = self.sample(number + 1, dtype)
            head(sample.student, sample.teacher, sample.batch)
        return head

    def sample(self, number: int = 0, dtype: torch.dtype = torch.float64) -> Sample:
        """Return this rank's part of the sample of that number, whose first image has no label."""
        generator = torch.Generator().manual_seed(1000 + number)

        def features(spec: FeatureSpec, names: AbstractSet[str]) -> Features:
            def draw(shape: tuple[int, ...]) -> Tensor:
                return torch.randn(self.size, *shape, generator=generator).to(dtype)

            drawn = {name: draw(spec[name]) for name in ("logits", "embedding", "tokens") if name in names}
            maps = {name: draw(shape) for name, shape in spec.maps.items()}
            classify = _Classifier((spec.logits or (5,))[0]) if spec.classifies else None
            return Features(**drawn, grid=spec.grid, maps=maps, classify=classify)

        head = self.make()
        student, teacher = self._specs(head)
        classes = (self.student.logits or (5,))[0]
        batch = {
            "image": torch.rand(self.size, 3, 24, 24, generator=generator).to(dtype),
            "label": torch.randint(classes, (self.size,), generator=generator),
            "index": self.size * number + torch.randperm(self.size, generator=generator),
        }
        if "view" in head.batch_needs:  # half as many images, view after view
            batch["view"] = torch.arange(self.size) * 2 // self.size
            batch |= {key: batch[key][: self.size // 2].repeat(2) for key in ("label", "index")}
        batch["label"][batch["index"] == batch["index"][0]] = -1
        if "segments" in head.batch_needs:
            batch["segments"] = torch.randint(4, (self.size, 24, 24), generator=generator)
        sample = Sample(
            features(student, head.needs_of("student")),
            features(teacher, head.needs_of("teacher")) if head.needs_teacher else None,
            batch,
        )
        return sample[slice(rank(), None, world_size())].to(self.device)

    def order(self, batch: Batch) -> Tensor:
        """Return the rows of a batch in another order of its images, the same in every view."""
        views = 2 if "view" in batch else 1
        images = torch.randperm(self.size // views, generator=torch.Generator().manual_seed(0))
        return torch.cat([images + view * len(images) for view in range(views)]).to(self.device)

    def _specs(self, head: Head) -> tuple[FeatureSpec, FeatureSpec]:
        """Return the shapes of the features that the head needs, and of those that come with a classifier it calls."""
        student, teacher = (
            _only(self.student, head, "student", (6, 4, 4)),
            _only(self.teacher, head, "teacher", (9, 6, 6)),
        )
        return student, _with_widths(teacher, student) if self.same_widths else teacher


def evaluate(head: Head, sample: Sample, autocast: torch.dtype | None = None) -> Result:
    """Run forward and backward pass of a copy of the head, under autocast to a type if given."""
    head = deepcopy(head)
    student = sample.student.apply(lambda tensor: tensor.detach().clone().requires_grad_())
    with nullcontext() if autocast is None else torch.autocast(sample.batch["image"].device.type, autocast):
        loss = head(student, sample.teacher, sample.batch)
    name = type(head).__name__
    assert loss.ndim == 0, f"{name} returns a tensor of shape {tuple(loss.shape)} instead of a scalar"
    assert loss.requires_grad, f"{name} returns a loss without gradient"
    loss.backward()  # type: ignore[no-untyped-call]  # torch's backward has no types
    return Result(
        loss.detach(),
        {key: _gradient(student[key]) for key in sorted(head.needs_of("student"))},
        {key: _gradient(parameter) for key, parameter in head.named_parameters() if parameter.requires_grad},
        {key: value.detach() for key, value in head.state_dict().items()},
    )


@dataclass(frozen=True)
class _Classifier:
    """A fixed linear classifier with bias, made anew in the type of what it is called with."""

    classes: int

    def __call__(self, embedding: Tensor) -> Tensor:
        size = self.classes * embedding.shape[-1]
        weight = torch.arange(size, dtype=embedding.dtype, device=embedding.device).cos().view(self.classes, -1)
        return embedding @ weight.mT + weight[:, 0]


def _only(spec: FeatureSpec, head: Head, side: Literal["student", "teacher"], made_up: tuple[int, ...]) -> FeatureSpec:
    classifies = isinstance(head, ClassifierHead) and side in head.classifiers
    needs = head.needs_of(side)
    listed = needs | ({"logits", "embedding"} if isinstance(head, ClassifierHead) else set())
    shapes: dict[str, Any] = {
        key: getattr(spec, key) if key in listed else None for key in ("logits", "embedding", "tokens")
    }
    maps = {key: spec.maps.get(key, made_up) for key in sorted(needs) if key not in shapes}
    return FeatureSpec(**shapes, grid=spec.grid, maps=maps, classifies=classifies)


def _with_widths(spec: FeatureSpec, wanted: FeatureSpec) -> FeatureSpec:
    """Return `spec` on its grids with the widths of `wanted`, for maps `[d, h, w]`, tokens `[N, d]` and vectors."""

    def resized(shape: Shape | None, wanted: Shape | None) -> Shape | None:
        if shape is None or wanted is None:
            return shape
        width = wanted[0] if len(wanted) == 3 else wanted[-1]
        return (width, *shape[1:]) if len(shape) == 3 else (*shape[:-1], width)

    return replace(
        spec,
        embedding=resized(spec.embedding, wanted.embedding),
        tokens=resized(spec.tokens, wanted.tokens),
        maps={name: resized(shape, wanted.maps.get(name)) or shape for name, shape in spec.maps.items()},
    )


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.detach()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
