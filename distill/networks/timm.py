"""Any network of timm by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError, did_you_mean
from distill.features import Features
from distill.networks.base import Network, Size, pooled, rows
from distill.networks.weights import load_weights


class Timm(Network):
    """A network of timm, or one of the CRD benchmark, which `distill.networks.cifar` registers there.

    The embedding is what the classifier reads; the tokens are what `forward_features` returns, as cells of its last
    map or as patch tokens without class, distillation and register tokens.

    Args:
        name: of the model, with or without the tag of its weights, as timm lists it.
        pretrained: download timm's weights.
        weights: file with the weights, see `load_weights`.
        drop_classifier: leave out the classifier of that file.
        num_classes: width of the logits; `None` is that of the data.
        taps: layers to read besides, under their own names or as name -> layer.
        image_size: resize the images to this size; `None` leaves them as they come, and a model that is made for
            one size is made for theirs.
        mean: of each channel; `None` is the model's own.
        std: of each channel; `None` is the model's own.
        options: further arguments of `timm.create_model`, such as `drop_path_rate` or `patch_size`.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        weights: str | Path | None = None,
        drop_classifier: bool = False,
        num_classes: int | None = None,
        taps: Sequence[str] | Mapping[str, str] | None = None,
        image_size: Size | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(weights, drop_classifier, taps, image_size, mean, std)
        if pretrained and weights is not None:
            raise UserError(f"pretrained and weights ({str(weights)!r}) exclude each other, give one of the two")
        self.architecture = name
        self.pretrained = pretrained
        self.num_classes = num_classes
        self.options = options or {}

    @property
    def name(self) -> str:
        """The model's name in timm."""
        return self.architecture

    def create(self, num_classes: int) -> nn.Module:
        """The timm model, made for `input_shape` if it does not take images of that size as it is.

        Raises:
            UserError: name, options, weights or image size do not fit.
        """
        _check_name(self.architecture)
        count = self.num_classes if self.num_classes is not None else num_classes
        random_state = torch.get_rng_state()
        self.made_for: dict[str, tuple[int, int]] = {}
        model = self._make(count)
        try:
            self._try(model)
        except Exception as error:
            torch.set_rng_state(random_state)
            try:
                self.made_for = {"img_size": self.input_shape[1:]}
                model = self._make(count, **self.made_for)
                self._try(model)
            except Exception:
                raise _wrong_size(model, self.name, self.input_shape, error) from error
        if self.weights is not None:
            load_weights(model, self.weights, self.drop_classifier, [name for name, _ in _classifiers(model)])
        return model

    def construction_code(self, path: str) -> list[str]:
        """By timm alone; what this project has registered there needs the project too."""
        from distill.networks.cifar import NETWORKS

        registering = ["import distill.networks.cifar"] if self.architecture in NETWORKS else []
        made: dict[str, Any] = {"num_classes": self.spec["logits"][0], "in_chans": self.input_shape[0], **self.made_for}
        arguments = "".join(f", {name}={value!r}" for name, value in {**made, **self.options}.items())
        return [
            "import timm",
            *registering,
            f"network = timm.create_model({self.architecture!r}{arguments}, checkpoint_path={path!r})",
        ]

    def _make(self, num_classes: int, **size: tuple[int, ...]) -> nn.Module:
        import timm

        own: dict[str, Any] = {
            "pretrained": self.pretrained,
            "num_classes": num_classes,
            "in_chans": self.input_shape[0],
        }
        if clash := own.keys() & self.options.keys():
            raise UserError(f"options: {min(clash)!r} is not for options, {type(self).__name__} sets it itself")
        try:
            model: nn.Module = timm.create_model(self.architecture, **own, **{**size, **self.options})
        except TypeError as error:
            raise UserError(f"options {self.options} do not fit timm's {self.name!r}: {error}") from None
        except Exception as error:
            if not self.pretrained:
                raise UserError(f"timm cannot make {self.name!r} with options {self.options}: {error}") from error
            raise UserError(
                f"pretrained: timm's weights of {self.name!r} cannot be had ({type(error).__name__}), "
                "give a file of them as weights"
            ) from error
        return model

    def _try(self, model: nn.Module) -> None:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(2, *self.input_shape))

    def own_normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        """What the weights were trained with, as timm tells it."""
        config: Any = getattr(self.model, "pretrained_cfg", {})
        return config.get("mean", (0.0,)), config.get("std", (1.0,))

    def feature_layers(self, image: Tensor) -> tuple[dict[str, str], dict[str, str]]:
        """What the classifiers read; also finds where the tokens are."""
        self.layout = _find_layout(self.model, image)
        self.classifier = [_first_after_pooling(name, layer) for name, layer in _classifiers(self.model)]
        self.classifier_inputs = {f"input of {name}": name for name in self.classifier}
        return {}, self.classifier_inputs

    def forward_features(self, image: Tensor) -> Features:
        """Run `forward_features`, then the head, once each."""
        model: Any = self.model
        layout = self.layout
        if layout.apart:
            final, maps = model.forward_intermediates(image, indices=1, norm=layout.norm)
            cells = maps[-1]
        else:
            cells = final = model.forward_features(image)
        logits = model.forward_head(final)
        if isinstance(logits, tuple):  # one for each classifier, in train mode
            logits = torch.stack(logits).mean(0)
        embedding = _join([pooled(self.taps.seen[name]) for name in self.classifier_inputs])
        tokens, grid = layout.tokens(cells)
        return Features(logits, embedding, tokens, grid)


