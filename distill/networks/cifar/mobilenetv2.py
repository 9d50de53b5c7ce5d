"""MobileNetV2 (Sandler et al., arXiv 1801.04381) for CIFAR."""

from __future__ import annotations

import re
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from distill.networks.cifar.base import Block, CifarNetwork, Make, Stage, conv_norm_relu, convolution, repeated


class Group(NamedTuple):
    """A row of the paper's table of blocks, at width 1."""

    channels: int
    depth: int
    stride: int
    expands: bool = True


GROUPS = (
    Group(16, 1, 1, expands=False),
    Group(24, 2, 1),  # at stride 2 in the paper
    Group(32, 3, 2),
    Group(64, 4, 2),
    Group(96, 3, 1),
    Group(160, 3, 2),
    Group(320, 1, 1),
)

STAGES = ((0, 1), (2,), (3, 4), (5, 6))
"""The groups that make up each stage: the benchmark reads features between them."""

GROUP_POSITIONS = {
    group: (stage, sum(GROUPS[before].depth for before in groups if before < group))
    for stage, groups in enumerate(STAGES)
    for group in groups
}
"""For each group, its stage and the position of its first block in that stage."""


def _layer_name(match: re.Match[str]) -> str:
    """Convert the benchmark's numbering by group, block and position in the block."""
    stage, first = GROUP_POSITIONS[int(match[1])]
    number, position = divmod(int(match[3]), 3)
    return f"stages.{stage}.blocks.{first + int(match[2])}.{('conv', 'bn')[position]}{number + 1}."


class MobileNetV2(CifarNetwork):
    """A stem at stride 2, then inverted residual blocks, whose linear bottlenecks leave stages without an activation.

    Args:
        expansion: T, the expansion factor inside the blocks.
        width: factor on the channels of stem and stages; the embedding stays 1280 wide at widths up to 1.
        num_classes: number of logits.
        in_chans: channels of the images.
    """

    renames = (
        (r"^blocks\.(\d+)\.(\d+)\.conv\.(\d+)\.", _layer_name),
        (r"^conv1\.0\.", "stem.conv."),
        (r"^conv1\.1\.", "stem.bn."),
        (r"^conv2\.0\.", "final.conv."),
        (r"^conv2\.1\.", "final.bn."),
        (r"^classifier\.0\.", "fc."),
    )

    def __init__(self, expansion: int, width: float, num_classes: int = 100, in_chans: int = 3) -> None:
        stem, *channels = [int(32 * width), *(int(group.channels * width) for group in GROUPS)]

        def blocks(number: int) -> list[Block]:
            group, before = GROUPS[number], channels[number - 1] if number else stem
            make = partial(InvertedResidual, expansion=expansion if group.expands else 1)
            return repeated(make, group.depth, before, channels[number], group.stride)

        num_features = int(1280 * max(width, 1))
        super().__init__(
            stem=conv_norm_relu(in_chans, stem, 3, 2),
            stages=[Stage(block for number in numbers for block in blocks(number)) for numbers in STAGES],
            final=conv_norm_relu(channels[-1], num_features, 1),
            widths=[stem, *(channels[numbers[-1]] for numbers in STAGES)],
            strides=[2, 1, 2, 2, 2],
            num_features=num_features,
            num_classes=num_classes,
        )
        self.initialize_convolutions()

    def initialize_classifier(self, classifier: nn.Linear) -> None:
        """Draw weights from N(0, 0.01^2) and set biases to 0."""
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)


class InvertedResidual(Block):
    """Expansion by 1 x 1, depthwise 3 x 3, projection by 1 x 1; plus the input if shapes agree."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.conv1 = convolution(in_channels, wide, 1)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = convolution(wide, wide, 3, stride, groups=wide)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3 = convolution(wide, channels, 1)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.adds = stride == 1 and in_channels == channels
        self.activation = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` to `[B, channels, h / stride, w / stride]`."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        x = x + residual if self.adds else residual
        return x


NETWORKS: dict[str, Make] = {"mobilenetv2_half_cifar": partial(MobileNetV2, 6, 0.5)}
