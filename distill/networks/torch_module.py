"""Any module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from distill.errors import UserError, one_of, require_at_least
from distill.features import Features
from distill.networks.base import Network, Size, map_to_tokens, pool_embedding
from distill.networks.classifier import last_linear
from distill.networks.exported import describe, load_program, lookup
from distill.networks.layouts import Layout
from distill.networks.weights import WeightsFile, load_weights

Output = Literal["logits", "embedding", "tokens"]


class TorchModule(Network):
    """Any module that takes images `[B, C, H, W]`, or a program of `torch.export`.

    It returns logits `[B, K]`, an embedding `[B, d]`, tokens, or several of these in a dict, a tuple or an object.

    Args:
        module: the network.
        embedding: layer whose output is the embedding `[B, d]`, or a map `[B, d, h, w]` to be averaged; `None` takes
            that of `output`, else the input of the last linear layer if the module returns logits, else the mean of the
            tokens.
        tokens: layer whose output is a map `[B, d, h, w]` or tokens `[B, N, d]`; `None` takes those of `output`.
        prefix_tokens: number of leading tokens of `[B, N, d]` that are not patches (class token, registers).
        weights: file with the weights, see `load_weights`; a `WeightsFile` where it holds several networks that fit.
        drop_classifier: do not load the classifier, the last linear layer, from that file; a teacher then gives no
            logits.
        taps: additional layers to read, as a list of layers or as name -> layer.
        image_size: resize the images to this size; `None` keeps their size.
        mean: of each channel; `None` subtracts nothing.
        std: of each channel; `None` divides by nothing.
        layout: axes of the outputs of the taps, of `embedding` and of `tokens`, for all or by name, where passes at
            other image sizes do not show them: `NCHW`, `NHWC`, `NLC` or `NCL`.
        output: what the module returns: `logits`, `embedding` or `tokens` (`[B, N, d]` or `[B, d, h, w]`), or which
            parts of it these are, as `{logits: head, tokens: last.states}` or `{embedding: 0}`; `None` requires logits
            for the classes of the data.
        program: instead of `module`, a file that `torch.export.save` has written, for a teacher whose source code is
            not at hand. Layers keep their names; dtype, mode and usually the image size are baked in. Loading such a
            file can run code: use files that you trust.

    Raises:
        UserError: arguments exclude each other.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
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
        output: Output | Mapping[Output, str | int] | None = None,
        program: str | Path | None = None,
    ) -> None:
        super().__init__(weights, drop_classifier, taps, image_size, mean, std, layout)
        require_at_least(0, prefix_tokens=prefix_tokens)
        if (module is None) == (program is None):
            raise UserError("TorchModule needs either module or program, a file of torch.export")
        if program is not None and weights is not None:
            raise UserError("weights: a program holds its own, leave weights out")
        self.output: dict[str, str | int | None] | None = None
        if output is not None:
            self.output = (
                {output: None} if isinstance(output, str) else {str(name): part for name, part in output.items()}
            )
        for name in self.output or {}:
            one_of("output", name, get_args(Output))
        for name, layer in (("embedding", embedding), ("tokens", tokens)):
            if layer is not None and name in (self.output or {}):
                raise UserError(f"{name} is given both as a layer ({layer!r}) and in output: leave one of them out")
        if module is not None:
            self.model = module
        self.program = program
        self.embedding = embedding
        self.tokens = tokens
        self.prefix_tokens = prefix_tokens

    @property
    def name(self) -> str:
        """The class name of the module, or the name of the program's file."""
        return f"TorchModule({Path(self.program).name if self.program is not None else type(self.model).__name__})"

    @property
    def channels(self) -> int | None:
        """The number of channels of a program's images."""
        return self.program_channels if self.program is not None else None

    def create(self, num_classes: int) -> nn.Module:
        """Return the module as given or load the program; `feature_layers` loads the weights.

        Raises:
            UserError: the program cannot be loaded or does not fit, or is to be trained.
        """
        self.num_classes = num_classes
        if self.program is not None:
            if self.learns:
                raise UserError(f"program {str(self.program)!r} cannot learn, as its mode is baked in: give a module")
            shape = (self.image_shape[0], *(self.image_size or self.image_shape[1:]))
            self.model, self.program_channels, self.dtype = load_program(self.program, shape)
        return self.model

    def feature_layers(self, image: Tensor) -> tuple[dict[str, str], dict[str, str]]:
        """Return the layers of embedding and tokens; also check the output against the data and load the weights.

        Raises:
            UserError: the module does not return what it should, or a layer or the weights do not fit.
        """
        output, classifier = last_linear(self.model, image)
        self.has_logits = self.output is None or "logits" in self.output
        if self.has_logits:
            self._check_logits(output)
        self.classifier = [classifier] if self.has_logits and classifier else []
        if self.weights is not None:
            load_weights(self.model, self.weights, self.drop_classifier, self.classifier)
        self.has_logits &= self.learns or not self.drop_classifier
        outputs = {"embedding": self.embedding, "tokens": self.tokens}
        from_classifier = self.classifier and self.embedding is None and "embedding" not in (self.output or {})
        inputs = {"embedding": self.classifier[0]} if from_classifier else {}
        return {name: layer for name, layer in outputs.items() if layer is not None}, inputs

    def _check_logits(self, output: object) -> None:
        logits = output if self.output is None else self._part(output, "logits")
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            remedy = "output: embedding or tokens" if isinstance(output, Tensor) else "output, such as {logits: 0}"
            raise UserError(
                f"{self.name} must return logits [B, K], but returns {describe(logits)}: say what it is with {remedy}"
            )
        if logits.shape[1] != self.num_classes and (self.learns or self.output is None):
            remedy = "" if self.output else ": set output: embedding if that is what they are"
            remedy += ", or output: logits if they are of other classes" if remedy and not self.learns else ""
            raise UserError(
                f"{self.name} returns {logits.shape[1]} logits, but the data have {self.num_classes} classes{remedy}"
            )

    def _part(self, output: object, name: str) -> Any:
        path = (self.output or {})[name]
        return output if path is None else lookup(output, path, self.name)

    def run(self, image: Tensor) -> object:
        """Run the module."""
        return self.model(image)

    def declared_layouts(self, layers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the layouts of `embedding` and `tokens` where they are sequences."""
        return {"embedding": "NLC", "tokens": "NLC"}

    def forward_features(self, image: Tensor) -> Features:
        """Run the module and read embedding and tokens from its output or its layers."""
        output = self.model(image)
        found = {name: self._part(output, name) for name in self.output or {}} or {"logits": output}
        found |= {name: self.tapped(name) for name in ("embedding", "tokens") if name in self.taps.tensors}
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor):
                raise UserError(f"output: {name!r} of {self.name} is no tensor, but {describe(tensor)}")
        tokens, grid = self._tokens(found["tokens"], image) if "tokens" in found else (None, None)
        embedding = pool_embedding(found["embedding"]) if "embedding" in found else None
        if embedding is not None and embedding.ndim != 2:
            raise UserError(
                f"embedding of {self.name} must be [B, d] or [B, d, h, w], given {tuple(embedding.shape)}: "
                "choose another layer as embedding"
            )
        if embedding is None and tokens is not None and not self.has_logits:
            embedding = tokens.mean(dim=1)
        return Features(found.get("logits") if self.has_logits else None, embedding, tokens, grid)

    def _tokens(self, cells: Tensor, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if cells.ndim == 4:
            return map_to_tokens(cells), (cells.shape[2], cells.shape[3])
        if cells.ndim != 3:
            given = f"layer {self.tokens!r}" if self.tokens else self.name
            raise UserError(f"tokens: {given} gives {tuple(cells.shape)}, not [B, d, h, w] or [B, N, d]")
        tokens = cells[:, self.prefix_tokens :]
        height, width = image.shape[-2:]
        grid = _grid(tokens.shape[1], height, width)
        if grid is None:
            layer = self.tokens or self.name
            raise UserError(
                f"tokens: the {tokens.shape[1]} tokens of {layer!r} do not form a grid over {height} x {width} "
                f"pixels: is prefix_tokens ({self.prefix_tokens}) right?"
            )
        return tokens, grid


def _grid(count: int, height: int, width: int) -> tuple[int, int] | None:
    """Return the grid of `count` cells that some stride produces on `height` x `width` pixels, or `None`."""
    for stride in range(1, max(height, width) + 1):
        for rounded in (math.floor, math.ceil):
            grid = rounded(height / stride), rounded(width / stride)
            if grid[0] * grid[1] == count:
                return grid
    return None
