"""Regression of the teacher's embedding and tokens, against literal formulas."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads import EmbeddingRegression, Head, TokenRegression
from distill.testing import check_head
from tests.golden import Q
from tests.two_ranks import RankPool


def literal(distance: str, student: Tensor, teacher: Tensor) -> float:
    """Return the mean over all vectors, computed number by number."""
    losses = []
    for s, t in zip(student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1]), strict=True):
        if distance == "mse":
            losses.append(sum((a - b) ** 2 for a, b in zip(s.tolist(), t.tolist(), strict=True)) / len(s))
        else:
            dot = sum(a * b for a, b in zip(s.tolist(), t.tolist(), strict=True))
            losses.append(1 - dot / (sum(a * a for a in s.tolist()) * sum(b * b for b in t.tolist())) ** 0.5)
    return sum(losses) / len(losses)


def built(head: Head, student: Features, teacher: Features) -> Any:
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    return head.double()


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_the_embedding_is_predicted_by_a_linear_map(distance: Any) -> None:
    student, teacher = Features(embedding=Q([8, 6], 3)), Features(embedding=Q([8, 9], 4))
    head = built(EmbeddingRegression(distance), student, teacher)
    weight, bias = head.regressor.project.weight, head.regressor.project.bias
    predicted = torch.stack([weight @ row + bias for row in student["embedding"]])
    assert head(student, teacher, {}).item() == pytest.approx(literal(distance, predicted, teacher["embedding"]))


@pytest.mark.parametrize("distance", ["mse", "cosine"])
@pytest.mark.parametrize("finer", ["student", "teacher"])
def test_every_token_of_the_teacher_is_predicted_from_the_students_interpolated_ones(distance: Any, finer: str) -> None:
    grids = {"student": (6, 4), "teacher": (3, 2)} if finer == "student" else {"student": (2, 2), "teacher": (5, 3)}
    (h, w), (height, width) = grids["student"], grids["teacher"]
    student = Features(tokens=Q([2, h * w, 6], 3), grid=(h, w))
    teacher = Features(tokens=Q([2, height * width, 9], 4), grid=(height, width))
    head = built(TokenRegression(distance=distance), student, teacher)
    weight, bias = head.regressor.project.weight, head.regressor.project.bias
    projected = torch.stack([torch.stack([weight @ token + bias for token in tokens]) for tokens in student["tokens"]])
    maps = interpolate(projected.mT.reshape(2, 9, h, w), (height, width), mode="bilinear", align_corners=False)
    expected = literal(distance, maps.flatten(2).mT, teacher["tokens"])
    assert head(student, teacher, {}).item() == pytest.approx(expected)


def test_a_map_of_a_cnn_is_compared_with_the_tokens_of_a_transformer() -> None:
    student = Features(maps={"late": Q([2, 6, 4, 4], 3)})
    teacher = Features(tokens=Q([2, 4, 9], 5), grid=(2, 2), maps={"late": Q([2, 5, 9], 4)})  # with a class token
    head = built(TokenRegression(of="late", distance="cosine"), student, teacher)
    without = Features(tokens=teacher["late"][:, 1:], grid=(2, 2))
    same = built(TokenRegression(distance="cosine"), Features(tokens=Q([2, 16, 6], 1), grid=(4, 4)), without)
    same.load_state_dict(head.state_dict())
    tokens = Features(tokens=student["late"].flatten(2).mT, grid=(4, 4))
    torch.testing.assert_close(head(student, teacher, {}), same(tokens, without, {}))


@pytest.mark.parametrize("make", [EmbeddingRegression, TokenRegression])
@pytest.mark.parametrize(("distance", "projector"), [("cosine", "linear"), ("mse", "mlp")])
def test_other_distances_and_projectors_keep_the_contract(
    make: Any, distance: Any, projector: Any, pool: RankPool
) -> None:
    check_head(partial(make, distance=distance, projector=projector), run=pool.run)


@pytest.mark.parametrize("make", [EmbeddingRegression, TokenRegression])
def test_a_student_like_its_teacher_has_no_loss_without_a_projector(make: Any) -> None:
    features = Features(embedding=Q([4, 6], 1), tokens=Q([4, 4, 6], 2), grid=(2, 2))
    for distance in ("mse", "cosine"):
        head = built(make(distance=distance, projector="identity"), features, features)
        assert head(features, features, {}).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("make", [EmbeddingRegression, TokenRegression])
def test_mistakes_are_named(make: Any) -> None:
    with pytest.raises(UserError, match="distance cannot be 'cosin': did you mean 'cosine'"):
        make(distance="cosin")
    with pytest.raises(UserError, match="projector cannot be 'linea': did you mean 'linear'"):
        make(projector="linea")
    student, teacher = (FeatureSpec(embedding=(d,), tokens=(4, d), grid=(2, 2)) for d in (6, 9))
    with pytest.raises(
        UserError, match=r"needs equal widths, but '\w+' has 6 in the student and 9 in the teacher: take"
    ):
        make(projector="identity").build(student, teacher)
