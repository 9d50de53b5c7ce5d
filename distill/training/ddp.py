"""Preparation and checks of training with DDP, before step 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distill.distributed import world_size
from distill.errors import UserError
from distill.randomness import get_states, set_states
from distill.schedules import Progress
from distill.training import lightning_internals as internals
from distill.training.optimizer import EffectiveBatch
from distill.training.run_info import length
from distill.training.stored import dummy_rows


class SyncBatchNorms(LayerSync):
    """Synchronizes BatchNorm statistics over all ranks during training, and restores the original layers afterwards.

    Unlike Lightning's own plugin, it keeps the activations inside timm's BatchNorm layers.
    """

    def __init__(self) -> None:
        self.originals: Mapping[str, nn.Module] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace all BatchNorm layers."""
        from timm.layers.norm_act import convert_sync_batchnorm

        self.originals = {name: layer for name, layer in model.named_modules() if _is_batch_norm(layer)}
        converted: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # timm's has no types
        return converted

    def revert(self, model: nn.Module) -> nn.Module:
        """Restore the original layers with the current weights and statistics."""
        for name, layer in self.originals.items():
            trained = model.get_submodule(name)
            layer._parameters, layer._buffers = trained._parameters, trained._buffers
            layer.train(trained.training)
            model.set_submodule(name, layer)
        self.originals = {}
        return model


def prepare_ranks(module: nn.Module, trainer: Trainer) -> None:
    """Prepare BatchNorm and the heads' memories, before the strategy wraps the module.

    The heads' buffers are excluded from the broadcast from rank 0 before every step: all ranks hold the same memories
    anyway, and some are large.

    Args:
        module: a module with a `distiller`.
        trainer: the trainer whose strategy will wrap the module.

    Raises:
        UserError: DDP has a static graph together with accumulation, which torch does not support, or synchronized
            BatchNorm on CPUs, which torch does not implement.
    """
    strategy: Any = trainer.strategy
    if internals.ddp_options(strategy).get("static_graph") and trainer.accumulate_grad_batches > 1:
        raise UserError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but DDP cannot accumulate with a "
            "static graph: set static_graph of trainer.strategy to false"
        )
    names = [name for name, _ in module.named_buffers() if name.startswith("distiller.objective.")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)  # type: ignore[no-untyped-call]  # torch's
    if isinstance(internals.layer_sync(strategy), TorchSyncBatchNorm):
        if strategy.root_device.type == "cpu" and any(map(_is_batch_norm, module.modules())):
            raise UserError("trainer.sync_batchnorm works only on GPUs, given a CPU: set it to false")
        internals.set_layer_sync(strategy, SyncBatchNorms())


def choose_unused_parameter_detection(module: nn.Module, num_classes: int, trainer: Trainer) -> None:
    """Let DDP look for unused parameters if a trial step has some, such as a classifier that no term reads.

    DDP would otherwise stop in the second step. The choice holds for the whole run; a user's own is kept, and a static
    graph needs none. Call this before the strategy wraps the module.

    Args:
        module: a module with a `distiller`.
        num_classes: number of classes K of the labels.
        trainer: the trainer whose strategy will wrap the module.
    """
    strategy: Any = trainer.strategy
    options = internals.ddp_options(strategy)
    if not isinstance(strategy, DDPStrategy) or {"static_graph", "find_unused_parameters"} & options.keys():
        return
    module.to(strategy.root_device)  # where the strategy moves it anyway, and where collectives work
    options["find_unused_parameters"] = _has_unused_parameters(module.get_submodule("distiller"), num_classes)


def align_ranks(module: nn.Module, loader: Any) -> None:
    """Check that all ranks have the same teachers and equally many batches, and copy the heads' memories from rank 0.

    Args:
        module: a module with a `distiller`, on its device.
        loader: this rank's training data; a loader without a length is not checked.

    Raises:
        UserError: on every rank, if the ranks have different numbers of batches or samples, since DDP would hang, or
            different teachers, which DDP does not align.
    """
    if world_size() == 1:
        return
    _require_equal_data(loader)
    _require_equal_teachers(module.get_submodule("distiller.teachers"))
    device = next(module.parameters()).device
    for buffer in module.get_submodule("distiller.objective").buffers():
        _broadcast(buffer, device)


