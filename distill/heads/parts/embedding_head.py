"""The base of losses that compare projected embeddings."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from distill.errors import require_at_least
from distill.features import FeatureSpec
from distill.heads.base import Head
from distill.heads.parts.projection import NormalizedLinear
from distill.memory import refuse_other_shapes


class EmbeddingHead(Head, ABC):
    """A loss on both networks' embeddings, projected to one width and normalized to length 1.

    A checkpoint whose tensors have other shapes is refused in one sentence, before anything is loaded.

    Args:
        width: d of the projections.

    Attributes:
        student_projection: `[B, d_s]` to `[B, d]`.
        teacher_projection: `[B, d_t]` to `[B, d]`.
        memory_names: what an error message calls the tensors of the head's memory, by key of the state dict.

    Raises:
        UserError: a width below 1.
    """

    needs = frozenset({"embedding"})
    memory_names: ClassVar[Mapping[str, str]] = {}
    student_projection: nn.Module
    teacher_projection: nn.Module

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        require_at_least(1, width=width)
        self.width = width

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the projections."""
        (student_width,), (teacher_width,) = student["embedding"], teacher["embedding"]
        self.student_projection = NormalizedLinear(student_width, self.width)
        self.teacher_projection = self.make_teacher_projection(teacher_width)

    def make_teacher_projection(self, teacher_width: int) -> nn.Module:
        """Return the teacher's projection, `[B, teacher_width]` to `[B, d]`; by default a trained linear map."""
        return NormalizedLinear(teacher_width, self.width)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = {
            **self.memory_names,
            "teacher_projection.weight": "the teacher's projection (width x teacher's embedding)",
            "student_projection.weight": "the student's projection (width x student's embedding)",
        }
        refuse_other_shapes(self, state_dict, prefix, names)
        super()._load_from_state_dict(state_dict, prefix, *args)
