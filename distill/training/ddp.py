"""What training on many ranks asks of data and networks, held against them before step 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import LayerSync, TorchSyncBatchNorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distill.distributed import world_size
from distill.errors import UserError
from distill.training import lightning_internals as internals
from distill.training.optimizer import EffectiveBatch


class SyncBatchNorms(LayerSync):
    """Makes BatchNorm compute its statistics over all ranks, and puts the old layers back after training.

    Unlike Lightning's own, it keeps the activation that many of timm's BatchNorm layers hold.
    """

    def __init__(self) -> None:
        self.before: Mapping[str, nn.Module] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace every BatchNorm."""
        from timm.layers.norm_act import convert_sync_batchnorm

        self.before = {name: layer for name, layer in model.named_modules() if _is_batch_norm(layer)}
        converted: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # timm's has no types
        return converted

    def revert(self, model: nn.Module) -> nn.Module:
        """Put the old layers back, with the weights and statistics that the new ones have now."""
        for name, layer in self.before.items():
            trained = model.get_submodule(name)
            layer._parameters, layer._buffers = trained._parameters, trained._buffers
            layer.train(trained.training)
            model.set_submodule(name, layer)
        self.before = {}
        return model


def prepare_ranks(module: nn.Module, trainer: Trainer) -> None:
    """Settle what becomes of BatchNorm and of the heads' memories, before the strategy wraps the module.

    The heads' buffers are left out of what DDP sends from rank 0 to all ranks before every step: all ranks hold the
    same memories anyway, and some are large.

    Args:
        module: holds a `distiller`.
        trainer: whose strategy will wrap it.

    Raises:
        UserError: a static graph with accumulation, at which torch's DDP fails; or synchronized BatchNorm on CPUs,
            which torch has not.
    """
    strategy: Any = trainer.strategy
    if internals.ddp_options(strategy).get("static_graph") and trainer.accumulate_grad_batches > 1:
        raise UserError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but DDP accumulates nothing with a "
            "static graph: set static_graph of trainer.strategy to false"
        )
    names = [name for name, _ in module.named_buffers() if name.startswith("distiller.objective.")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)  # type: ignore[no-untyped-call]  # torch's
    if isinstance(internals.layer_sync(strategy), TorchSyncBatchNorm):
        if strategy.root_device.type == "cpu" and any(map(_is_batch_norm, module.modules())):
            raise UserError("trainer.sync_batchnorm works on GPUs only, given a CPU: set it to false")
        internals.set_layer_sync(strategy, SyncBatchNorms())


def align_ranks(module: nn.Module, loader: Any) -> None:
    """Make sure that the ranks can train together, and begin with the same memories, those of rank 0.

    Args:
        module: on its device, holds a `distiller`.
        loader: this rank's training data; a loader without a length is taken on trust.

    Raises:
        UserError: on every rank, if they have different numbers of batches or samples, for which DDP would wait for
            ever.
    """
    if world_size() == 1:
        return
    _require_equal_data(loader)
    for buffer in module.get_submodule("distiller.objective").buffers():
        dist.broadcast(buffer, 0)


def effective_batch(trainer: Trainer) -> EffectiveBatch | None:
    """What one step of the optimizer sees in a run; `None` if the data, which this loads, have no batch size."""
    trainer.fit_loop.setup_data()
    images = getattr(trainer.train_dataloader, "batch_size", None)
    return None if images is None else EffectiveBatch(images, trainer.world_size, trainer.accumulate_grad_batches)


def _require_equal_data(loader: Any) -> None:
    """DDP never returns where one rank has fewer batches than another."""
    own = (_length(loader), _length(getattr(loader, "sampler", None)), getattr(loader, "batch_size", None))
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, own)
    for place, other in enumerate(every):
        if other != every[0]:
            raise UserError(
                f"data: rank 0 has {_data_in_words(*every[0])}, but rank {place} has {_data_in_words(*other)}: deal "
                "equally many to every rank, as a DistributedSampler does"
            )


def _is_batch_norm(layer: nn.Module) -> bool:
    return isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:  # an IterableDataset's loader, or no sampler at all
        return None


def _data_in_words(batches: int | None, samples: int | None, size: int | None) -> str:
    return f"{batches} batches of {size} from {samples} samples"
