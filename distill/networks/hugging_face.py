"""Image models of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.features import Features
from distill.networks.base import NamedTaps, Network, Size, map_to_tokens, pool_embedding
from distill.networks.hugging_face_config import (
    HUB_OPTIONS,
    PROCESSOR_FILES,
    check_size,
    classifiers_of,
    count_prefix_tokens,
    find_grid,
    first_line,
    import_transformers,
    processor_settings,
    processor_size,
    require_folder,
    saved_class,
    size_arguments,
)
from distill.networks.layouts import Layout
from distill.networks.weights import WeightsFile, load_weights

AutoClass = Literal["AutoModel", "AutoModelForImageClassification", "AutoBackbone"]


class HuggingFace(Network):
    """An image model of Hugging Face's transformers, by folder or by name on the hub.

    The tokens are the patch tokens without class, distillation and register tokens, or the cells of the last map. The
    embedding is the input of the classifier; without one, what the model pools: its `pooler_output` if the pooling has
    trained weights, else the class token, or the mean of the tokens. A backbone's embedding is the mean of its last
    map. Needs the extra `transformers`.

    Args:
        name: a folder written by `save_pretrained`, or a model's name on the hub.
        auto_class: the class that loads it: `AutoModel` and `AutoBackbone` give no logits; `None` takes
            `AutoModelForImageClassification` if the model was saved as one, else `AutoModel`.
        pretrained: load its weights; otherwise they are random.
        num_classes: number of logits of a classification model; 0 leaves its classifier out. `None` requires the
            model's own to be those of the data, or in a teacher, keeps them, whichever they are. Another number than
            the model's own gives a student a new classifier.
        weights: file with further weights, see `load_weights`; a `WeightsFile` where several networks in it fit.
        drop_classifier: do not load the classifier from that file.
        taps: additional layers to read, as a list of layers or as name -> layer.
        image_size: resize the images to this size; `None` takes the one of the model's image processor, or keeps
            theirs if it has none.
        mean: of each channel; `None` takes the image processor's.
        std: of each channel; `None` takes the image processor's.
        options: further arguments of `from_pretrained`, such as `revision` or `attn_implementation`; those of the hub
            hold for configuration and image processor, too.
        layout: axes of the tapped outputs, see `Network`.

    Raises:
        UserError: transformers is not installed, or the options would run code from the hub.
    """

    def __init__(
        self,
        name: str,
        auto_class: AutoClass | None = None,
        pretrained: bool = True,
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
        if "trust_remote_code" in (options or {}):
            raise UserError("options: trust_remote_code would run code from the hub; wrap such a model in TorchModule")
        self.source = name
        self.auto_class: AutoClass | None = auto_class
        self.pretrained = pretrained
        self.num_classes = num_classes
        self.options = options or {}

    @property
    def name(self) -> str:
        """The name of the model or of its folder."""
        return Path(self.source).name if Path(self.source).is_dir() else self.source

    def create(self, num_classes: int) -> nn.Module:
        """Load the model and the settings of its image processor.

        Raises:
            UserError: the model cannot be loaded, its weights are incomplete, or its classes or image size do not fit.
        """
        transformers = import_transformers()
        require_folder(self.source)
        self.processor = self._load_processor()
        if self.image_size is None:
            self.image_size = processor_size(self.processor)
        config = self._load("model", transformers.AutoConfig.from_pretrained, **self._hub_options)
        self.config = config
        check_size(self.name, config, self.input_shape)
        kind = self.auto_class or saved_class(config)
        pretrained_classes = config.num_labels
        classifies = kind == "AutoModelForImageClassification"
        count = self._classes(pretrained_classes, num_classes) if classifies else 0
        if count:
            config.num_labels = count
        model = self._make(transformers, kind, config, count)
        self.kind = kind
        self.pooled = classifiers_of(model, config.num_labels) if classifies else []
        if self.weights is not None:
            load_weights(model, self.weights, self.drop_classifier or not count, self.pooled)
        self.has_logits = count > 0 and (self.learns or not self.drop_classifier)
        for name in () if self.has_logits else self.pooled:
            model.set_submodule(name, nn.Identity())
        return model.eval()

    @property
    def channels(self) -> int | None:
        """The number of channels of the model's images."""
        channels: int | None = getattr(self.config, "num_channels", None)
        return channels

    def default_normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return the mean and standard deviation of the image processor; without one, images stay as they are."""
        if not self.processor.get("do_normalize", True):
            return (0.0,), (1.0,)
        return self.processor.get("image_mean", (0.0,)), self.processor.get("image_std", (1.0,))

    def feature_layers(self, image: Tensor) -> tuple[dict[str, str], dict[str, str]]:
        """Return the classifier, whose input is the embedding; also determine the layout of the tokens."""
        self.classifier = self.pooled if self.has_logits else []
        self.recorder = _Recorder()
        if self.pooled:
            base: Any = self.model.get_submodule(self.model.base_model_prefix)  # type: ignore[arg-type]  # a string
            base.register_forward_hook(self.recorder)
        self.prefix_tokens, self.grid = 0, None
        if self.kind != "AutoBackbone":
            output = self._output(image, output_hidden_states=True)
            hidden = self._hidden(output)
            if hidden.ndim == 3:
                self.grid = find_grid(self.config, output, hidden, self.input_shape)
                self.prefix_tokens = count_prefix_tokens(self.config, hidden.shape[1], self.grid)
        return {}, {f"input of {name}": name for name in self.pooled}

    def run(self, image: Tensor) -> object:
        """Run the model."""
        return self._output(image)

    def facts(self) -> dict[str, Any]:
        """Return whether the pooling has trained weights."""
        return {"has_pooler": self.has_pooler}

    def restore_facts(self, facts: Mapping[str, Any]) -> None:
        """Take over whether the pooling has trained weights."""
        self.has_pooler = bool(facts.get("has_pooler", True))

    def _output(self, image: Tensor, **arguments: Any) -> Any:
        if self.processor.get("do_flip_channel_order"):  # the model wants blue first
            image = image.flip(1)
        arguments |= size_arguments(self.model, self.config, (image.shape[1], image.shape[2], image.shape[3]))
        return self.model(pixel_values=image, **arguments)

    def forward_features(self, image: Tensor) -> Features:
        """Run the model once."""
        output = self._output(image)
        if self.kind == "AutoBackbone":
            cells = output.feature_maps[-1]
            return Features(None, pool_embedding(cells), map_to_tokens(cells), tuple(cells.shape[2:]))
        hidden = self._hidden(output)
        grid: tuple[int, int] | None
        if hidden.ndim == 4:
            tokens, grid = map_to_tokens(hidden), (hidden.shape[2], hidden.shape[3])
        else:
            tokens, grid = hidden[:, self.prefix_tokens :], self.grid
        if self.pooled:
            inputs = [self.taps.tensors[f"input of {name}"].flatten(1) for name in self.pooled]
            embedding = torch.stack(inputs).mean(0) if len(inputs) > 1 else inputs[0]
            logits = output.logits if self.has_logits else None
            return Features(logits, embedding, *((tokens, grid) if grid else (None, None)))
        pooled = getattr(output, "pooler_output", None) if self.has_pooler else None
        if pooled is None:
            pooled = hidden[:, 0] if self.prefix_tokens else tokens.mean(dim=1)
        return Features(None, pooled.flatten(1), *((tokens, grid) if grid else (None, None)))

    def _hidden(self, output: Any) -> Tensor:
        """Return the last hidden state, `[B, N, d]` or `[B, d, h, w]`, of an output or of the recorded base model."""
        found = self.recorder.pop() if self.pooled else output
        hidden: Tensor = found.last_hidden_state
        return hidden

    def _make(self, transformers: Any, kind: str, config: Any, count: int) -> nn.Module:
        self.has_pooler = True
        auto = getattr(transformers, kind)
        if not self.pretrained:
            try:
                options = {name: value for name, value in self.options.items() if name not in HUB_OPTIONS}
                model: nn.Module = auto.from_config(config, **options)
            except (TypeError, ValueError) as error:
                key, problem = ("options", "does not fit") if options else ("auto_class", f"has no {kind}")
                raise UserError(f"{key}: {self.name!r} {problem} ({first_line(error)})") from None
            return model
        if kind == "AutoBackbone":  # whose own from_pretrained looks on the hub, even for a folder
            mapping = transformers.models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING
            if type(config) not in mapping:
                raise UserError(f"auto_class: {self.name!r} has no AutoBackbone ({type(config).__name__})")
            auto = mapping[type(config)]
        model, info = self._load(
            kind,
            auto.from_pretrained,
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            **self.options,
        )
        new = {name for name, *_ in info["mismatched_keys"]}
        names = classifiers_of(model, config.num_labels) if kind == "AutoModelForImageClassification" else []
        classifier = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
        missing = sorted((set(info["missing_keys"]) | new) - classifier)
        if random := sorted((set(info["missing_keys"]) | new) & classifier) if count and not self.learns else []:
            raise UserError(
                f"num_classes: a teacher's classifier of {count} classes would be random, as {self.name!r} has no such "
                f"{random[0]!r}: leave num_classes out, or give 0 for none"
            )
        self.has_pooler = not any(name.split(".")[0] == "pooler" for name in missing)
        missing = [name for name in missing if name.split(".")[0] != "pooler"]
        if missing:
            raise UserError(
                f"name: {self.source!r} lacks {len(missing)} of the weights of {type(model).__name__} "
                f"({', '.join(missing[:3])}): give the auto_class that it was saved as"
            )
        return model

    @property
    def _hub_options(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name in HUB_OPTIONS}

    def _load_processor(self) -> dict[str, Any]:
        """Return the settings of the image processor; none where the model has none."""
        folder = Path(self.source)
        if folder.is_dir() and not any((folder / name).exists() for name in PROCESSOR_FILES):
            return {}
        try:
            return dict(self._load("image processor", processor_settings, **self._hub_options))
        except UserError:
            if folder.is_dir():
                raise
            return {}  # the hub does not tell one that is missing from one that it cannot give

    def _load(self, what: str, load: Any, **arguments: Any) -> Any:
        local = Path(self.source).is_dir()
        try:
            return load(self.source, **({"local_files_only": True} if local else {}) | arguments)
        except Exception as error:  # transformers, safetensors and the hub raise many types
            where = "in that folder" if local else "on the hub or in its cache"
            raise UserError(
                f"name: the {what} of {self.source!r} cannot be loaded {where} ({first_line(error)})"
            ) from error

    def _classes(self, pretrained_classes: int, wanted: int) -> int:
        if self.num_classes is not None:
            return self.num_classes
        if self.pretrained and not self.learns:
            return pretrained_classes
        if self.pretrained and pretrained_classes != wanted != 0:
            raise UserError(
                f"num_classes: {self.name!r} has {pretrained_classes} classes and the data {wanted}: give num_classes "
                f"{wanted} for a new classifier, {pretrained_classes} to keep the model's, or auto_class AutoModel for "
                "none"
            )
        return wanted


@dataclass(eq=False)
class _Recorder:
    """Forward hook that keeps the output of a layer until it is read."""

    output: Any = None

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        self.output = output

    def pop(self) -> Any:
        output, self.output = self.output, None
        return output
