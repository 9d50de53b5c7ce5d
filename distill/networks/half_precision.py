"""Networks in half precision whose sums stay in float32."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from distill.networks.base import Network

_MATRICES = (nn.Linear, _ConvNd, nn.MultiheadAttention)


def halve(network: Network, dtype: torch.dtype) -> bool:
    """Cast a network's matrix products to half precision, and nothing else if the network can run like that.

    The network is then to run under autocast to the dtype: linear layers and convolutions, in which all the time is
    spent, have weights of that dtype, whereas norms and the sum that runs through the blocks of a transformer stay in
    float32. Rounding that sum at every block is what moves the losses most.

    Args:
        network: built, in eval mode; changed in place.
        dtype: float16 or bfloat16.

    Returns:
        Whether the network is to run under autocast; if not, all its tensors are cast.
    """
    layers = [layer for layer in network.model.modules() if isinstance(layer, _MATRICES)]
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
    if layers and _runs(network, dtype):
        return True
    network.model.to(dtype)
    return False


def _runs(network: Network, dtype: torch.dtype) -> bool:
    image = network.dummy_images()
    try:
        with torch.no_grad(), torch.autocast(image.device.type, dtype):
            network(image)
    except Exception:  # a layer that multiplies by itself, and takes no other dtype than that of its weights
        return False
    return True
