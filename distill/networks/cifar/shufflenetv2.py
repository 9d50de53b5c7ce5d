"""ShuffleNet V2 (Ma et al., arXiv 1807.11164) for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from distill.networks.cifar.base import Block, CifarNetwork, Make, Shuffle, Stage, conv_norm_relu, convolution, in_stage


class ShuffleNetV2(CifarNetwork):
    """A stem of 1 x 1, three stages that each halve the map, and a last convolution of 1 x 1.

    Args:
        widths: channels of the stem, of each stage and of the embedding.
        depths: blocks of each stage, including the one that halves the map.
        num_classes: number of logits.
        in_chans: channels of the images.
    """

    renames = (
        (r"^conv1\.", "stem.conv."),
        (r"^bn1\.", "stem.bn."),
        (r"^layer(\d+)\.", in_stage),
        (r"^conv2\.", "final.conv."),
        (r"^bn2\.", "final.bn."),
        (r"^linear\.", "fc."),
    )

    def __init__(self, widths: Sequence[int], depths: Sequence[int], num_classes: int = 100, in_chans: int = 3) -> None:
        *maps, num_features = widths
        super().__init__(
            stem=conv_norm_relu(in_chans, maps[0], 1),
            stages=[
                Stage([HalvingBlock(before, after), *(SplitBlock(after) for _ in range(depth - 1))])
                for depth, (before, after) in zip(depths, pairwise(maps), strict=True)
            ],
            final=conv_norm_relu(maps[-1], num_features, 1),
            widths=maps,
            strides=[1, *[2] * len(depths)],
            num_features=num_features,
            num_classes=num_classes,
        )


class SplitBlock(Block):
    """Transform one half of the channels, keep the other half, and shuffle both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = convolution(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU()
        self.conv2 = convolution(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = convolution(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.activation = _activation()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, h, w]` to the same shape."""
        kept, changed = x.chunk(2, 1)
        changed = self.relu(self.bn1(self.conv1(changed)))
        changed = self.bn3(self.conv3(self.bn2(self.conv2(changed))))
        x = self.activation(torch.cat([kept, changed], 1))  # its ReLU keeps `kept`, the output of a ReLU
        return x


class HalvingBlock(Block):
    """Two branches that each halve the map and produce half of the channels, shuffled."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = convolution(in_channels, in_channels, 3, 2, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = convolution(in_channels, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = convolution(in_channels, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU()
        self.conv4 = convolution(half, half, 3, 2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = convolution(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)
        self.activation = _activation()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` to `[B, channels, h / 2, w / 2]`."""
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.relu(self.bn3(self.conv3(x)))
        right = self.bn5(self.conv5(self.bn4(self.conv4(right))))
        x = self.activation(torch.cat([left, right], 1))
        return x


def _activation() -> nn.Module:
    return nn.Sequential(nn.ReLU(), Shuffle(2))


NETWORKS: dict[str, Make] = {
    "shufflenetv2_cifar": partial(ShuffleNetV2, (24, 116, 232, 464, 1024), (4, 8, 4)),
}
