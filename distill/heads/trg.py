"""Token-level relationship graphs (Zhang, Liu, He, 2023): tokens of many images as the nodes of one graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.distributed import ALL_ROWS, Rows, rank, rows_of_this_rank, world_size
from distill.errors import UserError, one_of, require_at_least
from distill.features import Features, FeatureSpec
from distill.functional import adjacency_divergence, context_difference, neighbor_divergence, node_contrast
from distill.heads.base import Batch, Head, RunInfo, Scope, require_scope
from distill.heads.parts.grid_tokens import GridTokens, averaged
from distill.heads.parts.projection import NormalizedLinear
from distill.randomness import random_bits
from distill.schedules import Cosine, Number, require_values_above, value_at
from distill.superpixels.association import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DEFAULT_TEMPERATURE = Cosine(0.5, 0.07)


class TRG(Head):
    """Comparison of token graphs: each node's neighbors, its place among all nodes, and the context within its image.

    The nodes are m tokens per image of the batch, at the same random positions in both networks. Each rank computes the
    first two parts for the nodes of its own images, against those of all ranks. The three parts are independent of each
    other; a part of weight 0 costs nothing and has no parameters:

    - local: KL(teacher || student) between a node's distributions over its k nearest neighbors in the teacher, mean
      over the nodes (`neighbor_divergence`);
    - global: InfoNCE of each student node among all teacher nodes, both projected, mean over the nodes;
    - contextual: squared difference between both networks' softmax(F F^T / sqrt(d)) among all tokens of an image, N^2
      times the mean over the B N^2 entries (`context_difference`). That mean falls with 1 / N^2; with the factor N^2,
      one weight serves all grids.

    Tokens are drawn without replacement from (seed, optimizer step, sample index), or without an index in the batch
    from (seed, optimizer step, place in the batch of all ranks), so they depend neither on the number of ranks nor on
    global random state, and are the same after a resume.

    The paper's text was not available: where its summaries are silent, the defaults are this project's. As printed
    there, the local part compares rows of a whole adjacency matrix, which are nearly uniform and carry little signal;
    that is `mode="paper"`.

    Args:
        local_weight: weight of the local part.
        global_weight: weight of the global part.
        contextual_weight: weight of the contextual part; at 0.1 the part begins near a tenth of the cross-entropy of
            1,000 classes for two untrained ViTs.
        tokens_per_image: m; all tokens if `null`.
        neighbors: k.
        mode: `teacher` runs the local part over the teacher's neighbors in both networks; `paper` over each network's
            own, within rows over all nodes, KL(student || teacher), summed over the nodes.
        normalize: whether nodes are normalized to length 1 in the local part.
        sigma: the scale of squared distances in the local part; by default their mean over all nodes and neighbors in
            each network, through which gradient passes.
        temperature: of the global part, a number or a schedule; by default it falls from 0.5 to 0.07 along a cosine
            over the run (0.07 in a run without an end).
        width: d of the projections.
        of: the features that are related: `tokens`, or a tap whose output is a token grid or a map.
        grid: the grid to which both networks' tokens are averaged; by default, in each direction, the coarser one.
        scope: the nodes are tokens of the images of all ranks, `global`, or of this process, `batch`.
        seed: of the draws.
        chunk: nodes compared with all others at a time; by default as many as make 4 million pairs (32 million on a
            GPU).

    Raises:
        UserError: an argument out of its range.
    """

    def __init__(
        self,
        local_weight: float = 1.0,
        global_weight: float = 1.0,
        contextual_weight: float = 0.1,
        tokens_per_image: int | None = 8,
        neighbors: int = 8,
        mode: Literal["teacher", "paper"] = "teacher",
        normalize: bool = True,
        sigma: float | None = None,
        temperature: Number | None = None,
        width: int = 128,
        of: str = "tokens",
        grid: Grid | None = None,
        scope: Scope = "global",
        seed: int = 0,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.scope = require_scope(self, scope, ("batch", "global"))
        self.weights = {"local": local_weight, "global": global_weight, "contextual": contextual_weight}
        if not any(self.weights.values()):
            raise UserError(
                "TRG compares nothing with local_weight 0, global_weight 0 and contextual_weight 0: give at least one"
            )
        require_at_least(1, tokens_per_image=tokens_per_image, neighbors=neighbors, width=width, chunk=chunk)
        require_values_above(0, sigma=sigma, temperature=temperature)
        self.mode = one_of("mode", mode, ("teacher", "paper"))
        if mode == "teacher" and neighbors == 1 and local_weight != 0:
            raise UserError(
                "neighbors must be at least 2 in mode 'teacher', where a distribution over 1 carries no signal, given 1"
            )
        self.sigma, self.temperature = sigma, temperature
        self.needs = frozenset({of})
        self.tokens_per_image, self.neighbors, self.normalize = tokens_per_image, neighbors, normalize
        self.of, self.grid, self.width, self.seed, self.chunk = of, grid, width, seed, chunk
        self._diagnostics: dict[str, Tensor] = {}

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the readers of the tokens, and the projections if the global part has a weight.

        Raises:
            UserError: a network has no token grid, or one with too few tokens.
        """
        self.student_grid = GridTokens(self.of, student, "student", "average", stride=1)
        self.teacher_grid = GridTokens(self.of, teacher, "teacher", "average", stride=1)
        student_size, teacher_size = self.student_grid.grid, self.teacher_grid.grid
        coarser = min(student_size[0], teacher_size[0]), min(student_size[1], teacher_size[1])
        self.common = coarser if self.grid is None else (self.grid[0], self.grid[1])
        if not (1 <= self.common[0] <= coarser[0] and 1 <= self.common[1] <= coarser[1]):
            raise UserError(
                f"grid must be at least 1 x 1 and no finer than {coarser[0]} x {coarser[1]}, the coarser of both "
                f"networks' token grids, given {self.common[0]} x {self.common[1]}"
            )
        tokens = self.common[0] * self.common[1]
        if self._has_graph and self.tokens_per_image is not None and self.tokens_per_image > tokens:
            raise UserError(
                f"tokens_per_image is {self.tokens_per_image}, but the common grid of both networks, {self.common[0]} "
                f"x {self.common[1]}, has {tokens}: give {tokens} or less, or features on a finer grid"
            )
        self.nodes_per_image = tokens if self.tokens_per_image is None else self.tokens_per_image
        if self.weights["global"] != 0:
            self.student_projection = NormalizedLinear(self.student_grid.width, self.width, bias=False)
            self.teacher_projection = NormalizedLinear(self.teacher_grid.width, self.width, bias=False)

    def prepare(self, run: RunInfo) -> None:
        """Check the number of neighbors against the number of nodes.

        Raises:
            UserError: a batch has too few nodes.
        """
        if run.batch_size is not None:
            self._require_nodes(run.batch_size * (run.world_size if self.scope == "global" else 1))

    def _require_nodes(self, images: int) -> None:
        nodes = images * self.nodes_per_image
        if self.weights["local"] != 0 and self.neighbors >= nodes:
            raise UserError(
                f"neighbors is {self.neighbors}, but a batch has {nodes} nodes ({self.nodes_per_image} tokens of "
                f"each image), of which each has {nodes - 1} others: give fewer neighbors or a larger batch"
            )

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        """Return the tokens, averaged over the cells of the common grid."""
        return self._on_common_grid(self.teacher_grid, teacher)

    def summary_key(self) -> Mapping[str, Any]:
        """Return the tokens' layer and grid."""
        return {"of": self.of, "grid": self.common}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Return the weighted sum of the parts.

        Raises:
            UserError: the batch has too few nodes.
        """
        self._diagnostics, losses = {}, []
        student = self._on_common_grid(self.student_grid, student)
        if self._has_graph:
            self._require_nodes(len(student["tokens"]) * (world_size() if self.scope == "global" else 1))
            losses.append(self._compare_nodes(self.drawn(student, batch), self.drawn(teacher, batch)))
        if self.weights["contextual"] != 0:
            entries = student["tokens"].shape[1] ** 2
            contextual = entries * context_difference(student["tokens"], teacher["tokens"])
            self._diagnostics["contextual"] = contextual.detach()
            losses.append(self.weights["contextual"] * contextual)
        return torch.stack(losses).sum()

    @property
    def is_pure(self) -> bool:
        """Never: its nodes are drawn anew at each step."""
        return False

    def on_common_grid(self, student: Features, teacher: Features) -> tuple[Features, Features]:
        """Return the tokens of both networks, `[B, N, d]` each, averaged over the cells of the common grid."""
        return self._on_common_grid(self.student_grid, student), self._on_common_grid(self.teacher_grid, teacher)

    def _on_common_grid(self, grid: GridTokens, features: Features) -> Features:
        return Features(tokens=averaged(grid(features), self.common), grid=self.common)

    def drawn(self, features: Features, batch: Batch) -> Tensor:
        """Return the tokens of one network that become nodes: m of the common grid per image, `[B, m, d]`."""
        tokens = features["tokens"]
        if self.tokens_per_image is not None:
            index = batch["index"] if "index" in batch else _places(tokens)
            positions = self.positions(index).unsqueeze(-1)
            tokens = tokens.gather(1, positions.expand(-1, -1, tokens.shape[-1]))
        return tokens

    def positions(self, index: Tensor) -> Tensor:
        """Draw tokens of the samples `index` `[B]` at this step: positions on the common grid, `[B, m]`."""
        tokens = self.common[0] * self.common[1]
        return random_bits(index, tokens, self.seed, self.progress.step).topk(self.nodes_per_image, dim=1).indices

    def diagnostics(self) -> dict[str, Tensor]:
        """Return the parts of the loss before their weights, and the temperature of the global part."""
        return self._diagnostics

    @torch.no_grad()
    def plot(self, student: Features, teacher: Features, batch: Batch, images: int = 3) -> Figure:
        """Draw the graphs of the first images, each with all of the image's tokens and edges to their k nearest.

        Args:
            student: the student's features.
            teacher: the teacher's features.
            batch: the batch of both.
            images: number of images, one row each.
        """
        from distill.plotting.graphs import draw_graphs

        first = [features.apply(lambda tensor: tensor[:images].float()) for features in (student, teacher)]
        tokens = [features["tokens"] for features in self.on_common_grid(*first)]
        if self.normalize:
            tokens = [F.normalize(nodes, dim=-1) for nodes in tokens]
        return draw_graphs(batch["image"][:images], tokens[0], tokens[1], self.common, self.neighbors, self.sigma)

    @property
    def _has_graph(self) -> bool:
        return self.weights["local"] != 0 or self.weights["global"] != 0

    def _compare_nodes(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the weighted sum of the local and the global part, for tokens `[B, m, d]` of each network."""
        parts, losses = {}, []
        rows = rows_of_this_rank() if self.scope == "global" else ALL_ROWS
        keys = _nodes(rows.gather(teacher))
        if self.weights["local"] != 0:
            parts["local"] = self._local(_nodes(rows.gather(student)), keys, rows)
        if self.weights["global"] != 0:
            parts["global"] = self._global(_nodes(student), keys, rows)
        for name, loss in parts.items():
            self._diagnostics[name] = loss.detach()
            losses.append(self.weights[name] * loss)
        if self.weights["global"] != 0:
            self._diagnostics["temperature"] = losses[0].new_full((), self._temperature())
        return torch.stack(losses).sum()

    def _local(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        if self.normalize:
            student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        if self.mode == "paper":  # a sum over the nodes
            divergence = adjacency_divergence(student, teacher, self.neighbors, self.sigma, self.chunk, rows)
            return rows.ranks * divergence.sum()
        return neighbor_divergence(student, teacher, self.neighbors, self.sigma, self.chunk, rows).mean()

    def _global(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        anchors, keys = self.student_projection(student), self.teacher_projection(teacher)
        return node_contrast(anchors, keys, self._temperature(), self.chunk, rows).mean()

    @property
    def is_scheduled(self) -> bool:
        """Whether the temperature of the global part changes, as it does by default."""
        return (self.temperature is None and self.weights["global"] != 0) or super().is_scheduled

    def _temperature(self) -> float:
        if self.temperature is not None:
            return value_at(self.temperature, self.progress)
        return DEFAULT_TEMPERATURE(self.progress) if self.progress.steps is not None else DEFAULT_TEMPERATURE.end


def _places(tokens: Tensor) -> Tensor:
    """Return each image's place in the batch of all ranks, `[B]`, in the order in which samples are dealt."""
    return torch.arange(len(tokens), device=tokens.device) * world_size() + rank()


def _nodes(tokens: Tensor) -> Tensor:
    """Return tokens `[B, m, d]` as the nodes of a graph, `[m B, d]`, where those of a rank's images are its rows."""
    return tokens.transpose(0, 1).flatten(0, 1)
