"""The base of relations among the images of a batch or the tokens of an image."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from distill.distributed import ALL_ROWS, Rows
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch, RelationHead, RunInfo, Scope, require_several_images


class FeatureRelation(RelationHead):
    """A relation among images, each as one vector, or among the tokens of each image.

    A subclass defines how they are related, row by row (`relate_rows`), and how two relations are compared: at scope
    `global` each rank computes the rows of its own images, against the images of all ranks.

    Args:
        of: the features that are related: `embedding`, `logits`, `tokens` or the name of a tap.
        scope: `global` and `batch` relate images, each as one vector, so that both networks may have any widths and
            grids; `image` relates the tokens of each image.

    Raises:
        UserError: an unsupported scope.
    """

    def __init__(self, of: str = "embedding", scope: Scope = "global") -> None:
        super().__init__(scope)
        self.of = of
        self.needs = frozenset({of})

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Check the shapes against the scope.

        Raises:
            UserError: scope `image` without tokens, or with different numbers of tokens.
        """
        shapes = student[self.of], teacher[self.of]
        if self.scope == "image" and (len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][0] != shapes[1][0]):
            raise UserError(
                f"{type(self).__name__} at scope 'image' needs equally many tokens of both networks, but {self.of!r} "
                f"has the shape {shapes[0]} in the student and {shapes[1]} in the teacher"
            )

    def prepare(self, run: RunInfo) -> None:
        """Check that there are images to relate.

        Raises:
            UserError: a batch may have only one image.
        """
        super().prepare(run)
        if self.scope != "image":
            require_several_images(self, run)

    def tokens(self, features: Features, batch: Batch) -> Tensor:
        """Return one vector per image, `[B, d]`, or at scope `image` its tokens, `[B, N, d]`."""
        tensor = features[self.of]
        return tensor if self.scope == "image" else tensor.flatten(1)

    def relate(self, tokens: Tensor) -> Any:
        """Return the whole relation, whose last two dimensions are those of the tokens."""
        return self.relate_rows(tokens, ALL_ROWS)

    @abstractmethod
    def relate_rows(self, tokens: Tensor, rows: Rows) -> Any:
        """Return the own rows of the relation among tokens `[..., L, d]`, each against all L columns."""
