"""Any module that returns logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from distill.errors import UserError, require_at_least
from distill.features import Features
from distill.networks.base import Network, Size, map_to_tokens, pool_embedding
from distill.networks.layouts import Layout
from distill.networks.weights import WeightsFile, load_weights


class TorchModule(Network):
    """Any module that takes images `[B, C, H, W]` and returns logits `[B, K]`.

    Args:
        module: the network.
        embedding: layer whose output is the embedding `[B, d]`, or a map `[B, d, h, w]` to be averaged; `None` takes
            the input of the last linear layer, if there is one.
        tokens: layer whose output is a map `[B, d, h, w]` or tokens `[B, N, d]`; `None` gives no tokens.
        prefix_tokens: number of leading tokens of `[B, N, d]` that are not patches (class token, registers).
        weights: file with the weights, see `load_weights`; a `WeightsFile` where it holds several networks that fit.
        drop_classifier: do not load the classifier, the last linear layer, from that file.
        taps: additional layers to read, as a list of layers or as name -> layer.
        image_size: resize the images to this size; `None` keeps their size.
        mean: of each channel; `None` subtracts nothing.
        std: of each channel; `None` divides by nothing.
        layout: axes of the outputs of the taps, of `embedding` and of `tokens`, for all or by name, where passes at
            other image sizes do not show them: `NCHW`, `NHWC`, `NLC` or `NCL`.
    """

    def __init__(
        self,
        module: nn.Module,
        embedding: str | None = None,
        tokens: str | None = None,
        prefix_tokens: int = 0,
        weights: str | Path | WeightsFile | None = None,
        drop_classifier: bool = False,
        taps: Sequence[str] | Mapping[str, str] | None = None,
        image_size: Size | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        layout: Layout | Mapping[str, Layout] | None = None,
    ) -> None:
        super().__init__(weights, drop_classifier, taps, image_size, mean, std, layout)
        require_at_least(0, prefix_tokens=prefix_tokens)
        self.model = module
        self.embedding = embedding
        self.tokens = tokens
        self.prefix_tokens = prefix_tokens

    @property
    def name(self) -> str:
        """The class name of the module."""
        return f"TorchModule({type(self.model).__name__})"

    def create(self, num_classes: int) -> nn.Module:
        """Return the module as given; `feature_layers` loads the weights once it has found the classifier."""
        self.num_classes = num_classes
        return self.model

    def feature_layers(self, image: Tensor) -> tuple[dict[str, str], dict[str, str]]:
        """Return the layers of embedding and tokens; also check the logits against the data and load the weights.

        Raises:
            UserError: the module returns no logits for the classes of the data, or a layer or the weights do not fit.
        """
        logits, classifier = self._last_linear(image)
        self.classifier = [classifier] if classifier else []
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            given = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"{self.name} must return logits [B, K], but returns {given}")
        if logits.shape[1] != self.num_classes:
            raise UserError(
                f"{self.name} returns {logits.shape[1]} logits, but the data have {self.num_classes} classes"
            )
        if self.weights is not None:
            load_weights(self.model, self.weights, self.drop_classifier, self.classifier)
        outputs = {"embedding": self.embedding, "tokens": self.tokens}
        inputs = {"embedding": classifier} if self.embedding is None and classifier else {}
        return {name: layer for name, layer in outputs.items() if layer is not None}, inputs

    def run(self, image: Tensor) -> object:
        """Run the module."""
        return self.model(image)

    def declared_layouts(self, layers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the layouts of `embedding` and `tokens` where they are sequences."""
        return {"embedding": "NLC", "tokens": "NLC"}

    def forward_features(self, image: Tensor) -> Features:
        """Run the module and read embedding and tokens from its layers."""
        logits = self.model(image)
        tensors = self.taps.tensors
        embedding = pool_embedding(self.tapped("embedding")) if "embedding" in tensors else None
        if embedding is not None and embedding.ndim != 2:
            raise UserError(
                f"embedding of {self.name} must be [B, d] or [B, d, h, w], given {tuple(embedding.shape)}: "
                "choose another layer as embedding"
            )
        tokens, grid = self._tokens(self.tapped("tokens"), image) if "tokens" in tensors else (None, None)
        return Features(logits, embedding, tokens, grid)

    def _tokens(self, cells: Tensor, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if cells.ndim == 4:
            return map_to_tokens(cells), (cells.shape[2], cells.shape[3])
        if cells.ndim != 3:
            raise UserError(f"tokens: layer {self.tokens!r} gives {tuple(cells.shape)}, not [B, d, h, w] or [B, N, d]")
        tokens = cells[:, self.prefix_tokens :]
        height, width = image.shape[-2:]
        grid = _grid(tokens.shape[1], height, width)
        if grid is None:
            raise UserError(
                f"tokens: the {tokens.shape[1]} tokens of {self.tokens!r} do not form a grid over {height} x {width} "
                f"pixels: is prefix_tokens ({self.prefix_tokens}) right?"
            )
        return tokens, grid

    def _last_linear(self, image: Tensor) -> tuple[object, str | None]:
        """Return the logits and the name of the linear layer that runs last."""
        executed: list[nn.Module] = []
        names: dict[nn.Module, str] = {
            layer: name for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear)
        }
        handles = [layer.register_forward_hook(lambda layer, *_: executed.append(layer)) for layer in names]
        logits = self.model(image)
        for handle in handles:
            handle.remove()
        return logits, names[executed[-1]] if executed else None


def _grid(count: int, height: int, width: int) -> tuple[int, int] | None:
    """Return the grid of `count` cells that some stride produces on `height` x `width` pixels, or `None`."""
    for stride in range(1, max(height, width) + 1):
        for rounded in (math.floor, math.ceil):
            grid = rounded(height / stride), rounded(width / stride)
            if grid[0] * grid[1] == count:
                return grid
    return None
