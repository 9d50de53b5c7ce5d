"""Inter-channel correlation for knowledge distillation (Liu, Huang, Lin, Chen, Huang, Wang, 2021)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distill import functional
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch
from distill.heads.parts.adapters import conv_norm
from distill.heads.parts.maps import MapHead, total


class ICKD(MapHead):
    """Squared differences of the correlations among channels, after a projection of the student to as many channels.

    ICC(F)_ij = <f_i, f_j>, with f_i the activations of channel i over the cells of one image; each row is normalized to
    length 1. The loss of a layer is |ICC(F_s) - ICC(F_t)|^2 / d, the mean over the images. The student's map first goes
    through a 1 x 1 convolution with batch normalization, the teacher's is taken as it is. The grids may differ. The
    public code trains a second projection, of the teacher, and uses it nowhere; here there is none.

    The authors' code for CIFAR-100 reads the last map, before it is pooled, with weight 4 beside the task and without
    KD. Where both maps have fewer cells than channels, the matrices of d x d are never built.

    Args:
        of: the layers: `tokens` or names of taps; the loss is the sum over them.
    """

    def __init__(self, of: Sequence[str] | str = ("tokens",)) -> None:
        super().__init__(of)

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the projection for each layer.

        Raises:
            UserError: a layer has a single cell.
        """
        super().build(student, teacher)
        for pair in self.layers:
            for side, layer in zip(("student", "teacher"), pair, strict=True):
                if layer.grid == (1, 1):
                    raise UserError(
                        f"ICKD correlates channels over the cells of a map, but {layer.of!r} has 1 cell in the {side}: "
                        "name 'tokens' or a layer with more"
                    )
        self.projections = nn.ModuleList(conv_norm(layer.width, target.width) for layer, target in self.layers)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the maps `[B, d_s, h, w]` and `[B, d_t, h', w']` of each layer."""
        return total(
            [
                functional.channel_correlation_difference(project(student_map), teacher_map)
                for project, (student_map, teacher_map) in zip(
                    self.projections, self.maps(student, teacher), strict=True
                )
            ]
        )