def align_statistics(network: nn.Module) -> None:
    """Copy BatchNorm's statistics from rank 0, which saves the checkpoints, to all ranks.

    DDP does so only before the forward passes of some steps: not with `broadcast_buffers=False`, nor while gradients
    are accumulated.
    """
    if world_size() == 1:
        return
    for buffer in network.buffers():
        if buffer.is_floating_point():
            dist.broadcast(buffer, 0)


def effective_batch(trainer: Trainer) -> EffectiveBatch | None:
    """Return the effective batch of a run, after loading its data; `None` if these have no batch size."""
    trainer.fit_loop.setup_data()
    images = getattr(trainer.train_dataloader, "batch_size", None)
    return None if images is None else EffectiveBatch(images, trainer.world_size, trainer.accumulate_grad_batches)


def _require_equal_data(loader: Any) -> None:
    """Raise on every rank if the ranks have different amounts of data, since DDP would hang."""
    sizes = (length(loader), length(getattr(loader, "sampler", None)), getattr(loader, "batch_size", None))
    all_sizes: list[Any] = [None] * world_size()
    dist.all_gather_object(all_sizes, sizes)
    for rank, rank_sizes in enumerate(all_sizes):
        if rank_sizes != all_sizes[0]:
            raise UserError(
                f"data: rank 0 has {_describe(*all_sizes[0])}, but rank {rank} has {_describe(*rank_sizes)}: give "
                "every rank equally many, as a DistributedSampler does"
            )


def _require_equal_teachers(teachers: nn.Module) -> None:
    fingerprints = {name: getattr(teacher, "fingerprint", None) for name, teacher in teachers.named_children()}
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, fingerprints)
    for rank, theirs in enumerate(everyone):
        different = sorted(name for name in everyone[0] if theirs.get(name) != everyone[0][name])
        if different:
            raise UserError(
                f"model.teacher: rank 0 and rank {rank} have different weights of {different[0]!r}: load them from a "
                "file, or seed all ranks alike before the networks are made"
            )


def _broadcast(buffer: torch.Tensor, device: torch.device) -> None:
    """Copy a buffer from rank 0; one that stays on the host goes through the device, where collectives work."""
    if buffer.device == device:
        dist.broadcast(buffer, 0)
        return
    for start in range(0, len(buffer), _ROWS):
        part = buffer[start : start + _ROWS]
        moved = part.to(device)
        dist.broadcast(moved, 0)
        part.copy_(moved)


_ROWS = 1 << 16
"""Rows of a memory on the host that pass through the device at a time."""


def _has_unused_parameters(distiller: Any, num_classes: int, images: int = 8) -> bool:
    """Return True if a trainable parameter gets no gradient, or if that cannot be found out on random images.

    A trial takes two steps, since memories are empty in the first. It leaves weights, buffers and random states as
    they were.
    """
    parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    device = parameters[0].device
    channels, height, width = distiller.student.image_shape
    index = torch.arange(images, device=device)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.rand(images, channels, height, width, generator=generator).to(device),
        "label": index % num_classes if num_classes > 0 else torch.full_like(index, -1),
        "index": index,
        "draw": torch.zeros_like(index),
        "segments": (torch.arange(height * width, device=device) * 4 // (height * width)).expand(images, -1),
    }
    batch["segments"] = batch["segments"].reshape(images, height, width)
    if any("view" in term.head.batch_needs or term.views for term in distiller.objective.terms.values()):
        batch["view"] = index * 2 // images
    buffers, states = {name: buffer.clone() for name, buffer in distiller.named_buffers()}, get_states()
    unused = False
    try:
        batch |= dummy_rows(distiller, images, device)
        with torch.compiler.set_stance("force_eager"):
            for _ in range(2):
                total = distiller(dict(batch), Progress(0, 0.0, 1, 1.0)).total
                gradients = torch.autograd.grad(total, parameters, allow_unused=True)
                unused |= any(gradient is None for gradient in gradients)
    except Exception:  # a head may need other data than random images
        unused = True
    finally:
        for name, buffer in distiller.named_buffers():
            buffer.copy_(buffers[name])
        set_states(states)
    return unused


def _is_batch_norm(layer: nn.Module) -> bool:
    return isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)


def _describe(batches: int | None, samples: int | None, size: int | None) -> str:
    return f"{batches} batches of {size} from {samples} samples"
