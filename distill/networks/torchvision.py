"""Any classification model of torchvision, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError, did_you_mean
from distill.features import Features
from distill.networks.base import NamedTaps, Network, Size, map_to_tokens, pool_embedding
from distill.networks.classifier import last_linear
from distill.networks.layouts import Layout
from distill.networks.strides import find_places, last_of_each_stride
from distill.networks.weights import WeightsFile, load_weights


class Torchvision(Network):
    """A classification model of torchvision.

    The embedding is the input of the last linear layer (in SqueezeNet, of the last convolution); the tokens are the
    cells of the last map or the patch tokens without the class token, of the last layer of the largest stride.

    Args:
        name: of the model, as `torchvision.models.list_models` lists it.
        pretrained: download weights: `true` for torchvision's default ones, or their name, such as `IMAGENET1K_V1`.
        num_classes: number of logits; 0 gives none and leaves the classifier out. `None` takes the number of classes of
            the data, or in a pretrained teacher, those of its weights.
        weights: file with the weights, see `load_weights`; a `WeightsFile` where it holds several networks that fit.
        drop_classifier: do not load the classifier from that file; a teacher then gives no logits.
        taps: additional layers to read, as a list of layers or as name -> layer.
        image_size: resize the images to this size; `None` keeps their size, and a model with a fixed input size is
            created for that size.
        mean: of each channel; `None` takes that of the transforms of the weights, else of the default weights.
        std: of each channel, likewise.
        options: further arguments of the model, such as `stochastic_depth_prob`.
        layout: axes of the tapped outputs, see `Network`.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool | str = False,
        num_classes: int | None = None,
        weights: str | Path | WeightsFile | None = None,
        drop_classifier: bool = False,
        taps: NamedTaps = None,
        image_size: Size | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        options: dict[str, Any] | None = None,
        layout: Layout | Mapping[str, Layout] | None = None,
    ) -> None:
        super().__init__(weights, drop_classifier, taps, image_size, mean, std, layout)
        if pretrained and weights is not None:
            raise UserError(f"pretrained and weights ({str(weights)!r}) exclude each other, give one of the two")
        self.architecture = name
        self.pretrained = pretrained
        self.num_classes = num_classes
        self.options = options or {}

    @property
    def name(self) -> str:
        """The model's name in torchvision."""
        return self.architecture

    @property
    def channels(self) -> int | None:
        """3, as in all of torchvision's models."""
        return 3

    def create(self, num_classes: int) -> nn.Module:
        """Create the model with its classifier, for images of `input_shape` if it takes one size only.

        Raises:
            UserError: name, options, weights, image size or classes do not fit.
        """
        self.presets = _weights(self.architecture, self.pretrained)
        pretrained_classes = (
            len(self.presets.meta["categories"]) if self.pretrained and self.presets is not None else None
        )
        count = self._count(num_classes, pretrained_classes)
        self.size_options: dict[str, Any] = {}
        model, self.last = self._make_for_size(
            count if pretrained_classes is None else pretrained_classes, self.input_shape[1:]
        )
        if self.weights is not None:
            load_weights(model, self.weights, self.drop_classifier or count == 0, [self.last])
        self.has_logits = count > 0
        if not self.has_logits:
            model.set_submodule(self.last, nn.Identity())
        elif pretrained_classes not in (None, count):
            model.set_submodule(self.last, _renewed(model.get_submodule(self.last), count))
        return model

    def _count(self, num_classes: int, pretrained_classes: int | None) -> int:
        """Return the number of logits, given the classes of the data and those of the pretrained weights."""
        if (
            not self.learns
            and self.num_classes
            and (self.drop_classifier or pretrained_classes not in (None, self.num_classes))
        ):
            given = (
                "drop_classifier leaves it out" if self.drop_classifier else f"its own has {pretrained_classes} classes"
            )
            raise UserError(
                f"num_classes: a teacher's classifier of {self.num_classes} classes would be random, as {given}: leave "
                "num_classes out, or give 0 for none"
            )
        if self.num_classes is not None:
            return self.num_classes
        if self.learns:
            return num_classes
        return 0 if self.drop_classifier else num_classes if pretrained_classes is None else pretrained_classes

    def _make_for_size(self, count: int, size: tuple[int, int]) -> tuple[nn.Module, str]:
        """Return the model and the name of its last linear layer."""
        random_state = torch.get_rng_state()
        model = self._make(count or 1, {})
        try:
            return model, _last_layer(model, size)
        except Exception as error:
            reason = _first_line(error)
        for options in ({"image_size": size[0]}, {"input_size": size}):
            torch.set_rng_state(random_state)
            try:
                model = self._make(count or 1, options)
                last = _last_layer(model, size)
            except Exception:
                continue
            self.size_options = options
            return model, last
        expected = self.presets.transforms().crop_size[0] if self.presets is not None else 224
        raise UserError(
            f"{self.name!r} does not take images of {size[0]} x {size[1]} ({reason}): set image_size, the model's is "
            f"{expected}"
        )

    def _make(self, count: int, size_options: Mapping[str, Any], pretrained: bool = True) -> nn.Module:
        from torchvision.models import get_model

        arguments: dict[str, Any] = {"num_classes": count, **size_options, **self._weights_arguments()}
        if clash := {"num_classes", "weights"} & self.options.keys():
            raise UserError(f"options: {min(clash)!r} cannot be given there, {type(self).__name__} sets it itself")
        weights = self.presets if self.pretrained and pretrained else None
        try:
            model: nn.Module = get_model(self.architecture, weights=weights, **(arguments | self.options))
        except (TypeError, ValueError) as error:
            raise UserError(f"options {self.options} do not fit torchvision's {self.name!r}: {error}") from None
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"pretrained: torchvision's weights of {self.name!r} cannot be downloaded ({type(error).__name__}): "
                "give a file of them as weights"
            ) from error
        return model.eval()

    def _weights_arguments(self) -> dict[str, Any]:
        """Return what leaves out the additional classifiers, which only training with labels uses."""
        from torchvision.models import get_model_builder

        kind = inspect.signature(get_model_builder(self.architecture)).return_annotation
        known = inspect.signature(getattr(inspect.getmodule(get_model_builder(self.architecture)), str(kind), kind))
        return {name: value for name, value in _WITHOUT_AUXILIARIES.items() if name in known.parameters}

    def construction_code(self, path: str) -> list[str]:
        """Return the lines that create the model with torchvision and load its weights."""
        options = {**self.size_options, **self._weights_arguments(), **self.options}
        count = self.spec.logits[0] if self.spec.logits is not None else 1
        arguments = "".join(f", {name}={value!r}" for name, value in options.items())
        headless = [] if self.has_logits else [f"network.set_submodule({self.last!r}, torch.nn.Identity())"]
        return [
            "import torchvision",
            "from safetensors.torch import load_file",
            f"network = torchvision.models.get_model({self.architecture!r}, num_classes={count}{arguments})",
            *headless,
            f"network.load_state_dict(load_file({path!r}))",
        ]

    def model_for_size(self, size: tuple[int, int]) -> nn.Module | None:
        """Create the model for images of another size; `None` if it takes only its own."""
        name = next(iter(self.size_options), None)
        options = [{name: size if name == "input_size" else size[0]}] if name else [{"image_size": size[0]}]
        try:
            return self._make(1, options[0], pretrained=False)
        except Exception:
            return None

    def default_normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return the mean and standard deviation of the transforms of the weights."""
        if self.presets is None:
            return (0.0,), (1.0,)
        transforms = self.presets.transforms()
        return transforms.mean, transforms.std

    def run(self, image: Tensor) -> object:
        """Run the model."""
        return self.model(image)

    def feature_layers(self, image: Tensor) -> tuple[dict[str, str], dict[str, str]]:
        """Return the layer of the tokens and the last linear layer, whose input is the embedding."""
        self.classifier = [self.last] if self.has_logits else []
        strides = last_of_each_stride(self.model, find_places(self, image))
        self.cells = strides[max(strides)] if strides else None
        outputs = {} if self.cells is None else {"tokens": self.cells.layer}
        return outputs, {"input of the last layer": self.last}

    def forward_features(self, image: Tensor) -> Features:
        """Run the model once."""
        output = self.model(image)
        logits = output if isinstance(output, Tensor) else output.logits  # with additional classifiers
        embedding = pool_embedding(self.taps.tensors["input of the last layer"])
        tokens, grid = None, None
        if self.cells is not None:
            cells = self.tapped("tokens")
            grid = self.cells.grid or (cells.shape[2], cells.shape[3])
            tokens = map_to_tokens(cells) if cells.ndim == 4 else cells[:, -grid[0] * grid[1] :]
        return Features(logits if self.has_logits else None, embedding, tokens, grid)


_WITHOUT_AUXILIARIES = {"aux_logits": False, "init_weights": True}
"""Arguments of GoogLeNet and Inception; the second is their default, without which they warn."""


def _weights(name: str, wanted: bool | str) -> Any:
    """Return the weights of the given name, else the default ones; `None` if there are none."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classification model {name!r}: {did_you_mean(name, known)}")
    weights: Any = models.get_model_weights(name)
    if isinstance(wanted, str):
        names = [each.name for each in weights]
        if wanted not in (*names, "DEFAULT"):
            raise UserError(f"torchvision's {name!r} has no weights {wanted!r}: {did_you_mean(wanted, names)}")
        return weights[wanted]
    if wanted and not list(weights):
        raise UserError(f"torchvision has no weights of {name!r}: give a file of them as weights")
    return next(iter(weights), None) and weights.DEFAULT


def _last_layer(model: nn.Module, size: tuple[int, int]) -> str:
    """Run the model once and return its last linear layer, or without one, its last convolution."""
    with torch.no_grad():
        _, linear = last_linear(model, torch.zeros(2, 3, *size))
    convolutions = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    return convolutions[-1] if linear is None else linear


def _renewed(layer: nn.Module, count: int) -> nn.Module:
    """Return a new layer like a classifier, for another number of classes."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(layer.in_channels, count, layer.kernel_size, bias=bias)  # type: ignore[arg-type]
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, count, bias)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
