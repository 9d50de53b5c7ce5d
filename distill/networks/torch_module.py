"""Any module that returns logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from distill.errors import UserError
from distill.features import Features
from distill.networks.base import Network, Size, pooled, rows
from distill.networks.weights import load_weights


class TorchModule(Network):
    """Any module that takes images `[B, C, H, W]` and returns logits `[B, K]`.

    Args:
        module: the network.
        embedding: layer whose output is the embedding, `[B, d]` or maps `[B, d, h, w]` whose mean is taken; `None`
            is what the last linear layer reads, if there is one.
        tokens: layer whose output is a map `[B, d, h, w]` or tokens `[B, N, d]`; `None` gives no tokens.
        prefix_tokens: how many of `[B, N, d]`, from the first on, are no patches (class token, registers).
        weights: file with the weights, see `load_weights`.
        drop_classifier: leave out the classifier of that file, the last linear layer.
        taps: layers to read besides, under their own names or as name -> layer.
        image_size: resize the images to this size; `None` leaves them as they come.
        mean: of each channel; `None` subtracts nothing.
        std: of each channel; `None` divides by nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        embedding: str | None = None,
        tokens: str | None = None,
        prefix_tokens: int = 0,
        weights: str | Path | None = None,
        drop_classifier: bool = False,
        taps: Sequence[str] | Mapping[str, str] | None = None,
        image_size: Size | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(weights, drop_classifier, taps, image_size, mean, std)
        if prefix_tokens < 0:
            raise UserError(f"prefix_tokens must not be below 0, given {prefix_tokens}")
        self.model = module
        self.embedding = embedding
        self.tokens = tokens
        self.prefix_tokens = prefix_tokens

    @property
    def name(self) -> str:
        """The class of the module."""
        return f"TorchModule({type(self.model).__name__})"

    def create(self, num_classes: int) -> nn.Module:
        """The module as given; weights wait for the pass that finds its classifier."""
        self.num_classes = num_classes
        return self.model

    def feature_layers(self, image: Tensor) -> tuple[dict[str, str], dict[str, str]]:
        """Where embedding and tokens are; also holds the logits against the data and loads the weights.

        Raises:
            UserError: the module returns no logits of the data's class count, or a layer or the weights do not fit.
        """
        logits, classifier = self._last_linear(image)
        self.classifier = [classifier] if classifier else []
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            given = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"{self.name} must return logits [B, K], it returns {given}")
        if logits.shape[1] != self.num_classes:
            raise UserError(f"{self.name} gives {logits.shape[1]} logits, but the data have {self.num_classes} classes")
        if self.weights is not None:
            load_weights(self.model, self.weights, self.drop_classifier, self.classifier)
        outputs = {"embedding": self.embedding, "tokens": self.tokens}
        inputs = {"embedding": classifier} if self.embedding is None and classifier else {}
        return {name: layer for name, layer in outputs.items() if layer is not None}, inputs

    def forward_features(self, image: Tensor) -> Features:
        """Run the module; embedding and tokens are read from its layers."""
        logits = self.model(image)
        seen = self.taps.seen
        embedding = pooled(seen["embedding"]) if "embedding" in seen else None
        if embedding is not None and embedding.ndim != 2:
            raise UserError(
                f"embedding of {self.name} must be [B, d] or [B, d, h, w], it is of shape {tuple(embedding.shape)}: "
                "name another layer as embedding"
            )
        tokens, grid = self._tokens(seen["tokens"], image) if "tokens" in seen else (None, None)
        return Features(logits, embedding, tokens, grid)

    def _tokens(self, cells: Tensor, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if cells.ndim == 4:
            return rows(cells), (cells.shape[2], cells.shape[3])
        if cells.ndim != 3:
            raise UserError(f"tokens: layer {self.tokens!r} gives {tuple(cells.shape)}, no [B, d, h, w] or [B, N, d]")
        tokens = cells[:, self.prefix_tokens :]
        height, width = image.shape[-2:]
        grid = _grid(tokens.shape[1], height, width)
        if grid is None:
            raise UserError(
                f"tokens: the {tokens.shape[1]} tokens of {self.tokens!r} are no grid over {height} x {width} pixels: "
                f"is prefix_tokens ({self.prefix_tokens}) right?"
            )
        return tokens, grid

    def _last_linear(self, image: Tensor) -> tuple[object, str | None]:
        """The logits, and the name of the linear layer that runs last."""
        ran: list[nn.Module] = []
        names: dict[nn.Module, str] = {
            layer: name for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear)
        }
        handles = [layer.register_forward_hook(lambda layer, *_: ran.append(layer)) for layer in names]
        logits = self.model(image)
        for handle in handles:
            handle.remove()
        return logits, names[ran[-1]] if ran else None


def _grid(count: int, height: int, width: int) -> tuple[int, int] | None:
    """The grid of `count` cells that some stride gives on `height` x `width` pixels, if any does."""
    for stride in range(1, max(height, width) + 1):
        for rounded in (math.floor, math.ceil):
            grid = rounded(height / stride), rounded(width / stride)
            if grid[0] * grid[1] == count:
                return grid
    return None
