"""Checks of a student against the data and against a checkpoint, before step 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.errors import UserError
from distill.heads import RunInfo
from distill.networks import Network
from distill.networks.modes import eval_mode
from distill.objective import TASK, Term, key_of


def require_batch_statistics(student: Network, run: RunInfo) -> None:
    """Require that no trained BatchNorm normalizes a single value per channel, which has no variance.

    This needs a batch of one image and a map of one cell. Frozen layers are not checked, since they use their running
    statistics.

    Args:
        student: the built student.
        run: facts of the run, with the size of its smallest batch.

    Raises:
        UserError: there is such a layer.
    """
    if run.batch_size != 1:
        return
    single: list[str] = []

    def observe(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel() == inputs[0].shape[1]:
                single.append(name)

        return hook

    handles = [
        layer.register_forward_pre_hook(observe(name))
        for name, layer in student.model.named_modules()
        if _normalizes_by_batch(layer, run.world_size)
    ]
    try:
        with eval_mode(student), torch.no_grad():
            student(student.dummy_images()[:1])
    finally:
        for handle in handles:
            handle.remove()
    if single:
        raise UserError(
            f"data.batch_size: with a batch of 1 image, the BatchNorm {single[0]!r} of {student.name} gets a single "
            "value per channel, which has no variance: give 2 or more, larger images, or a student without BatchNorm"
        )


def require_same_classes(checkpoint: Mapping[str, Any], student: Network, num_classes: int) -> None:
    """Require a checkpoint of as many classes as the data have, if the student has an output per class.

    Raises:
        UserError: the numbers differ.
    """
    saved = checkpoint.get("distill", {}).get("num_classes")
    if saved not in (None, num_classes) and student.spec.logits == (num_classes,):
        raise UserError(
            f"ckpt_path: the checkpoint was trained with {saved} classes, but the data have {num_classes}: give data "
            "with its classes, or load only the weights of the backbone with model.student.weights and "
            "model.student.drop_classifier"
        )


def require_labels(terms: Mapping[str, Term | None], num_classes: int) -> None:
    """Require labels for the terms that read them.

    Raises:
        UserError: there are none; the message names the first such term.
    """
    for name, term in terms.items():
        if num_classes == 0 and term is not None and not term.is_off and "label" in term.head.batch_needs:
            remedy = f"{key_of(name)} to null" if name == TASK else f"{key_of(name)} to null, or give labels"
            raise UserError(
                f"{key_of(name)}.head: {type(term.head).__name__} needs labels, but the images have none (num_classes "
                f"is 0): set {remedy}"
            )


def told_by(name: str, given: Any, data: Any) -> Any:
    """Return a fact about the images, from the configuration or from the data.

    Args:
        name: `num_classes` or `image_shape`.
        given: in the configuration; `None` if it is to be taken from the data.
        data: the data module, or `None`.

    Raises:
        UserError: nothing tells it, or both tell different ones.
    """
    told_value = getattr(data, name, None)
    if given is None and told_value is None:
        source = "no data are given" if data is None else f"{type(data).__name__} has no attribute {name}"
        example = "the number of classes, 0 for images without labels" if name == "num_classes" else "[C, H, W]"
        raise UserError(f"model.{name}: {source}: give {example}")
    if given is None or told_value is None:
        return told_value if given is None else given
    different = tuple(given) != tuple(told_value) if name == "image_shape" else given != told_value
    if different:
        raise UserError(f"model.{name} is {given}, but {type(data).__name__} has {told_value}: leave it out")
    return given


def _normalizes_by_batch(layer: nn.Module, ranks: int) -> bool:
    if not isinstance(layer, _BatchNorm) or (isinstance(layer, nn.SyncBatchNorm) and ranks > 1):
        return False
    parameters = list(layer.parameters())
    return layer.training and (not parameters or any(parameter.requires_grad for parameter in parameters))
