"""Any timm model, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError, did_you_mean
from distill.features import Features
from distill.networks.base import NamedTaps, Network, Size, pool_embedding
from distill.networks.layouts import Layout
from distill.networks.timm_tokens import find_token_layout
from distill.networks.weights import WeightsFile, load_weights


class Timm(Network):
    """A timm model, or one of the CRD benchmark's networks, which `distill.networks.cifar` registers with timm.

    The embedding is the input of the classifier, or without one, what the model pools; the tokens are what timm's
    `forward_features` returns: the cells of the last map, or the patch tokens without class, distillation and register
    tokens.

    Args:
        name: of the model, as timm lists it, with or without the tag of its weights.
        pretrained: download timm's weights.
        weights: file with the weights, see `load_weights`; a `WeightsFile` where it holds several networks that fit.
        drop_classifier: do not load the classifier from that file.
        num_classes: number of logits; 0 gives none, and leaves the classifier out of the model and of the files. `None`
            takes the number of classes of the data. A pretrained teacher keeps its own classifier instead, for
            whichever classes; one that was trained without (as DINO, MAE and SigLIP were; CLIP's projection to the
            space of its texts is none), or whose classifier is dropped from `weights`, gives no logits.
        taps: additional layers to read, as a list of layers or as name -> layer; `benchmark` for the CRD benchmark's
            networks, see `CifarNetwork.benchmark_taps`.
        image_size: resize the images to this size; `None` keeps their size, and a model with a fixed input size is
            created for that size.
        mean: of each channel; `None` takes the model's.
        std: of each channel; `None` takes the model's.
        options: further arguments of `timm.create_model`, such as `drop_path_rate` or `patch_size`.
        layout: axes of the outputs of the taps, for all or by tap name, where passes at other image sizes do not show
            them: `NCHW`, `NHWC`, `NLC` or `NCL`.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        weights: str | Path | WeightsFile | None = None,
        drop_classifier: bool = False,
        num_classes: int | None = None,
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
        """The model's name in timm."""
        return self.architecture

    def create(self, num_classes: int) -> nn.Module:
        """Create the timm model, with `input_shape` as its `img_size` if it does not take such images by default.

        Raises:
            UserError: name, options, weights or image size do not fit.
        """
        _check_name(self.architecture)
        self.count = count = self._count(num_classes)
        random_state = torch.get_rng_state()
        self.size_options: dict[str, tuple[int, int]] = {}
        model = self._make(count)
        try:
            self._try(model)
        except Exception as error:
            torch.set_rng_state(random_state)
            try:
                self.size_options = {"img_size": self.input_shape[1:]}
                model = self._make(count, size=self.input_shape[1:])
                self._try(model)
            except Exception:
                raise _wrong_size(model, self.name, self.input_shape, error) from error
        self._require_trained_classifier(model)
        if self.weights is not None:
            names = [name for name, _ in _classifiers(model)] if count else self._left_out(model)
            load_weights(model, self.weights, self.drop_classifier or count == 0, names)
        return model

    def _count(self, num_classes: int) -> int | None:
        """Return the number of logits; `None` for those of the pretrained weights."""
        if self.num_classes is not None or self.learns:
            return num_classes if self.num_classes is None else self.num_classes
        if self.drop_classifier or (self.pretrained and _has_projection(self.architecture)):
            return 0
        return None if self.pretrained else num_classes

    def _left_out(self, model: nn.Module) -> list[str]:
        """Return the names of the layers that a model without classes lacks."""
        random_state = torch.get_rng_state()
        whole = self._make(1, self.size_options.get("img_size"), pretrained=False)
        torch.set_rng_state(random_state)
        return sorted({name.rpartition(".")[0] for name in whole.state_dict().keys() - model.state_dict().keys()})

    def _require_trained_classifier(self, model: nn.Module) -> None:
        if self.learns or not self.num_classes:
            return
        config: Any = getattr(model, "pretrained_cfg", {})
        pretrained_classes = config.get("num_classes", 0)
        if self.drop_classifier or (self.pretrained and pretrained_classes != self.num_classes):
            given = (
                "drop_classifier leaves it out" if self.drop_classifier else f"its own has {pretrained_classes} classes"
            )
            raise UserError(
                f"num_classes: a teacher's classifier of {self.num_classes} classes would be random, as {given}: leave "
                "num_classes out, or give 0 for none"
            )

    def construction_code(self, path: str) -> list[str]:
        """Return the lines that create the model with timm; the benchmark's networks also need this project."""
        from distill.networks.cifar import NETWORKS

        registration = ["import distill.networks.cifar"] if self.architecture in NETWORKS else []
        shape: dict[str, Any] = {"num_classes": (self.spec.logits or (0,))[0], "in_chans": self.input_shape[0]}
        options = {**shape, **self.size_options, **self.options}
        arguments = "".join(f", {name}={value!r}" for name, value in options.items())
        return [
            "import timm",
            *registration,
            f"network = timm.create_model({self.architecture!r}{arguments}, checkpoint_path={path!r})",
        ]

    def declared_layouts(self, layers: Mapping[str, str]) -> Mapping[str, str]:
        """Return timm's `output_fmt` of the model for the layers that it lists as features."""
        model: Any = self.model
        layout = getattr(model, "output_fmt", None)
        listed = {info["module"] for info in getattr(model, "feature_info", None) or [] if "module" in info}
        return {name: str(layout) for name, layer in layers.items() if layout in ("NCHW", "NHWC") and layer in listed}

    def model_for_size(self, size: tuple[int, int]) -> nn.Module | None:
        """Create the timm model for images of another size; `None` if it takes only its own."""
        try:
            return self._make(self.count, size, pretrained=False)
        except Exception:
            return None

    def _make(self, num_classes: int | None, size: tuple[int, int] | None = None, pretrained: bool = True) -> nn.Module:
        import timm

        arguments: dict[str, Any] = {
            "pretrained": self.pretrained and pretrained,
            "num_classes": num_classes,  # `None` is timm's default, the number of the weights
            "in_chans": self.input_shape[0],
        }
        if clash := arguments.keys() & self.options.keys():
            raise UserError(f"options: {min(clash)!r} cannot be given there, {type(self).__name__} sets it itself")
        size_option = {} if size is None else {"img_size": size}
        try:
            model: nn.Module = timm.create_model(self.architecture, **arguments, **{**size_option, **self.options})
        except TypeError as error:
            raise UserError(f"options {self.options} do not fit timm's {self.name!r}: {error}") from None
        except Exception as error:
            if not self.pretrained:
                raise UserError(f"timm cannot create {self.name!r} with options {self.options}: {error}") from error
            raise UserError(
                f"pretrained: timm's weights of {self.name!r} cannot be downloaded ({type(error).__name__}): "
                "give a file of them as weights"
            ) from error
        return model

    def _try(self, model: nn.Module) -> None:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(2, *self.input_shape))

    def default_normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return the mean and standard deviation of the weights' training, from timm's configuration."""
        config: Any = getattr(self.model, "pretrained_cfg", {})
        return config.get("mean", (0.0,)), config.get("std", (1.0,))

    def feature_layers(self, image: Tensor) -> tuple[dict[str, str], dict[str, str]]:
        """Return the classifiers, whose inputs are the embedding; also determine the layout of the tokens."""
        self.cells = find_token_layout(self.model, image)
        model: Any = self.model
        self.has_logits = (self.count if self.count is not None else model.num_classes) > 0
        if not self.has_logits:  # the model then returns the embedding
            return {}, {}
        self.classifier = [_first_after_pooling(name, layer) for name, layer in _classifiers(self.model)]
        self.classifier_inputs = {f"input of {name}": name for name in self.classifier}
        return {}, self.classifier_inputs

    def forward_features(self, image: Tensor) -> Features:
        """Run timm's `forward_features` and `forward_head`, once each."""
        model: Any = self.model
        layout = self.cells
        if layout.separate:
            final, maps = model.forward_intermediates(image, indices=1, norm=layout.norm)
            cells = maps[-1]
        else:
            cells = final = model.forward_features(image)
        logits = model.forward_head(final)
        tokens, grid = layout.tokens(cells)
        if not self.has_logits:
            outputs = logits if isinstance(logits, tuple) else (logits,)
            return Features(None, _join([pool_embedding(output) for output in outputs]), tokens, grid)
        if isinstance(logits, tuple):  # in train mode, one per classifier
            logits = torch.stack(logits).mean(0)
        embedding = _join([pool_embedding(self.taps.tensors[name]) for name in self.classifier_inputs])
        return Features(logits, embedding, tokens, grid)


