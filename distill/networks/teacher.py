"""A network that teaches and never learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from hashlib import sha256
from typing import Self

import torch
from torch import Tensor, nn

from distill.features import Features, FeatureSpec
from distill.networks.base import Network


class FrozenTeacher(nn.Module):
    """Runs a network in eval mode and without gradient, whatever becomes of the module it is part of.

    The network is held out of reach of that module: it is none of its submodules, so that its tensors are in no
    checkpoint, no optimizer, no average and no broadcast, and no `train()` or `requires_grad_()` gets at them.
    It does follow to other devices and, without a dtype of its own, to other dtypes.

    Args:
        network: the teacher, built.
        dtype: of its weights and its pass, which then runs outside autocast; `None` is as the trainer's precision
            says.

    Attributes:
        fingerprint: sha256 of the weights as they were loaded, before `dtype` changed them.
    """

    def __init__(self, network: Network, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.fingerprint = fingerprint(network.model.state_dict())
        self.held = [network.eval().requires_grad_(False)]  # in a list, where nn.Module does not look for submodules
        if dtype is not None:
            network.model.to(dtype)  # mean and std of the images keep theirs
        self.train(False)

    @property
    def network(self) -> Network:
        """The teacher."""
        return self.held[0]

    @property
    def spec(self) -> FeatureSpec:
        """The shapes of what it gives."""
        return self.network.spec

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.network.name

    @torch.no_grad()
    def forward(self, image: Tensor) -> Features:
        """What the teacher sees of `image` `[B, C, H, W]`, in [0, 1] and not normalized."""
        own = self.dtype is not None
        with torch.autocast(image.device.type, enabled=False) if own else nullcontext():
            features: Features = self.network(image)
        return features

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.dtype is None:
            self.network._apply(fn)  # type: ignore[no-untyped-call]  # torch's has no types
        else:  # to the device only
            self.network.to(fn(next(self.network.parameters()).new_empty(0)).device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # nor this
        return self


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """The sha256 of names, shapes, dtypes and bytes of a state dict, in the order of the names."""
    digest = sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
