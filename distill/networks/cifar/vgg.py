"""VGG (Simonyan and Zisserman, arXiv 1409.1556) with BatchNorm and one linear layer, for CIFAR."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from distill.networks.cifar.base import Block, CifarNetwork, Make, Stage, repeated

WIDTHS = (64, 128, 256, 512, 512)


def _layer_name(match: re.Match[str]) -> str:
    """Convert the benchmark's numbering of the convolutions, BatchNorms and ReLUs of a block."""
    block, layer = int(match[1]), int(match[2])
    stage = "stem" if block == 0 else f"stages.{block - 1}"
    return f"{stage}.blocks.{layer // 3}.{('conv', 'bn')[layer % 3]}."


class VGG(CifarNetwork):
    """A stem and four stages of 3 x 3 convolutions, with max pooling before each of the first three stages.

    The benchmark pools once more for images of 64 x 64; here the layers are the same for all sizes.

    Args:
        depths: convolutions of the stem and of each stage.
        num_classes: number of logits.
        in_chans: channels of the images.
    """

    renames = ((r"^block(\d+)\.(\d+)\.", _layer_name), (r"^classifier\.", "fc."))

    def __init__(self, depths: Sequence[int], num_classes: int = 100, in_chans: int = 3) -> None:
        strides = [1, 2, 2, 2, 1]
        stem, *stages = [
            Stage(repeated(ConvBlock, depth, before, after, stride))
            for depth, (before, after), stride in zip(depths, pairwise([in_chans, *WIDTHS]), strides, strict=True)
        ]
        super().__init__(
            stem=stem,
            stages=stages,
            final=None,
            widths=WIDTHS,
            strides=strides,
            num_features=WIDTHS[-1],
            num_classes=num_classes,
        )
        self.initialize_convolutions()

    def initialize_classifier(self, classifier: nn.Linear) -> None:
        """Draw weights from N(0, 0.01^2) and set biases to 0."""
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)


class ConvBlock(Block):
    """Max pooling if the stride is above 1, a 3 x 3 convolution with bias, BatchNorm and ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.shrink = nn.MaxPool2d(stride) if stride > 1 else nn.Identity()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` to `[B, channels, h / stride, w / stride]`."""
        x = self.activation(self.bn(self.conv(self.shrink(x))))
        return x


NETWORKS: dict[str, Make] = {
    "vgg8_cifar": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11_cifar": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13_cifar": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16_cifar": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19_cifar": partial(VGG, (2, 2, 4, 4, 4)),
}