def _classifiers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return name and layer of each classifier: one, or several whose logits are averaged."""
    model: Any = network
    classifier = model.get_classifier()
    layers = list(classifier) if isinstance(classifier, tuple | list | nn.ModuleList) else [classifier]
    return [(name, layer) for name, layer in network.named_modules() if any(layer is found for found in layers)]


def _first_after_pooling(name: str, classifier: nn.Module) -> str:
    """Return the name of the classifier, or of its linear layer if it pools first."""
    if not hasattr(classifier, "global_pool"):
        return name
    return [f"{name}.{part}" for part, layer in classifier.named_modules() if isinstance(layer, nn.Linear)][-1]


def _has_projection(name: str) -> bool:
    """Return whether timm counts a projection to embeddings of texts as the classes of its weights.

    All its classifiers have 1000 classes or more than 10,000, all its projections 384 to 1280 channels.
    """
    import timm

    config = timm.get_pretrained_cfg(name) if ":" not in name else None
    return config is not None and config.num_classes < 10_000 and config.num_classes not in (0, 1000)


def _join(outputs: list[Tensor]) -> Tensor:
    """Average the inputs of several classifiers, or concatenate them if their widths differ."""
    if len({output.shape[1] for output in outputs}) > 1:  # the batch may be symbolic
        return torch.cat(outputs, 1)
    return torch.stack(outputs).mean(0) if len(outputs) > 1 else outputs[0]


def _check_name(name: str) -> None:
    import timm

    import distill.networks.cifar  # noqa: F401  # registers its networks

    if ":" in name:  # from a hub or a folder
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
    expected = f"{height}" if height == width else f"[{height}, {width}]"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    given = f"{shape[1]} x {shape[2]}"
    return UserError(f"{name!r} does not take images of {given} ({reason}): set image_size, the model's is {expected}")
