"""A network's classifier as a function of any embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distill.features import Features


# An object, not a closure, so that a deep copy of a network has the copy's classifier.
@dataclass(eq=False)
class Classifier:
    """Compute logits `[..., K]` of embeddings `[..., d]`, in their dtype, with a layer of a network.

    Args:
        model: the network.
        layer: name of the layer.
    """

    model: nn.Module
    layer: str

    def __call__(self, embedding: Tensor) -> Tensor:
        layer = self.model.get_submodule(self.layer)
        tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        tensors = {
            name: tensor.to(embedding.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        logits: Tensor = functional_call(layer, tensors, (embedding.reshape(-1, embedding.shape[-1]),))
        return logits.reshape(*embedding.shape[:-1], logits.shape[-1])


def find_classifier(model: nn.Module, layers: Sequence[str], features: Features) -> Classifier | None:
    """Return the classifier if it is a single layer that computes the logits of given features from the embedding."""
    if len(layers) != 1 or features.logits is None or features.embedding is None:
        return None
    classifier = Classifier(model, layers[0])
    try:
        logits = classifier(features.embedding)
    except (RuntimeError, ValueError):  # it does not take vectors
        return None
    same = logits.shape == features.logits.shape and torch.allclose(logits, features.logits, rtol=1e-3, atol=1e-4)
    return classifier if same else None


def last_linear(model: nn.Module, image: Tensor) -> tuple[Any, str | None]:
    """Return what the model gives for images, and the name of the linear layer that runs last, if there is one."""
    executed: list[nn.Module] = []
    names = {layer: name for name, layer in model.named_modules() if name and is_linear(layer)}
    handles = [layer.register_forward_hook(lambda layer, *_: executed.append(layer)) for layer in names]
    try:
        output = model(image)
    finally:
        for handle in handles:
            handle.remove()
    return output, names[executed[-1]] if executed else None


def is_linear(layer: nn.Module) -> bool:
    """Return whether a layer is linear, also in a program of `torch.export`, where it has no type but its weights."""
    if isinstance(layer, nn.Linear):
        return True
    parameters = dict(layer.named_parameters(recurse=False))
    return (
        type(layer).__name__ == "InterpreterModule"
        and parameters.keys() in ({"weight"}, {"weight", "bias"})
        and (parameters["weight"].ndim == 2)
    )