@dataclass(frozen=True)
class _Layout:
    """Where the tokens are: in a map, at the end of a sequence, or apart from what the head reads."""

    known: bool = True
    channels_last: bool = False
    grid: tuple[int, int] | None = None
    apart: bool = False
    norm: bool = False

    def tokens(self, cells: Any) -> tuple[Tensor | None, tuple[int, int] | None]:
        if not self.known:
            return None, None
        if cells.ndim == 3:
            assert self.grid is not None
            return cells[:, -self.grid[0] * self.grid[1] :], self.grid
        if self.channels_last:
            return cells.flatten(1, 2), (cells.shape[1], cells.shape[2])
        return rows(cells), (cells.shape[2], cells.shape[3])


def _find_layout(network: nn.Module, image: Tensor) -> _Layout:
    """Hold what `forward_features` returns against the last map of `forward_intermediates`."""
    model: Any = network
    final = model.forward_features(image)
    if isinstance(final, Tensor) and final.ndim == 4:
        return _Layout(channels_last=getattr(model, "output_fmt", "NCHW") == "NHWC")
    if not hasattr(model, "forward_intermediates"):
        return _Layout(known=False)
    norm = True
    try:
        again, maps = model.forward_intermediates(image, indices=1, norm=norm)
    except AssertionError:  # a family that has no norm to apply to the last map
        norm = False
        again, maps = model.forward_intermediates(image, indices=1, norm=norm)
    height, width = maps[-1].shape[-2:]
    if isinstance(final, Tensor) and _equal(final[:, -height * width :], rows(maps[-1])):
        return _Layout(grid=(height, width))
    return _Layout(known=_equal(final, again), apart=True, norm=norm)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    return len(one) == len(other) and all(map(_equal, one, other))


def _classifiers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and layer of each classifier: one, or several whose logits are averaged."""
    model: Any = network
    found = model.get_classifier()
    layers = list(found) if isinstance(found, tuple | list | nn.ModuleList) else [found]
    return [(name, layer) for name, layer in network.named_modules() if any(layer is one for one in layers)]


def _first_after_pooling(name: str, classifier: nn.Module) -> str:
    """The classifier itself, or its linear layer if it pools first."""
    if not hasattr(classifier, "global_pool"):
        return name
    return [f"{name}.{part}" for part, layer in classifier.named_modules() if isinstance(layer, nn.Linear)][-1]


def _join(outputs: list[Tensor]) -> Tensor:
    """The mean of what several classifiers read, or one beside the other where their widths differ."""
    if len({reading.shape[1] for reading in outputs}) > 1:  # the batch may be symbolic
        return torch.cat(outputs, 1)
    return torch.stack(outputs).mean(0) if len(outputs) > 1 else outputs[0]


def _check_name(name: str) -> None:
    import timm

    import distill.networks.cifar  # noqa: F401  # registers its networks

    if ":" in name:  # on a hub or in a folder
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(f"timm has no model {architecture!r}: {did_you_mean(architecture, timm.list_models())}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UserError(f"timm's {architecture!r} has no weights {tag!r}: {did_you_mean(tag, tags)}")


def _wrong_size(model: nn.Module, name: str, shape: tuple[int, int, int], error: Exception) -> UserError:
    config: Any = getattr(model, "pretrained_cfg", {})
    height, width = config.get("input_size", shape)[1:]
    own = f"{height}" if height == width else f"[{height}, {width}]"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"{name!r} does not take images of {shape[1]} x {shape[2]} ({reason}): set image_size, its own is {own}"
    )
