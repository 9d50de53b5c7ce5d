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
        num_classes: number of logits; `None` takes the number of classes of the data. With 0, the network gives no
            logits: its embedding is the input of the last linear layer if the module ends in one, which is then
            frozen, and else what the module returns.
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
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        layout: Layout | Mapping[str, Layout] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(weights, drop_classifier, taps, image_size, mean, std, layout)
        require_at_least(0, prefix_tokens=prefix_tokens)
        self.model = module
        self.embedding = embedding
        self.tokens = tokens
        self.prefix_tokens = prefix_tokens
        self.num_classes = num_classes

    @property
    def name(self) -> str:
        """The class name of the module."""
        return f"TorchModule({type(self.model).__name__})"

    def create(self, num_classes: int) -> nn.Module:
        """Return the module as given; `feature_layers` loads the weights once it has found the classifier."""
        self.count = num_classes if self.num_classes is None else self.num_classes
        return self.model

    def feature_layers(self, image: Tensor) -> tuple[dict[str, str], dict[str, str]]:
        """Return the layers of embedding and tokens; also check the logits against the data and load the weights.

        Raises:
            UserError: the module returns no logits for the classes of the data, or a layer or the weights do not fit.
        """
        logits, classifier, is_last = self._last_linear(image)
        if self.count == 0 and not is_last:
            classifier = None
        self.classifier = [classifier] if classifier else []
        if self.count == 0:
            self._require_embedding(logits)
        elif not isinstance(logits, Tensor) or logits.ndim != 2:
            given = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"{self.name} must return logits [B, K], but returns {given}")
        elif logits.shape[1] != self.count:
            raise UserError(f"{self.name} returns {logits.shape[1]} logits, but the data have {self.count} classes")
        if self.weights is not None:
            load_weights(self.model, self.weights, self.drop_classifier, self.classifier)
        outputs = {"embedding": self.embedding, "tokens": self.tokens}
        inputs = {"embedding": classifier} if self.embedding is None and classifier else {}
        if self.count == 0 and classifier:  # it gets no gradient, which DDP would wait for
            self.model.get_submodule(classifier).requires_grad_(False)
            self.classifier = []
        return {name: layer for name, layer in outputs.items() if layer is not None}, inputs

    def run(self, image: Tensor) -> object:
        """Run the module."""
        return self.model(image)

    def declared_layouts(self, layers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the layouts of `embedding` and `tokens` where they are sequences."""
        return {"embedding": "NLC", "tokens": "NLC"}

    def forward_features(self, image: Tensor) -> Features:
        """Run the module and read embedding and tokens from its layers."""
        output = self.model(image)
        tensors = self.taps.tensors
        embedding = pool_embedding(self.tapped("embedding")) if "embedding" in tensors else None
        if embedding is None and self.count == 0:
            embedding = pool_embedding(output)
        if embedding is not None and embedding.ndim != 2:
            raise UserError(
                f"embedding of {self.name} must be [B, d] or [B, d, h, w], given {tuple(embedding.shape)}: "
                "choose another layer as embedding"
            )
        tokens, grid = self._tokens(self.tapped("tokens"), image) if "tokens" in tensors else (None, None)
        return Features(output if self.count else None, embedding, tokens, grid)

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

    def _require_embedding(self, output: object) -> None:
        if not isinstance(output, Tensor) or output.ndim not in (2, 4):
            given = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise UserError(f"{self.name} must return an embedding [B, d] or a map [B, d, h, w], but returns {given}")

    def _last_linear(self, image: Tensor) -> tuple[object, str | None, bool]:
        """Return the output, the name of the linear layer that runs last, and whether the output is its own."""
        executed: list[tuple[nn.Module, object]] = []
        names: dict[nn.Module, str] = {
            layer: name for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear)
        }

        def note(layer: nn.Module, _: object, output: object) -> None:
            executed.append((layer, output))

        handles = [layer.register_forward_hook(note) for layer in names]
        logits = self.model(image)
        for handle in handles:
            handle.remove()
        if not executed:
            return logits, None, False
        return logits, names[executed[-1][0]], executed[-1][1] is logits


def _grid(count: int, height: int, width: int) -> tuple[int, int] | None:
    """Return the grid of `count` cells that some stride produces on `height` x `width` pixels, or `None`."""
    for stride in range(1, max(height, width) + 1):
        for rounded in (math.floor, math.ceil):
            grid = rounded(height / stride), rounded(width / stride)
            if grid[0] * grid[1] == count:
                return grid
    return None
