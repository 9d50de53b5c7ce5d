"""Contenders for the same step: a plain loop, this project, timm, torchdistill and ModelOpt.

A contender is a function that takes a `Setting` and returns its step: called without arguments, it takes
one optimizer step and returns the loss. To add one, write it and name it in `CONTENDERS`. Each gets its own networks
with the same weights, and images in [0, 1] that it normalizes itself.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pairs import Pair
from timing import Run
from torch import Tensor, nn

from distill.heads import KD, Batch
from distill.networks.timm import Timm
from distill.objective import Term
from distill.training.distillation import DistillationModule

TEMPERATURE = 4.0
Step = Callable[[], Tensor]


@dataclass
class Setting:
    """Input of all contenders.

    Attributes:
        pair: the networks' names, sizes and optimizer.
        run: the device, and the number of rounds.
        bfloat16: whether to run under autocast in bfloat16 instead of float32.
        compiled: whether the networks go through `torch.compile`.
        batch: the images in [0, 1], labels and indices.
    """

    pair: Pair
    run: Run
    bfloat16: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        self.batch: Batch = self.pair.batch(self.run)
        self.originals = self.pair.networks()

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Return student (in train mode) and teacher (in eval mode, frozen) as plain modules on the device."""
        student, teacher = (copy.deepcopy(network.model).to(self.run.device) for network in self.originals)
        if self.compiled:
            student.compile()
            teacher.compile()
        return student.train(), teacher.eval().requires_grad_(False)

    def images(self) -> Callable[[], Tensor]:
        """Return a function that normalizes the images; both networks of a pair have the same mean and deviation."""
        student, teacher = self.originals
        assert torch.equal(student.mean, teacher.mean)
        assert torch.equal(student.std, teacher.std)
        mean, std = student.mean.to(self.run.device), student.std.to(self.run.device)
        return lambda: (self.batch["image"] - mean) / std

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context of the precision."""
        return torch.autocast(self.run.device.type, torch.bfloat16, enabled=self.bfloat16)


def plain_loop(setting: Setting) -> Step:
    """Step of a loop written by hand."""
    student, teacher = setting.networks()
    optimizer = setting.pair.make_optimizer(student.parameters())
    images, label = setting.images(), setting.batch["label"]

    def step() -> Tensor:
        with setting.autocast():
            image = images()
            with torch.no_grad():
                target = teacher(image)
            logits = student(image)
            soft, aim = F.log_softmax(logits / TEMPERATURE, dim=1), F.log_softmax(target / TEMPERATURE, dim=1)
            kd = F.kl_div(soft, aim, reduction="batchmean", log_target=True) * TEMPERATURE**2
            loss = F.cross_entropy(logits, label) + kd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def timm_task(setting: Setting) -> Step:
    """Step with timm's `LogitDistillationTask`."""
    from timm.task import DistillationTeacher, LogitDistillationTask

    student, teacher = setting.networks()
    task = LogitDistillationTask(
        student,
        DistillationTeacher(teacher, device=setting.run.device),
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=1.0,
        task_loss_weight=1.0,
        temperature=TEMPERATURE,
        device=setting.run.device,
        verbose=False,
    ).train()
    optimizer = setting.pair.make_optimizer(student.parameters())
    images, label = setting.images(), setting.batch["label"]

    def step() -> Tensor:
        with setting.autocast():
            loss: Tensor = task(images(), label)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def torchdistill(setting: Setting) -> Step:
    """Step of torchdistill's `DistillationBox`, with its own loss, and the optimizer by name."""
    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    from torchdistill.core.distillation import get_distillation_box

    student, teacher = setting.networks()
    name, arguments = setting.pair.optimizer
    loss = {
        "key": "KDLoss",
        "kwargs": {
            **{f"{side}_module_path": "." for side in ("student", "teacher")},
            **{f"{side}_module_io": "output" for side in ("student", "teacher")},
            **{"temperature": TEMPERATURE, "alpha": 1.0, "beta": 1.0},
        },
    }
    configuration = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": name, "kwargs": dict(arguments)},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}},
        },
    }
    box = get_distillation_box(teacher, student, {}, configuration, setting.run.device, None, False, 1.0)
    images, label = setting.images(), setting.batch["label"]

    def step() -> Tensor:
        with setting.autocast():
            box.pre_forward_process()
            loss: Tensor = box.forward_process(images(), label, None)
        box.post_forward_process(loss)
        return loss.detach()

    return step


def model_optimizer(setting: Setting) -> Step:
    """Step with NVIDIA's Model Optimizer in its mode `kd_loss`."""
    from modelopt.torch.distill import LogitsDistillationLoss, convert

    student, teacher = setting.networks()
    criterion = LogitsDistillationLoss(TEMPERATURE, reduction="batchmean")
    model = convert(student, mode=[("kd_loss", {"teacher_model": teacher, "criterion": criterion})])
    model.train()
    optimizer = setting.pair.make_optimizer(parameter for parameter in model.parameters() if parameter.requires_grad)
    images, label = setting.images(), setting.batch["label"]

    def step() -> Tensor:
        with setting.autocast():
            loss: Tensor = F.cross_entropy(model(images()), label) + model.compute_kd_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


CONTENDERS: dict[str, Callable[[Setting], Step]] = {
    "plain loop": plain_loop,
    "timm.task": timm_task,
    "torchdistill": torchdistill,
    "ModelOpt": model_optimizer,
}


def this_project(setting: Setting) -> DistillationModule:
    """Return the module for Lightning's Trainer, which `step.py` runs."""
    pair = setting.pair
    module = DistillationModule(
        student=Timm(pair.student, options=pair.options),
        optimizer=pair.make_optimizer,
        num_classes=pair.classes,
        image_shape=(3, pair.side, pair.side),
        teacher=Timm(pair.teacher, options=pair.options),
        heads={"kd": Term(KD(TEMPERATURE))},
    )
    assert module.teacher is not None
    networks = module.student, module.teacher.network
    for network, original in zip(networks, setting.originals, strict=True):
        network.model.load_state_dict(original.model.state_dict())
        if setting.compiled:
            network.compile()
    return module


def make_steps(setting: Setting, names: Iterable[str] = tuple(CONTENDERS)) -> tuple[dict[str, Step], dict[str, str]]:
    """Return the steps of the named contenders that can run, and the reasons of those that cannot, by name."""
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            steps[name] = CONTENDERS[name](setting)
        except Exception as error:  # whatever a peer raises, the others run
            failed[name] = (str(error).splitlines() or [type(error).__name__])[0]
    return steps, failed
