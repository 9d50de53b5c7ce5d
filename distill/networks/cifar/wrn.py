"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146)."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from distill.networks.cifar.base import Block, CifarNetwork, Make, Stage, convolution, in_stage, repeated


class WideResNet(CifarNetwork):
    """Stages of pre-activated blocks, which output raw sums; BatchNorm and ReLU follow only the last stage.

    A stage's pre-activation is its sum after the next BatchNorm, which is in the first block of the next stage.

    Args:
        depth: total number of layers, 6n + 4.
        factor: widening factor relative to ResNet.
        num_classes: number of logits.
        in_chans: channels of the images.
    """

    renames = (
        (r"^conv1\.", "stem."),
        (r"^block(\d+)\.layer\.", in_stage),
        (r"\.convShortcut\.", ".shortcut."),
        (r"^bn1\.", "final.0."),
    )

    def __init__(self, depth: int, factor: int, num_classes: int = 100, in_chans: int = 3) -> None:
        widths = [16, 16 * factor, 32 * factor, 64 * factor]
        strides = [1, 1, 2, 2]
        super().__init__(
            stem=convolution(in_chans, widths[0], 3),
            stages=[
                Stage(repeated(PreActivatedBlock, (depth - 4) // 6, before, after, stride))
                for (before, after), stride in zip(pairwise(widths), strides[1:], strict=True)
            ],
            final=nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU()),
            widths=widths,
            strides=strides,
            num_features=widths[-1],
            num_classes=num_classes,
        )
        self.pre_activations = ("stages.1.blocks.0.bn1", "stages.2.blocks.0.bn1", "final.0")
        self.initialize_convolutions()

    def initialize_classifier(self, classifier: nn.Linear) -> None:
        """Set biases to 0."""
        nn.init.zeros_(classifier.bias)


class PreActivatedBlock(Block):
    """shortcut(x) + F(x), where F is twice BatchNorm, ReLU and a 3 x 3 convolution.

    If the width changes, the shortcut projects the output of the first BatchNorm and ReLU; else it is the identity.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = convolution(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = convolution(channels, channels, 3)
        self.relu = nn.ReLU()
        self.shortcut = convolution(in_channels, channels, 1, stride) if in_channels != channels else None
        self.activation = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` to `[B, channels, h / stride, w / stride]`."""
        activated = self.relu(self.bn1(x))
        residual = self.conv2(self.relu(self.bn2(self.conv1(activated))))
        x = (x if self.shortcut is None else self.shortcut(activated)) + residual
        return x


NETWORKS: dict[str, Make] = {
    f"wrn_{depth}_{factor}_cifar": partial(WideResNet, depth, factor) for depth in (16, 40) for factor in (1, 2)
}
