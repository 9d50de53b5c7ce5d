"""The base of losses that call the networks' own classifiers."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Literal

from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import region_means
from distill.heads.base import Head
from distill.heads.parts.map_reader import MapReader


class ClassifierHead(Head):
    """A loss that calls a network's own classifier, `Features.classify`.

    Attributes:
        classifiers: the networks whose classifier it calls, `student` and `teacher`; checked before step 0. An instance
            may set its own.
    """

    classifiers: AbstractSet[Literal["student", "teacher"]] = frozenset({"student", "teacher"})

    def check(self, student: FeatureSpec, teacher: FeatureSpec | None) -> None:
        """Check the features and classifiers of both networks.

        Raises:
            UserError: a network has no features of that name, or no classifier that computes its logits from its
                embedding alone.
        """
        super().check(student, teacher)
        for side, spec in (("student", student), ("teacher", teacher)):
            if side in self.classifiers and spec is not None and not spec.classifies:
                raise UserError(
                    f"{type(self).__name__} calls the {side}'s classifier, but this {side} has none that computes its "
                    "logits from its embedding alone: give a network with a linear classifier, or leave this term out"
                )


class MapClassifierHead(ClassifierHead):
    """A loss on a map whose cells or regions are classified by a network's own classifier.

    Args:
        of: the layer that the classifier's input is pooled from: `tokens`, or a tap of as many channels.

    Attributes:
        student_map: the student's reader.
        teacher_map: the teacher's reader.
    """

    student_map: MapReader
    teacher_map: MapReader

    def __init__(self, of: str = "tokens") -> None:
        super().__init__()
        self.of = of
        self.needs = frozenset({of})

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the readers of the layer.

        Raises:
            UserError: the layer is no map, or has other channels than the classifier takes.
        """
        super().build(student, teacher)
        self.student_map = MapReader(self.of, student, "student")
        self.teacher_map = MapReader(self.of, teacher, "teacher")
        for side, spec, read in (("student", student, self.student_map), ("teacher", teacher, self.teacher_map)):
            if side in self.classifiers and (read.width,) != spec["embedding"]:
                raise UserError(
                    f"{type(self).__name__} classifies parts of {self.of!r}, but it has {read.width} channels in the "
                    f"{side}, whose classifier takes {spec['embedding'][0]}: name the layer that the embedding is the "
                    "mean of"
                )


def region_scores(features: Features, read: MapReader, *scales: int) -> Tensor:
    """Classify the means of a map's regions, `[B, N, K]`, with the regions of `distill.functional.region_means`."""
    return classifier_of(features)(region_means(read(features), scales))


def classifier_of(features: Features) -> Callable[[Tensor], Tensor]:
    """Return a network's classifier; that there is one has been checked before step 0."""
    assert features.classify is not None, "the features come without the network's classifier"
    return features.classify
