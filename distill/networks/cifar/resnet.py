"""ResNet (He et al., arXiv 1512.03385) for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from distill.networks.cifar.base import (
    Block,
    CifarNetwork,
    Make,
    Stage,
    conv_norm_relu,
    convolution,
    in_stage,
    repeated,
)


class ResNet(CifarNetwork):
    """A stem of 3 x 3 at stride 1, and stages of residual blocks; every stage except the first halves the map.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks of each stage.
        widths: channels of the stem and of each stage.
        num_classes: number of logits.
        in_chans: channels of the images.
    """

    renames = (
        (r"^conv1\.", "stem.conv."),
        (r"^bn1\.", "stem.bn."),
        (r"^layer(\d+)\.", in_stage),
        (r"\.downsample\.", ".shortcut."),
        (r"^linear\.", "fc."),
    )

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 100,
        in_chans: int = 3,
    ) -> None:
        strides = [1, 1, *[2] * (len(depths) - 1)]
        super().__init__(
            stem=conv_norm_relu(in_chans, widths[0], 3),
            stages=[
                Stage(repeated(block, depth, before, after, stride))
                for depth, (before, after), stride in zip(depths, pairwise(widths), strides[1:], strict=True)
            ],
            final=None,
            widths=widths,
            strides=strides,
            num_features=widths[-1],
            num_classes=num_classes,
        )
        self.initialize_convolutions()


class BasicBlock(Block):
    """ReLU(F(x) + shortcut(x)), where F is two convolutions of 3 x 3."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = convolution(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` to `[B, channels, h / stride, w / stride]`."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        x = self.activation(residual + self.shortcut(x))
        return x


class Bottleneck(Block):
    """ReLU(F(x) + shortcut(x)), where F narrows to a quarter by 1 x 1, convolves by 3 x 3 and widens by 1 x 1."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        width = channels // 4
        self.conv1 = convolution(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, channels, 1)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.shortcut = _shortcut(in_channels, channels, stride)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` to `[B, channels, h / stride, w / stride]`."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        x = self.activation(residual + self.shortcut(x))
        return x


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Create an identity if shapes agree, else a projection."""
    if stride == 1 and in_channels == channels:
        return nn.Sequential()
    return nn.Sequential(convolution(in_channels, channels, 1, stride), nn.BatchNorm2d(channels))


def _of_depth(depth: int, widths: Sequence[int]) -> Make:
    """Return the constructor of a network with 6n + 2 = `depth` layers: three stages of n basic blocks."""
    return partial(ResNet, BasicBlock, [(depth - 2) // 6] * 3, widths)


NETWORKS: dict[str, Make] = {
    **{f"resnet{depth}_cifar": _of_depth(depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4_cifar": _of_depth(depth, (32, 64, 128, 256)) for depth in (8, 32)},
    "resnet18_cifar": partial(ResNet, BasicBlock, [2, 2, 2, 2], (64, 64, 128, 256, 512)),
    "resnet50_cifar": partial(ResNet, Bottleneck, [3, 4, 6, 3], (64, 256, 512, 1024, 2048)),
}
