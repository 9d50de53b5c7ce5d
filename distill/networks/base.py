"""The interface of a teacher or a student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distill.errors import UserError
from distill.features import Features, FeatureSpec, Taps

Size = int | tuple[int, int]
"""A height and a width, or one number for both."""


class Network(nn.Module, ABC):
    """A teacher or a student: images in, `Features` out.

    A subclass makes the network in `create` and reads it in `look`. Images come as the data have them; the network
    resizes them to its own input size and normalizes them with its own mean and standard deviation. Nothing works
    before `build`.

    Args:
        weights: file with the weights, see `load_weights`.
        drop_classifier: leave out the classifier of that file.
        taps: layers to read besides, under their own names or as name -> layer.
        image_size: resize the images to this size (bilinear, antialiased); `None` leaves them as they come.
        mean: of each channel, in [0, 1]; one number serves for all channels.
        std: of each channel, likewise.

    Attributes:
        model: the network itself, whose own key names are what is exported.
        spec: the shapes of what it gives.
        classifier: names of the layers of `model` that make the logits, none where they cannot be told from the rest.
        image_shape: `(C, H, W)` of the data.
    """

    model: nn.Module
    spec: FeatureSpec
    classifier: Sequence[str] = ()
    image_shape: tuple[int, int, int]
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        weights: str | Path | None = None,
        drop_classifier: bool = False,
        taps: Sequence[str] | Mapping[str, str] | None = None,
        image_size: Size | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if drop_classifier and weights is None:
            raise UserError("drop_classifier leaves out a part of weights, but weights is not given")
        self.weights = weights
        self.drop_classifier = drop_classifier
        self.tapped = dict(taps) if isinstance(taps, Mapping) else {layer: layer for layer in taps or ()}
        if own := {"logits", "embedding", "tokens"} & self.tapped.keys():
            raise UserError(f"taps: {min(own)!r} is what the network itself gives, take another name")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.normalization = (mean, std)

    @property
    def name(self) -> str:
        """What tables call it."""
        return type(self).__name__

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of what the model reads: the data's shape, resized."""
        return (self.image_shape[0], *(self.image_size or self.image_shape[1:]))

    @abstractmethod
    def create(self, num_classes: int) -> nn.Module:
        """Make the model with its weights for images of `input_shape`."""

    @abstractmethod
    def forward_features(self, image: Tensor) -> Features:
        """Run `model` once over normalized images `[B, *input_shape]`; `forward` adds the maps of the taps."""

    def feature_layers(self, image: Tensor) -> tuple[dict[str, str], dict[str, str]]:
        """Layers of which `look` reads the outputs and the inputs in `taps.seen`, as name -> layer.

        Called once by `build` with an image like those of `look`, in eval mode. The default names none.
        """
        return {}, {}

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        """Make the model, load its weights and find its shapes by a pass over two dummy images.

        Args:
            num_classes: of the data.
            image_shape: `(C, H, W)` of the data.

        Raises:
            UserError: the model, its weights, its taps or its class count do not fit.
        """
        self.image_shape = image_shape
        self.model = self.create(num_classes)
        for name, values, own in zip(("mean", "std"), self.normalization, self.own_normalization(), strict=True):
            self.register_buffer(name, _per_channel(name, values, own, image_shape[0]), persistent=False)
        was_training = self.training
        self.eval()
        with torch.no_grad():
            image = self.prepare(self.noise())
            outputs, inputs = self.feature_layers(image)
            self.taps = Taps(self.model, {**self.tapped, **outputs}, inputs)
            with self.taps:
                features = self.forward_features(image)
                self.taps.protect()
                self.spec = FeatureSpec.of(self._with_maps(features))
        self.train(was_training)

    def own_normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation that the model was made for; the default changes nothing."""
        return (0.0,), (1.0,)

    def forward(self, image: Tensor) -> Features:
        """What the network sees of `image` `[B, C, H, W]`, in [0, 1] and not normalized."""
        self.taps.open()  # no `with`: torch 2.11 does not trace a context manager of one's own
        features = self._with_maps(self.forward_features(self.prepare(image)))
        self.taps.close()
        return features

    def _with_maps(self, features: Features) -> Features:
        return replace(features, maps={name: self.taps.seen[name] for name in self.tapped})

    def loading_code(self, path: str) -> str:
        """The lines of Python that load the weights exported to `path` without this project."""
        return "\n".join(
            [
                "import torch",
                *self.construction_code(path),
                f"mean, std = {_lines_of(self.mean)}, {_lines_of(self.std)}",
                "logits = network.eval()((image - mean) / std)  # image: float32 [B, C, H, W] in [0, 1]"
                + (f", resized to {self.image_size}" if self.image_size else ""),
            ]
        )

    def construction_code(self, path: str) -> list[str]:
        """The lines among them that make `network`."""
        return [
            "from safetensors.torch import load_file",
            f"network.load_state_dict(load_file({path!r}))  # network: your {type(self.model).__name__}",
        ]

    def prepare(self, image: Tensor) -> Tensor:
        """Resize and normalize `image` in at least float32, then cast it to the dtype of the weights."""
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        if self.image_size is not None and image.shape[-2:] != self.image_size:
            image = interpolate(image, self.image_size, mode="bilinear", antialias=True)
        image = (image - self.mean) / self.std
        weight = next((weight for weight in self.model.parameters() if weight.is_floating_point()), image)
        return image.to(weight.dtype)

    def noise(self) -> Tensor:
        """Two images of noise, the same ones each time and not drawn from the global generator."""
        noise = torch.rand(2, *self.image_shape, generator=torch.Generator().manual_seed(0), device="cpu")
        return noise.to(next(self.model.parameters(), noise).device)


def pooled(reading: Tensor) -> Tensor:
    """An embedding `[B, d]` as it is, or the mean of each channel of `[B, d, h, w]`."""
    return reading.mean((2, 3)) if reading.ndim == 4 else reading


def rows(maps: Tensor) -> Tensor:
    """The cells of maps `[B, d, h, w]` as tokens `[B, h * w, d]`, row by row."""
    return maps.flatten(2).transpose(1, 2)


def _lines_of(values: Tensor) -> str:
    return f"torch.tensor({[round(value, 6) for value in values.flatten().tolist()]}).view(-1, 1, 1)"


def _per_channel(name: str, values: Sequence[float] | None, default: Sequence[float], channels: int) -> Tensor:
    if values is None:  # three colors' statistics serve a gray image by their mean
        values = default if len(default) == channels else [sum(default) / len(default)]
    if len(values) not in (1, channels):
        raise UserError(f"{name} has {len(values)} values, but the images have {channels} channels")
    if name == "std" and min(values) <= 0:
        raise UserError(f"std must be above 0, given {list(values)}")
    return torch.tensor(values, dtype=torch.float32).expand(channels).reshape(channels, 1, 1).clone()
