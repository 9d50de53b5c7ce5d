"""The interface of a teacher or a student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distill.configurable import Configurable
from distill.errors import UserError, require_above
from distill.features import Features, FeatureSpec, Taps
from distill.networks.classifier import Classifier, find_classifier
from distill.networks.layouts import Axes, Layout, find_axes
from distill.networks.modes import eval_mode
from distill.networks.strides import resolve_taps
from distill.networks.weights import WeightsFile

Size = int | tuple[int, int]
"""A height and a width, or one number for both."""

NamedTaps = Literal["benchmark"] | Sequence[str] | Mapping[str, str] | None
"""Layers to read: those of the CRD benchmark, a list, or name -> layer."""


class FeatureSource(Configurable, nn.Module, ABC):
    """Anything that can be configured as a teacher: a network, or features that are computed in another way."""


class Network(FeatureSource):
    """A teacher or a student: images in, `Features` out.

    A subclass creates the model in `create` and runs it in `forward_features`. Images come in [0, 1] at the size of
    the data; the network resizes them to its input size and normalizes them with its mean and standard deviation.
    Call `build` before anything else.

    Taps also take the names `stride4`, `stride16` and so on for the last layer of that stride, and in a network of
    equal blocks, as a plain transformer, `block50` for the one at half of the depth; both are maps in every network.

    Args:
        weights: file with the weights, see `load_weights`; a `WeightsFile` where it holds several networks that fit.
        drop_classifier: do not load the classifier from that file.
        taps: additional layers to read, as a list of layers or as name -> layer; or `benchmark`, also in a list, which
            reads those of the model's `benchmark_taps`: the features of the CRD benchmark, under the same names in all
            its networks.
        image_size: resize the images to this size (bilinear, antialiased); `None` keeps their size.
        mean: of each channel, in [0, 1]; a single number applies to all channels. For images that the data have
            already normalized, give mean 0 and std 1.
        std: of each channel, likewise.
        layout: axes of the tapped outputs, for all taps or by tap name: `NCHW`, `NHWC`, `NLC` or `NCL` (images N,
            channels C, rows H, columns W, tokens L); needed only where passes at other image sizes do not show them.

    Attributes:
        model: the wrapped module, whose key names are the ones that are exported.
        spec: shapes of the features.
        classifier: names of the layers of `model` that compute the logits; empty if they cannot be identified.
        image_shape: `(C, H, W)` of the data.
        learns: whether the network is to be trained. The classifier of one that is not is never random while the rest
            is not: it keeps its own, for whichever classes, or gives no logits.
        dtype: of the model's images and weights, if it computes in no other.
        tap_layers: layer by tap name, once built without the names by stride and depth.
    """

    model: nn.Module
    spec: FeatureSpec
    classifier: Sequence[str] = ()
    image_shape: tuple[int, int, int]
    learns: bool = True
    dtype: torch.dtype | None = None
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        weights: str | Path | WeightsFile | None = None,
        drop_classifier: bool = False,
        taps: NamedTaps = None,
        image_size: Size | None = None,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        layout: Layout | Mapping[str, Layout] | None = None,
    ) -> None:
        super().__init__()
        if drop_classifier and weights is None:
            raise UserError("drop_classifier leaves out a part of weights, but weights is not given")
        self.weights = weights
        self.drop_classifier = drop_classifier
        if isinstance(taps, str) and taps != "benchmark":
            raise UserError(f"taps must be a list of layers, name -> layer, or 'benchmark', given {taps!r}")
        taps = [taps] if isinstance(taps, str) else () if taps is None else taps
        self.tap_layers = dict(taps) if isinstance(taps, Mapping) else {layer: layer for layer in taps}
        if reserved := {"logits", "embedding", "tokens"} & self.tap_layers.keys():
            raise UserError(f"taps: {min(reserved)!r} is the name of a feature of every network, choose another name")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.normalization = (mean, std)
        self.layout = layout
        self.classify: Classifier | None = None
        self.axes: dict[str, Axes] = {}
        self.grids: dict[str, tuple[int, int]] = {}

    @property
    def name(self) -> str:
        """The name shown in tables."""
        return type(self).__name__

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of the model's input: the shape of the data after resizing."""
        return (self.channels or self.image_shape[0], *(self.image_size or self.image_shape[1:]))

    @property
    def channels(self) -> int | None:
        """The number of channels that the model takes, to which gray images are repeated; `None`: that of the data."""
        return None

    @property
    def output_feature(self) -> Literal["logits", "embedding"]:
        """The feature that an exported model returns: the logits, or without a classifier the embedding."""
        return "embedding" if self.spec.logits is None else "logits"

    @abstractmethod
    def create(self, num_classes: int) -> nn.Module:
        """Create the model, with its weights, for images of `input_shape`."""

    @abstractmethod
    def forward_features(self, image: Tensor) -> Features:
        """Run `model` once on normalized images `[B, *input_shape]`; `forward` adds the maps of the taps."""

    def feature_layers(self, image: Tensor) -> tuple[dict[str, str], dict[str, str]]:
        """Return the layers whose outputs and whose inputs `forward_features` finds in `taps.tensors`.

        Called once by `build`, in eval mode, with an image as `forward_features` gets it. The default returns none.

        Returns:
            Outputs and inputs, each as name -> layer.
        """
        return {}, {}

    def run(self, image: Tensor) -> object:
        """Run every tapped layer once on `image`, as `forward_features` gets it."""
        return self.forward_features(image)

    def declared_layouts(self, layers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the layouts that the family declares for outputs, given as tap name -> layer; the default: of none."""
        return {}

    def model_for_size(self, size: tuple[int, int]) -> nn.Module | None:
        """Create a model for images `(H, W)`, without weights, for families whose models take one size only."""
        return None

    def build(self, num_classes: int, image_shape: tuple[int, int, int], learns: bool = True) -> None:
        """Create the model, load its weights and determine its shapes by a pass over two dummy images.

        Args:
            num_classes: of the data; 0 for data without labels, for which a model gets no classifier.
            image_shape: `(C, H, W)` of the data.
            learns: whether the network is to be trained; a teacher is not.

        Raises:
            UserError: the model, its weights, its taps or its number of classes do not fit.
        """
        self.image_shape = image_shape
        self.learns = learns
        self.model = self.create(num_classes)
        if image_shape[0] not in (1, self.input_shape[0]):
            raise UserError(f"{self.name!r} takes images of {self.channels} channels, the data have {image_shape[0]}")
        if "benchmark" in self.tap_layers:
            del self.tap_layers["benchmark"]
            self.tap_layers = _benchmark_taps(self.model, self.name) | self.tap_layers
        defaults = self.default_normalization()
        for name, values, default in zip(("mean", "std"), self.normalization, defaults, strict=True):
            self.register_buffer(name, _per_channel(name, values, default, self.input_shape[0]), persistent=False)
        if self.training and not self.model.training:  # as transformers returns models; frozen layers stay frozen
            self.model.train()
        with eval_mode(self), torch.no_grad():
            image = self.prepare(self.dummy_images())
            self.taps = Taps(self.model)
            outputs, inputs = self.feature_layers(image)
            self.taps.add(outputs, inputs)
            self.tap_layers, self.grids = resolve_taps(self, image, self.tap_layers)
            self.taps.add(self.tap_layers)
            self.axes = find_axes(self, image, {**self.tap_layers, **outputs})
            with self.taps:
                features = self.forward_features(image)
                self.taps.protect()
                self.classify = find_classifier(self.model, self.classifier, features)
                self.spec = FeatureSpec.of(self._complete(features))

    def default_normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return the mean and standard deviation that the model expects; the default changes nothing."""
        return (0.0,), (1.0,)

    def facts(self) -> dict[str, Any]:
        """Return what only the loading of pretrained weights tells, as data for a checkpoint; by default nothing."""
        return {}

    def restore_facts(self, facts: Mapping[str, Any]) -> None:
        """Take over the `facts` of the network that this one is rebuilt after, without its pretrained weights."""

    def forward(self, image: Tensor) -> Features:
        """Compute the features of `image` `[B, C, H, W]`, in [0, 1] and not normalized."""
        self.taps.open()  # no `with`: torch 2.11 does not trace custom context managers
        features = self._complete(self.forward_features(self.prepare(image)))
        self.taps.close()
        return features

    def _complete(self, features: Features) -> Features:
        return replace(features, maps={name: self.tapped(name) for name in self.tap_layers}, classify=self.classify)

    def tapped(self, name: str) -> Tensor:
        """Return the output of a tap in the current pass: a map `[B, d, h, w]`, tokens `[B, N, d]` or a vector."""
        tensor = self.taps.tensors[name]
        axes = self.axes.get(name)
        if axes is not None and axes != tuple(range(tensor.ndim)):
            tensor = tensor.permute(axes)
        if (grid := self.grids.get(name)) is not None:
            tensor = tensor[:, -grid[0] * grid[1] :].mT
            tensor = tensor.reshape(*tensor.shape[:2], *grid)
        return tensor

    def loading_code(self, path: str) -> str:
        """Return Python code that loads the weights exported to `path` and runs them without this project."""
        images = f"float32 [B, C, H, W] in [0, 1]{f', resized to {self.image_size}' if self.image_size else ''}"
        return "\n".join(
            [
                "import torch",
                *self.construction_code(path),
                f"mean, std = {_tensor_code(self.mean)}, {_tensor_code(self.std)}",
                f"{self.output_feature} = network.eval()((image - mean) / std)  # image: {images}",
            ]
        )

    def construction_code(self, path: str) -> list[str]:
        """Return the lines of `loading_code` that construct `network` and load its weights from `path`."""
        return [
            "from safetensors.torch import load_file",
            f"network.load_state_dict(load_file({path!r}))  # network: your {type(self.model).__name__}",
        ]

    def prepare(self, image: Tensor) -> Tensor:
        """Resize and normalize `image` in at least float32, then cast it to the dtype of the weights."""
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        if image.shape[1] != self.input_shape[0]:
            image = image.expand(-1, self.input_shape[0], -1, -1)
        if self.image_size is not None and image.shape[-2:] != self.image_size:
            image = interpolate(image, self.image_size, mode="bilinear", antialias=True)
        image = (image - self.mean) / self.std
        weight = next((weight for weight in self.model.parameters() if weight.is_floating_point()), image)
        return image.to(self.dtype or weight.dtype)

    def dummy_images(self) -> Tensor:
        """Return two images of noise, always the same ones, without drawing from the global generator."""
        noise = torch.rand(2, *self.image_shape, generator=torch.Generator().manual_seed(0), device="cpu")
        return noise.to(next(self.model.parameters(), noise).device)


def pool_embedding(output: Tensor) -> Tensor:
    """Return an embedding `[B, d]` unchanged, or the channel means of a map `[B, d, h, w]`."""
    return output.mean((2, 3)) if output.ndim == 4 else output


def map_to_tokens(cells: Tensor) -> Tensor:
    """Return the cells of a map `[B, d, h, w]` as tokens `[B, h * w, d]`, row by row."""
    return cells.flatten(2).transpose(1, 2)


def _benchmark_taps(model: nn.Module, name: str) -> dict[str, str]:
    taps: Mapping[str, str] | None = getattr(model, "benchmark_taps", None)
    if taps is None:
        raise UserError(
            f"taps 'benchmark' are those of the CRD benchmark's networks, such as resnet8x4_cifar, and {name!r} is no "
            "such network: give name -> layer, such as {stage1: layer1}"
        )
    return dict(taps)


def _tensor_code(values: Tensor) -> str:
    return f"torch.tensor({[round(value, 6) for value in values.flatten().tolist()]}).view(-1, 1, 1)"


def _per_channel(name: str, values: Sequence[float] | float | None, default: Sequence[float], channels: int) -> Tensor:
    if isinstance(values, int | float):
        values = [values]
    if values is None:  # gray images use the mean of the statistics of three colors
        values = default if len(default) == channels else [sum(default) / len(default)]
    if len(values) not in (1, channels):
        raise UserError(f"{name} has {len(values)} values, but the images have {channels} channels")
    if name == "std":
        require_above(0, std=min(values))
    return torch.tensor(values, dtype=torch.float32).expand(channels).reshape(channels, 1, 1).clone()
