"""What the networks of the CRD benchmark have in common."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

Make = Callable[..., "CifarNetwork"]
"""Makes a network from `num_classes` and `in_chans`."""

Rename = tuple[str, str | Callable[[re.Match[str]], str]]
"""A pattern in a name of the benchmark, and what stands for it here."""


class CifarNetwork(nn.Module):
    """Images `[B, C, 32, 32]`, or of other sizes, in; logits `[B, K]` out; with what timm expects of its models.

    The layers have the same names in every family, in the order in which they run::

        stem                  map [B, d_0, h_0, w_0]
        stages.0, stages.1 .. map [B, d_i, h_i, w_i], where the benchmark reads it
        stages.0.blocks ..    the same before the activation that ends the stage, if one does
        final                 map [B, num_features, h, w], what `forward_features` returns
        pool                  embedding [B, num_features]
        fc                    logits [B, K]

    So `taps: [stem, stages.0, stages.1, stages.2, pool]` are the features of a benchmark network of three stages.
    Methods that compare pre-activations tap `stages.0.blocks` and so on; a wide residual network has them elsewhere,
    see `pre_activations`.

    Args:
        stem: the first layers.
        stages: the stages after it.
        final: the layers between the last stage and the pooling, if there are any.
        widths: channels `d_i` of stem and stages.
        strides: of the stem and of each stage.
        num_features: width of the embedding.
        num_classes: width of the logits; 0 leaves the classifier out.

    Attributes:
        feature_info: layer, channels and total stride of stem and stages, as timm lists them.
        pre_activations: the layer of each stage whose output the benchmark calls its pre-activation.
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

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map `[B, num_features, h, w]`."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = self.final(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The logits `[B, K]` of a last map, or with `pre_logits` the embedding `[B, num_features]`."""
        x = self.pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """The logits `[B, K]` of normalized images `[B, C, H, W]`."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The linear layer that gives the logits; an identity where there are no classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the network a new classifier; `global_pool` is timm's, and only the average is here."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg', given {global_pool!r}")
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            self.fc = nn.Linear(self.num_features, num_classes)
            self.initialize_classifier(self.fc)

    def initialize_classifier(self, classifier: nn.Linear) -> None:
        """Initialize a new classifier as the benchmark does; by default as torch does."""

    def initialize_convolutions(self) -> None:
        """Draw the weights of all convolutions from He's normal distribution over their fan out; biases are 0."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @classmethod
    def own_name(cls, name: str) -> str:
        """The name here of what the benchmark's checkpoints call `name`."""
        for pattern, replacement in cls.renames:
            name = re.sub(pattern, replacement, name)
        return name


class Block(nn.Module):
    """A block that ends with `activation`."""

    activation: nn.Module


class Stage(nn.Module):
    """Blocks one after the other.

    The activation that ends the last block is made the stage's own, so that what it reads, the stage's
    pre-activation, has a name: the output of `blocks`.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__()
        *_, last = listed = list(blocks)
        self.activation, last.activation = last.activation, nn.Identity()
        self.blocks = nn.Sequential(*listed)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, d, h, w]`, of another width and perhaps smaller."""
        x = self.activation(self.blocks(x))
        return x


def repeated(
    make: Callable[[int, int, int], Block], depth: int, in_channels: int, channels: int, stride: int
) -> list[Block]:
    """`depth` blocks made from (channels read, channels given, stride), of which the first changes width and size."""
    return [make(in_channels, channels, stride), *(make(channels, channels, 1) for _ in range(depth - 1))]


class Shuffle(nn.Module):
    """Reads channels `(groups, d / groups)` in the order `(d / groups, groups)`, so that groups exchange channels."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """`[B, d, h, w]` to `[B, d, h, w]`."""
        batch, channels, height, width = x.shape
        x = x.reshape(batch, self.groups, channels // self.groups, height, width)
        return x.transpose(1, 2).reshape(batch, channels, height, width)


def conv_norm_relu(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the size at stride 1, BatchNorm and ReLU, named `conv`, `bn` and `relu`."""
    layers: dict[str, nn.Module] = {
        "conv": convolution(in_channels, channels, kernel, stride),
        "bn": nn.BatchNorm2d(channels),
        "relu": nn.ReLU(),
    }
    return nn.Sequential(OrderedDict(layers))


def convolution(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)


def in_stage(found: re.Match[str]) -> str:
    """Blocks of the stage whose number, counted from 1, is the first group of a match."""
    return f"stages.{int(found[1]) - 1}.blocks."


def benchmark_filter(state: dict[str, Tensor], model: CifarNetwork) -> dict[str, Tensor]:
    """The tensors of a checkpoint of the CRD benchmark under the names of `model`."""
    return {model.own_name(name.removeprefix("module.")): tensor for name, tensor in state.items()}
