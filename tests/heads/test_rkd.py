from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import profile

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.rkd import RKD
from tests.golden import Q, assert_relative


def of(embedding: Tensor) -> Features:
    return Features(embedding=embedding)


@pytest.mark.parametrize(
    ("head", "figure"),
    [(RKD(), "rkd"), (RKD(distance=1, angle=0), "rkd_distance"), (RKD(distance=0, angle=1), "rkd_angle")],
)
def test_value_and_gradient_are_the_golden_ones(head: RKD, figure: str) -> None:
    student, teacher = Q([8, 6], 3).requires_grad_(), Q([8, 12], 4)
    assert_relative(figure, head(of(student), of(teacher), {}), student)


@pytest.mark.parametrize("equal", [False, True])
def test_equal_embeddings_alone_count_otherwise_than_in_the_public_code(equal: bool) -> None:
    student, teacher = Q([6, 5], 3), Q([6, 7], 4)
    if equal:
        student, teacher = student[[0, 0, 1, 2, 3, 4]], teacher[[0, 0, 1, 2, 3, 4]]

    def distances(x: Tensor, of_equal: float) -> Tensor:
        rows = [[(a - b).norm() if bool((a != b).any()) else x.new_tensor(of_equal) for b in x] for a in x]
        pairs = torch.stack([torch.stack(row) for row in rows]).fill_diagonal_(0)
        return pairs / pairs[pairs > 0].mean()

    ours, public = (F.smooth_l1_loss(*(distances(x, of_equal) for x in (student, teacher))) for of_equal in (0.0, 1e-6))
    loss = RKD(distance=1, angle=0)(of(student), of(teacher), {})
    torch.testing.assert_close(loss, ours)
    assert torch.equal(ours, public) != equal


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(1, 10_000), scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
def test_rotation_shift_and_scale_of_a_network_change_nothing(seed: int, scale: float, shift: float) -> None:
    student, teacher = Q([6, 5], seed), Q([6, 7], seed + 1)
    moved = scale * (student @ torch.linalg.qr(Q([5, 5], seed + 2)).Q) + shift
    torch.testing.assert_close(
        RKD()(of(moved), of(teacher), {}), RKD()(of(student), of(teacher), {}), rtol=1e-6, atol=1e-8
    )


def test_a_student_like_its_teacher_up_to_scale_has_no_loss_and_no_gradient() -> None:
    student = Q([6, 5], 3).requires_grad_()
    loss = RKD()(of(student), of(3 * student.detach() + 1), {})
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0.0, abs=1e-20)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_at_scope_image_it_is_the_mean_over_the_images_relations_among_their_tokens() -> None:
    student, teacher = Q([3, 6, 5], 3), Q([3, 6, 7], 4)
    head = RKD(of="tokens", scope="image")
    each = [RKD()(of(s), of(t), {}) for s, t in zip(student, teacher, strict=True)]
    loss = head(Features(tokens=student), Features(tokens=teacher), {})
    torch.testing.assert_close(loss, torch.stack(each).mean(), rtol=1e-12, atol=0)


def test_at_scope_batch_a_map_is_one_vector_an_image() -> None:
    student, teacher = Q([4, 3, 2, 2], 3), Q([4, 6], 4)
    loss = RKD(of="last", scope="batch")(Features(maps={"last": student}), Features(maps={"last": teacher}), {})
    assert torch.equal(loss, RKD()(of(student.flatten(1)), of(teacher), {}))


@pytest.mark.parametrize(("student", "teacher"), [((16, 6), (36, 9)), ((6,), (9,)), ((6, 4, 4), (6, 4, 4))])
def test_scope_image_needs_equally_many_tokens(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="equally many tokens"):
        RKD(of="x", scope="image").build(FeatureSpec(maps={"x": student}), FeatureSpec(maps={"x": teacher}))


def test_what_it_relates_is_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"RKD needs 'layr4' of the student, .* 'layer4'"):
        RKD(of="layr4").check(FeatureSpec(maps={"layer4": (3,)}), FeatureSpec(maps={"layer4": (3,)}))


def test_both_weights_zero_are_refused() -> None:
    with pytest.raises(UserError, match="distance 0 and angle 0"):
        RKD(distance=0, angle=0)


def test_memory_does_not_hold_the_differences_of_all_pairs() -> None:
    student, teacher = Q([16, 300], 3).requires_grad_(), Q([16, 400], 4)
    with profile(record_shapes=False, profile_memory=True) as memory:
        torch.autograd.grad(RKD()(of(student), of(teacher), {}), student)
    largest = max(event.self_cpu_memory_usage for event in memory.events())
    assert 0 < largest < 8 * 16 * 16 * 300 / 4  # the angles are 16^3 numbers, the differences 16^2 * 300
