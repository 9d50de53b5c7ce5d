"""Base class and layers of the CRD benchmark's networks."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

Make = Callable[..., "CifarNetwork"]
"""A function that creates a network from `num_classes` and `in_chans`."""

Rename = tuple[str, str | Callable[[re.Match[str]], str]]
"""A pattern in the benchmark's parameter names, and its replacement here."""


class CifarNetwork(nn.Module):
    """Base of the benchmark's networks: images `[B, C, 32, 32]`, or of other sizes, to logits `[B, K]`.

    It has the interface that timm expects of its models. The layers have the same names in every family, listed here
    in the order in which they run::

        stem                  map [B, d_0, h_0, w_0]
        stages.0, stages.1 .. map [B, d_i, h_i, w_i], as the benchmark reads it
        stages.0.blocks ..    the same map before the stage's final activation, if it has one
        final                 map [B, num_features, h, w], the output of `forward_features`
        pool                  embedding [B, num_features]
        fc                    logits [B, K]

    `taps: benchmark` reads the features of the benchmark's methods, under the same names in every family: `stem`;
    `stage1`, `stage2`, ..; `pre1`, `pre2`, .., the stages' pre-activations; `last`, the last stage; and `parts`, the
    deepest stage of at least 8 x 8 cells for images of 32 x 32, on which methods that compare parts of an image work.

    Args:
        stem: the first layers.
        stages: the stages after the stem.
        final: the layers between the last stage and the pooling, if there are any.
        widths: channels `d_i` of stem and stages.
        strides: of the stem and of each stage.
        num_features: width of the embedding.
        num_classes: number of logits; 0 leaves out the classifier.

    Attributes:
        feature_info: layer, channels and total stride of stem and stages, in timm's format.
        pre_activations: for each stage, the layer whose output the benchmark calls its pre-activation: the input of its
            final activation, or in wide residual networks, the output of the next BatchNorm.
    """

    renames: ClassVar[Sequence[Rename]] = ()

    def __init__(
        self,
        stem: nn.Module,
        stages: Iterable[Stage],
        final: nn.Module | None,
        widths: Sequence[int],
        strides: Sequence[int],
        num_features: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.final = nn.Identity() if final is None else final
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.num_features = self.head_hidden_size = num_features
        self.feature_info: list[dict[str, Any]] = []
        reduction = 1
        for name, width, stride in zip(
            ["stem", *(f"stages.{i}" for i in range(len(self.stages)))], widths, strides, strict=True
        ):
            reduction *= stride
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": name})
        self.pre_activations = tuple(f"stages.{i}.blocks" for i in range(len(self.stages)))
        self.reset_classifier(num_classes)

    @property
    def benchmark_taps(self) -> dict[str, str]:
        """The layers that `taps: benchmark` reads, by name."""
        stages = [f"stages.{number}" for number in range(len(self.stages))]
        fine = [info["module"] for info in self.feature_info[1:] if info["reduction"] <= 4]
        return {
            "stem": "stem",
            **{f"stage{number}": layer for number, layer in enumerate(stages, 1)},
            **{f"pre{number}": layer for number, layer in enumerate(self.pre_activations, 1)},
            "last": stages[-1],
            "parts": fine[-1],
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map `[B, num_features, h, w]`."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = self.final(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits `[B, K]` of a last map, or with `pre_logits` the embedding `[B, num_features]`."""
        x = self.pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[B, K]` of normalized images `[B, C, H, W]`."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the linear layer that computes the logits, or an identity if there are no classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; `global_pool` is timm's argument, of which only `avg` is supported."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg', given {global_pool!r}")
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            self.fc = nn.Linear(self.num_features, num_classes)
            self.initialize_classifier(self.fc)

    def initialize_classifier(self, classifier: nn.Linear) -> None:
        """Initialize a new classifier as the benchmark does; the default keeps torch's initialization."""

    def initialize_convolutions(self) -> None:
        """Draw all convolutions' weights from He's normal distribution with mode `fan_out`; set their biases to 0."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def convert_checkpoint(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of a checkpoint of the CRD benchmark's code; called by `load_weights`."""
        return {self._renamed(name.removeprefix("module.")): tensor for name, tensor in state.items()}

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


class Block(nn.Module):
    """A residual or convolutional block that ends with `activation`."""

    activation: nn.Module


class Stage(nn.Module):
    """A sequence of blocks.

    The stage takes over the final activation of its last block, so that the input of that activation, the stage's
    pre-activation, is the output of a named layer: `blocks`.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__()
        *_, last = block_list = list(blocks)
        self.activation, last.activation = last.activation, nn.Identity()
        self.blocks = nn.Sequential(*block_list)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, d, h, w]` to `[B, d', h', w']`."""
        x = self.activation(self.blocks(x))
        return x


def repeated(
    make: Callable[[int, int, int], Block], depth: int, in_channels: int, channels: int, stride: int
) -> list[Block]:
    """Create `depth` blocks from (in_channels, channels, stride); only the first one changes width and size."""
    return [make(in_channels, channels, stride), *(make(channels, channels, 1) for _ in range(depth - 1))]


class Shuffle(nn.Module):
    """Channel shuffle: reorder channels from `(groups, d / groups)` to `(d / groups, groups)`."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """`[B, d, h, w]` to `[B, d, h, w]`."""
        batch, channels, height, width = x.shape
        x = x.reshape(batch, self.groups, channels // self.groups, height, width)
        return x.transpose(1, 2).reshape(batch, channels, height, width)


def conv_norm_relu(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Create a padded convolution, BatchNorm and ReLU, named `conv`, `bn` and `relu`."""
    layers: dict[str, nn.Module] = {
        "conv": convolution(in_channels, channels, kernel, stride),
        "bn": nn.BatchNorm2d(channels),
        "relu": nn.ReLU(),
    }
    return nn.Sequential(OrderedDict(layers))


def convolution(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Create a convolution without bias, padded to keep the size at stride 1."""
    return nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)


def in_stage(match: re.Match[str]) -> str:
    """Return the prefix of the blocks of a stage, whose number from 1 is the match's first group."""
    return f"stages.{int(match[1]) - 1}.blocks."
