"""Reading one layer of a network as a map, whether it is a map, a grid of tokens or a vector."""

from __future__ import annotations

from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec, Shape


class MapReader:
    """Reads one layer of one network as a map `[B, d, h, w]`.

    The layer is a tapped map; `tokens` or a tapped layer of a transformer, which are put back on their grid (leading
    tokens beyond the number of patches are dropped); or a vector such as `embedding`, which is a map of one cell.

    Args:
        of: `tokens`, `embedding`, `logits` or the name of a tap.
        spec: the network's shapes.
        side: `student` or `teacher`, for error messages.
        vectors: whether a vector is accepted.

    Attributes:
        width: d.
        grid: `(h, w)`.

    Raises:
        UserError: the layer is neither a map nor a token grid nor an accepted vector.
    """

    def __init__(self, of: str, spec: FeatureSpec, side: str, vectors: bool = True) -> None:
        shape = spec[of]
        self.of = of
        self.width: int
        self.grid: tuple[int, int]
        if len(shape) == 3:
            self.width, self.grid = shape[0], (shape[1], shape[2])
        elif spec.grid is not None and _is_token_grid(shape, spec.grid):
            self.width, self.grid = shape[1], spec.grid
        elif vectors and len(shape) == 1:
            self.width, self.grid = shape[0], (1, 1)
        else:
            names = "'tokens', 'embedding'," if vectors else "'tokens'"
            raise UserError(
                f"{of!r} of the {side} has the shape {shape}: name {names} or a layer that gives a map [d, h, w] or as "
                "many tokens as there are patches"
            )

    def __call__(self, features: Features) -> Tensor:
        tensor = features[self.of]
        if tensor.ndim == 4:
            return tensor
        if tensor.ndim == 2:
            return tensor[:, :, None, None]
        height, width = features.grid or self.grid
        return tensor[:, -height * width :].mT.reshape(len(tensor), -1, height, width)


def _is_token_grid(shape: Shape, grid: tuple[int, int]) -> bool:
    """Return whether `(N, d)` holds the patches of a grid, preceded by fewer class and distillation tokens."""
    patches = grid[0] * grid[1]
    return len(shape) == 2 and patches <= shape[0] < 2 * patches
