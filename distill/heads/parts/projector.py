"""Projectors from the student's width to the teacher's, and the losses that follow them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from distill.errors import UserError, one_of
from distill.functional import cosine_distance, squared_difference
from distill.heads.parts.projection import CastLinear

Projector = Literal["linear", "mlp", "identity"]
Distance = Literal["mse", "cosine"]

PROJECTORS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": CastLinear,
    "mlp": lambda width, target: nn.Sequential(CastLinear(width, target), nn.GELU(), CastLinear(target, target)),
    "identity": lambda width, target: nn.Identity(),
}
"""Factories, by name, of modules `[..., width]` to `[..., target]`."""
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": squared_difference, "cosine": cosine_distance}
"""Losses between projected student features and the teacher's, `[..., d]` both, by name."""


class Regressor(nn.Module):
    """Predicts a teacher's vectors from a student's: `[..., d_s]` and `[..., d_t]` to a scalar loss.

    Args:
        distance: `mse`, the mean squared difference, or `cosine`, the mean of 1 - cos.
        projector: `linear` is a linear map with bias, `mlp` two of them with a GELU between, `identity` none, which
            requires equal widths.
        student: d_s.
        teacher: d_t.
        of: name of the features, for error messages.

    Raises:
        UserError: an unknown distance or projector, or `identity` between different widths.
    """

    def __init__(self, distance: Distance, projector: Projector, student: int, teacher: int, of: str) -> None:
        super().__init__()
        if projector == "identity" and student != teacher:
            raise UserError(
                f"projector 'identity' needs equal widths, but {of!r} has {student} in the student and {teacher} in "
                "the teacher: take 'linear' or 'mlp'"
            )
        self.project = PROJECTORS[projector](student, teacher)
        self.distance = DISTANCES[distance]

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.distance(self.project(student), teacher)


def require_regression(distance: str, projector: str) -> None:
    """Check the names of a regression's distance and projector.

    Raises:
        UserError: one is unknown.
    """
    one_of("distance", distance, DISTANCES)
    one_of("projector", projector, PROJECTORS)
