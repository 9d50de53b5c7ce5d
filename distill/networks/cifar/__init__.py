"""The networks of the CRD benchmark for images of 32 x 32, as timm models.

Importing this package registers them with timm under the names in `NETWORKS`, such as `resnet8x4_cifar`, so that
`timm.create_model` and `distill.networks.Timm` create them like any other model. The package imports timm, so import
it lazily.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from distill.networks.cifar import mobilenetv2, resnet, shufflenetv1, shufflenetv2, vgg, wrn
from distill.networks.cifar.base import CifarNetwork, Make

__all__ = ["NETWORKS", "CifarNetwork"]

NETWORKS: dict[str, Make] = {
    **resnet.NETWORKS,
    **wrn.NETWORKS,
    **vgg.NETWORKS,
    **mobilenetv2.NETWORKS,
    **shufflenetv1.NETWORKS,
    **shufflenetv2.NETWORKS,
}
"""The function that creates each network, by its name in timm."""

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 100,
            "input_size": (3, 32, 32),
            "crop_pct": 1.0,
            "mean": (0.5071, 0.4867, 0.4408),  # of CIFAR-100's training images, as the benchmark rounds them
            "std": (0.2675, 0.2565, 0.2761),
            "classifier": "fc",
        }
        for name in NETWORKS
    }
)


def _entry(name: str, make: Make) -> Callable[..., Any]:
    """Return the function that timm calls to create the network `name`."""

    def entry(pretrained: bool = False, **arguments: Any) -> Any:
        return build_model_with_cfg(make, name, pretrained, **arguments)

    entry.__name__ = name
    entry.__doc__ = f"{name} of the CRD benchmark."
    return entry


for _name, _make in NETWORKS.items():
    globals()[_name] = register_model(_entry(_name, _make))  # timm adds the name to __all__
