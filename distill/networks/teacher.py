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
    """Run a network in eval mode and without gradient, whatever happens to the module that contains it.

    The network is not registered as a submodule: its tensors are in no checkpoint, no optimizer, no weight average
    and no broadcast, and neither `train()` nor `requires_grad_()` of the containing module reaches them. It does
    follow that module to other devices and, unless it has a dtype, to other dtypes.

    Args:
        network: the teacher, built.
        dtype: of its weights and its forward pass, which then runs outside autocast; `None` follows the trainer's
            precision.

    Attributes:
        fingerprint: sha256 of the weights as they were loaded, before the cast to `dtype`.
    """

    def __init__(self, network: Network, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.fingerprint = fingerprint(network.model.state_dict())
        # In a tuple, so that nn.Module does not register the network as a submodule.
        self._unregistered = (network.eval().requires_grad_(False),)
        if dtype is not None:
            network.model.to(dtype)  # the mean and std of the images keep their dtype
        self.train(False)

    @property
    def network(self) -> Network:
        """The wrapped network."""
        return self._unregistered[0]

    @property
    def spec(self) -> FeatureSpec:
        """The shapes of its features."""
        return self.network.spec

    @property
    def name(self) -> str:
        """The name shown in tables."""
        return self.network.name

    @torch.no_grad()
    def forward(self, image: Tensor) -> Features:
        """Compute the teacher's features of `image` `[B, C, H, W]`, in [0, 1] and not normalized."""
        has_dtype = self.dtype is not None
        with torch.autocast(image.device.type, enabled=False) if has_dtype else nullcontext():
            features: Features = self.network(image)
        return features

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.dtype is None:
            self.network._apply(fn)  # type: ignore[no-untyped-call]  # torch's has no types
        else:  # only to the device
            self.network.to(fn(next(self.network.parameters()).new_empty(0)).device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # nor this
        return self


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the names, shapes, dtypes and bytes of a state dict, in the order of the names."""
    digest = sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
