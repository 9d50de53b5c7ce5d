"""ShuffleNet (Zhang et al., arXiv 1707.01083) for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from distill.networks.cifar.base import (
    Block,
    CifarNetwork,
    Make,
    Shuffle,
    Stage,
    conv_norm_relu,
    convolution,
    in_stage,
    repeated,
)


class ShuffleNetV1(CifarNetwork):
    """A stem of 1 x 1, then three stages of blocks with grouped convolutions; each stage halves the map.

    Args:
        groups: g, of the 1 x 1 convolutions.
        widths: channels of the stem and of each stage.
        depths: blocks of each stage.
        num_classes: number of logits.
        in_chans: channels of the images.
    """

    renames = (
        (r"^conv1\.", "stem.conv."),
        (r"^bn1\.", "stem.bn."),
        (r"^layer(\d+)\.", in_stage),
        (r"^linear\.", "fc."),
    )

    def __init__(
        self, groups: int, widths: Sequence[int], depths: Sequence[int], num_classes: int = 100, in_chans: int = 3
    ) -> None:
        def block(in_channels: int, channels: int, stride: int) -> ShuffleBlock:
            # The paper does not group the first 1 x 1 convolution of the first block, whose input is narrow.
            first_groups = 1 if in_channels == widths[0] else groups
            return ShuffleBlock(in_channels, channels, stride, first_groups, groups)

        super().__init__(
            stem=conv_norm_relu(in_chans, widths[0], 1),
            stages=[
                Stage(repeated(block, depth, before, after, 2))
                for depth, (before, after) in zip(depths, pairwise(widths), strict=True)
            ],
            final=None,
            widths=widths,
            strides=[1, *[2] * len(depths)],
            num_features=widths[-1],
            num_classes=num_classes,
        )


class ShuffleBlock(Block):
    """Grouped 1 x 1 that narrows, channel shuffle, depthwise 3 x 3 and grouped 1 x 1 that widens.

    The input is added to the result; if the stride is above 1, its average pooling is concatenated instead.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, first_groups: int, groups: int) -> None:
        super().__init__()
        residual_channels = channels - in_channels if stride > 1 else channels
        narrow = residual_channels // 4
        self.conv1 = convolution(in_channels, narrow, 1, groups=first_groups)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.relu = nn.ReLU()
        self.shuffle = Shuffle(first_groups)
        self.conv2 = convolution(narrow, narrow, 3, stride, groups=narrow)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = convolution(narrow, residual_channels, 1, groups=groups)
        self.bn3 = nn.BatchNorm2d(residual_channels)
        self.shortcut = nn.AvgPool2d(3, stride, 1) if stride > 1 else None
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` to `[B, channels, h / stride, w / stride]`."""
        residual = self.shuffle(self.relu(self.bn1(self.conv1(x))))
        # the paper has no ReLU after the 3 x 3 convolution, the benchmark has one
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        x = residual + x if self.shortcut is None else torch.cat([residual, self.shortcut(x)], 1)
        x = self.activation(x)
        return x


NETWORKS: dict[str, Make] = {"shufflenetv1_cifar": partial(ShuffleNetV1, 3, (24, 240, 480, 960), (4, 8, 4))}
