"""Token-level relationship graphs (Zhang, Liu, He, 2023): tokens of many images as the nodes of one graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.distributed import gather, world_size
from distill.errors import UserError, one_of
from distill.features import Features, FeatureSpec
from distill.functional import adjacency_divergence, context_difference, neighbor_divergence, node_contrast
from distill.heads.base import Batch, RelationHead, RunInfo, Scope, positive
from distill.heads.parts.grid_tokens import GridTokens, averaged
from distill.heads.parts.projection import NormalizedLinear
from distill.randomness import random_bits
from distill.schedules import Cosine, Number, value_at
from distill.superpixels.association import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DEFAULT_TEMPERATURE = Cosine(0.5, 0.07)


class TRG(RelationHead):
    """Compares graphs of tokens: each one's neighbors, its place among all others, and the context within its image.

    The nodes are m tokens of each image of the batch, at the same random places in both networks. Three parts, each of
    which does without the others (one of weight 0 computes nothing and makes no parameters):

    - local: KL(teacher || student) between a node's distributions over its k nearest neighbors in the teacher, mean
      over the nodes (`neighbor_divergence`);
    - global: InfoNCE of each student node among all teacher nodes, both projected, mean over the nodes;
    - contextual: squared difference between both networks' softmax(F F^T / sqrt(d)) among all tokens of an image, N^2
      times the mean over the B N^2 entries (`context_difference`). That mean falls with 1 / N^2; times N^2, one weight
      serves all grids.

    Tokens are drawn without replacement from (seed, optimizer step, sample index), so they depend neither on the number
    of ranks nor on global random state, and are the same after a resume.

    The paper's text was not at hand: where the summaries of it are silent, the defaults are this project's. As printed
    there, the local part runs over rows of a whole adjacency matrix, which are nearly uniform and say little; that is
    `mode="paper"`.

    Args:
        local_weight: weight of the local part.
        global_weight: weight of the global part.
        contextual_weight: weight of the contextual part; at 0.1 the part begins near a tenth of the cross-entropy of
            1,000 classes for two untrained ViTs.
        tokens_per_image: m; all tokens if `null`.
        neighbors: k.
        mode: whose neighbors the local part runs over: the `teacher`'s for both; or each network's own, within rows
            over all nodes, KL(student || teacher), summed over the nodes, as in the `paper`.
        normalize: whether nodes have length 1 in the local part.
        sigma: the scale of squared distances there; if not given, their mean over all nodes and neighbors in each
            network, through which gradient passes.
        temperature: of the global part, a number or a schedule; if not given, it falls from 0.5 to 0.07 in a cosine
            over the run (it is 0.07 in a run without an end).
        width: d of the projections.
        of: the features that are related: `tokens`, or a tap whose output is a token grid or a map.
        grid: what both networks' token grids are averaged to; in each direction that of the coarser network, if not
            given.
        scope: the nodes are tokens of the images of all ranks, `global`, or of this process, `batch`.
        seed: of the draws.
        chunk: nodes that are compared with all others at a time, to save memory; all if not given.

    Raises:
        UserError: an argument out of its range.
    """

    scopes = ("batch", "global")

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
        super().__init__(scope)
        self.weights = {"local": local_weight, "global": global_weight, "contextual": contextual_weight}
        if not any(self.weights.values()):
            raise UserError(
                "TRG compares nothing with local_weight 0, global_weight 0 and contextual_weight 0: give at least one"
            )
        counts = {"tokens_per_image": tokens_per_image, "neighbors": neighbors, "width": width, "chunk": chunk}
        for name, given in counts.items():
            if given is not None and given < 1:
                raise UserError(f"{name} must be at least 1, given {given}")
        self.mode = one_of("mode", mode, ("teacher", "paper"))
        if mode == "teacher" and neighbors == 1 and local_weight != 0:
            raise UserError(
                "neighbors must be at least 2 in mode 'teacher', where a distribution over 1 says nothing, given 1"
            )
        self.sigma = None if sigma is None else float(positive("sigma", sigma))  # type: ignore[arg-type]  # no schedule
        self.temperature = None if temperature is None else positive("temperature", temperature)
        self.needs = frozenset({of})
        self.tokens_per_image, self.neighbors, self.normalize = tokens_per_image, neighbors, normalize
        self.of, self.grid, self.width, self.seed, self.chunk = of, grid, width, seed, chunk
        self._seen: dict[str, Tensor] = {}

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Make what reads the tokens, and the projections if the global part has a weight.

        Raises:
            UserError: a network gives no token grid, or one with too few tokens.
        """
        self.student_grid = GridTokens(self.of, student, "student", "average", stride=1)
        self.teacher_grid = GridTokens(self.of, teacher, "teacher", "average", stride=1)
        (rows, columns), (others, other_columns) = self.student_grid.grid, self.teacher_grid.grid
        coarser = min(rows, others), min(columns, other_columns)
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
        """Check the number of neighbors against that of the nodes.

        Raises:
            UserError: a node has fewer others than neighbors.
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

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """The weighted sum of the parts.

        Raises:
            UserError: the batch has too few nodes.
        """
        self._seen, parts = {}, []
        student, teacher = self.on_common_grid(student, teacher)
        if self._has_graph:
            self._require_nodes(len(batch["index"]) * (world_size() if self.scope == "global" else 1))
            nodes = [self.tokens(features, batch) for features in (student, teacher)]
            if self.scope == "global":
                nodes = [gather(part) for part in nodes]
            parts.append(self.compare(self.relate(nodes[0]), self.relate(nodes[1])))
        if self.weights["contextual"] != 0:
            entries = student["tokens"].shape[1] ** 2
            contextual = entries * context_difference(student["tokens"], teacher["tokens"])
            self._seen["contextual"] = contextual.detach()
            parts.append(self.weights["contextual"] * contextual)
        return torch.stack(parts).sum()

    def on_common_grid(self, student: Features, teacher: Features) -> tuple[Features, Features]:
        """The tokens of both networks, `[B, N, d]` each, averaged over the cells of the common grid."""
        student, teacher = (
            Features(tokens=averaged(grid(features), self.common), grid=self.common)
            for grid, features in ((self.student_grid, student), (self.teacher_grid, teacher))
        )
        return student, teacher

    def tokens(self, features: Features, batch: Batch) -> Tensor:
        """What is related: m of the tokens on the common grid, `[B, m, d]`."""
        tokens = features["tokens"]
        if self.tokens_per_image is None:
            return tokens
        places = self.places(batch["index"]).unsqueeze(-1)
        return tokens.gather(1, places.expand(-1, -1, tokens.shape[-1]))

    def places(self, index: Tensor) -> Tensor:
        """Which tokens are drawn from the samples `index` `[B]` at this step: places on the common grid, `[B, m]`."""
        tokens = self.common[0] * self.common[1]
        return random_bits(index, tokens, self.seed, self.progress.step).topk(self.nodes_per_image, dim=1).indices

    def relate(self, tokens: Tensor) -> Tensor:
        """The nodes of one network's graph, `[M, d]`."""
        return tokens.flatten(0, 1)

    def compare(self, student_relation: Tensor, teacher_relation: Tensor) -> Tensor:
        """The weighted sum of the local and the global part, for the same M nodes in both networks."""
        losses: list[Tensor] = []
        for name, part in (("local", self._local), ("global", self._global)):
            if self.weights[name] != 0:
                loss = part(student_relation, teacher_relation)
                self._seen[name] = loss.detach()
                losses.append(self.weights[name] * loss)
        if self.weights["global"] != 0:
            self._seen["temperature"] = losses[0].new_full((), self._temperature())
        return torch.stack(losses).sum()

    def diagnostics(self) -> dict[str, Tensor]:
        """The parts of the loss before their weights, and the temperature of the global one."""
        return self._seen

    @torch.no_grad()
    def plot(self, student: Features, teacher: Features, batch: Batch, images: int = 3) -> Figure:
        """Draw the graphs of the first images, each with all of the image's tokens and edges to their k nearest.

        Args:
            student: what the student saw.
            teacher: what the teacher saw.
            batch: what both looked at.
            images: how many images, one row each.
        """
        from distill.plotting.graphs import draw_graphs

        pair = self.on_common_grid(*(seen.apply(lambda tensor: tensor[:images].float()) for seen in (student, teacher)))
        nodes = [F.normalize(seen["tokens"], dim=-1) if self.normalize else seen["tokens"] for seen in pair]
        return draw_graphs(batch["image"][:images], nodes[0], nodes[1], self.common, self.neighbors, self.sigma)

    @property
    def _has_graph(self) -> bool:
        return self.weights["local"] != 0 or self.weights["global"] != 0

    def _local(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.normalize:
            student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        if self.mode == "paper":
            return adjacency_divergence(student, teacher, self.neighbors, self.sigma, self.chunk).sum()
        return neighbor_divergence(student, teacher, self.neighbors, self.sigma, self.chunk).mean()

    def _global(self, student: Tensor, teacher: Tensor) -> Tensor:
        anchors, keys = self.student_projection(student), self.teacher_projection(teacher)
        return node_contrast(anchors, keys, self._temperature(), self.chunk).mean()

    def _temperature(self) -> float:
        if self.temperature is not None:
            return value_at(self.temperature, self.progress)
        return DEFAULT_TEMPERATURE(self.progress) if self.progress.steps is not None else DEFAULT_TEMPERATURE.end
