from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import hierarchical_context_loss
from distill.heads.review_kd import Fusion, ReviewKD
from distill.networks import Timm
from distill.testing import check_head
from tests.golden import Q
from tests.two_ranks import RankPool

STUDENT = Features(maps={"low": Q([3, 4, 8, 8], 1), "mid": Q([3, 5, 4, 4], 2), "high": Q([3, 6, 2, 2], 3)})
TEACHER = Features(maps={"low": Q([3, 7, 6, 6], 4), "mid": Q([3, 8, 4, 4], 5), "high": Q([3, 9, 3, 3], 6)})


def built(*of: str, width: int = 512) -> ReviewKD:
    head = ReviewKD(of, width)
    torch.manual_seed(0)
    head.build(FeatureSpec.of(STUDENT), FeatureSpec.of(TEACHER))
    return head.double()


def normalized(x: Tensor) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    return (x - mean) / (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()


def test_three_layers_keep_the_contract(pool: RankPool) -> None:
    check_head(partial(ReviewKD, of=("low", "mid", "embedding"), width=3), run=pool.run)


def fused(head: ReviewKD, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """The loss on given maps, shallow to deep, by literal formulas."""
    expected, deep = torch.zeros(()).double(), None
    for fusion, own, target in reversed(list(zip(head.fusions, student, teacher, strict=True))):
        mixed = normalized(F.conv2d(own, fusion.reduce[0].weight))
        if deep is not None:
            deep = F.interpolate(deep, own.shape[2:])
            share = F.conv2d(torch.cat([mixed, deep], 1), fusion.attention.weight, fusion.attention.bias).sigmoid()
            mixed = mixed * share[:, :1] + deep * share[:, 1:]
        deep = F.interpolate(mixed, target.shape[2:])
        result = normalized(F.conv2d(deep, fusion.expand[0].weight, padding=1))
        expected = expected + hierarchical_context_loss(result, target)
    return expected


def test_it_reviews_from_deep_to_shallow() -> None:
    head = built("low", "mid", "high", width=3)
    expected = fused(head, [*STUDENT.maps.values()], [*TEACHER.maps.values()])
    torch.testing.assert_close(head(STUDENT, TEACHER, {}), expected)


def test_as_in_the_public_code_it_reads_the_student_after_and_the_teacher_before_the_last_relu() -> None:
    torch.manual_seed(0)
    student, teacher = (Timm(name, taps="benchmark") for name in ("resnet8_cifar", "wrn_16_1_cifar"))
    for network in (student, teacher):
        network.build(10, (3, 32, 32))
        network.double()
    head = ReviewKD(["stage*", "embedding"], teacher_of=["pre*", "embedding"])
    head.check(student.spec, teacher.spec)
    assert head.needs_of("student") == {"stage1", "stage2", "stage3", "embedding"}
    assert head.needs_of("teacher") == {"pre1", "pre2", "pre3", "embedding"}
    head.build(student.spec, teacher.spec)
    head.double()
    image = torch.rand(4, 3, 32, 32).double()
    seen = student(image), teacher(image)
    with torch.no_grad():  # the layers, without taps: ResNet's blocks and then a ReLU, WRN's next BatchNorm
        x, student_maps = student.model.stem(student.prepare(image)), []
        for stage in student.model.stages:
            x = stage.blocks(x).relu()
            student_maps.append(x)
        x, teacher_maps, stages = teacher.model.stem(teacher.prepare(image)), [], list(teacher.model.stages)
        for stage, norm in zip(stages, [*(s.blocks[0].bn1 for s in stages[1:]), teacher.model.final[0]], strict=True):
            x = stage.blocks(x)
            teacher_maps.append(norm(x))
    embeddings = [features["embedding"][:, :, None, None] for features in seen]
    expected = fused(head, [*student_maps, embeddings[0]], [*teacher_maps, embeddings[1]])
    torch.testing.assert_close(head(*seen, {}), expected)
    assert min(maps.min().item() for maps in student_maps) == 0 > min(maps.min().item() for maps in teacher_maps)


def test_a_teachers_summary_has_its_own_layers_alone() -> None:
    head = ReviewKD(["low", "mid"], teacher_of=["mid", "high"])
    head.check(FeatureSpec.of(STUDENT), FeatureSpec.of(TEACHER))
    assert set(head.summarize_teacher(TEACHER, {}).maps) == {"mid", "high"}
    student = Features(maps={name: STUDENT[name] for name in ("low", "mid")})
    teacher = Features(maps={name: TEACHER[name] for name in ("mid", "high")})
    head.check(FeatureSpec.of(student), FeatureSpec.of(teacher))  # neither network needs the other's layers
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    losses = head.double()(student, teacher, {}), fused(head, [*student.maps.values()], [*teacher.maps.values()])
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    ("of", "teacher_of", "message"),
    [
        (["low", "mid"], ["high"], r"teacher_of must name as many layers as of, which is \['low', 'mid'\], given"),
        (["low", "mid"], ["high", "high"], "teacher_of must name one or more layers, each once"),
        (
            "m*",
            "x*",
            "of 'm\\*' fits mid of the student and teacher_of 'x\\*' fits no tap of the teacher: give both eq",
        ),
        (
            "l*",
            "[mh]i*",
            "of 'l\\*' fits low of the student and teacher_of .* fits mid, high of the teacher: give both eq",
        ),
        (["low"], ["deep"], "ReviewKD needs 'deep' of the teacher, but the network gives no 'deep'"),
    ],
)
def test_layers_that_cannot_be_paired_are_refused(of: list[str], teacher_of: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReviewKD(of, teacher_of=teacher_of).check(FeatureSpec.of(STUDENT), FeatureSpec.of(TEACHER))


def test_as_in_the_public_code_the_fusions_begin_with_gain_one() -> None:
    torch.manual_seed(0)
    for layer, fan_in in ((Fusion(80, 60, 50, False).reduce[0], 80), (Fusion(80, 60, 50, False).expand[0], 60 * 9)):
        assert layer.weight.abs().max().item() == pytest.approx((3 / fan_in) ** 0.5, rel=0.01)
        assert layer.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)


def test_a_deep_layer_of_the_student_learns_from_all_shallower_layers_of_the_teacher() -> None:
    head = built("low", "mid", "high")
    for name, learns in (("low", ["low", "mid", "high"]), ("mid", ["mid", "high"]), ("high", ["high"])):
        student = STUDENT.apply(lambda tensor: tensor.clone().requires_grad_())
        results, deeper = {}, None
        for layer, fusion in reversed(list(zip(head.of, head.fusions, strict=True))):
            results[layer], deeper = fusion(student[layer], deeper, TEACHER[layer].shape[2:])
        inputs = [student[layer] for layer in head.of]
        found = torch.autograd.grad(results[name].square().sum(), inputs, allow_unused=True)
        assert [layer for layer, gradient in zip(head.of, found, strict=True) if gradient is not None] == learns


def test_fusion_takes_each_cell_from_either_by_its_own_share() -> None:
    fusion = Fusion(4, 3, 5, deepest=False).double()
    with torch.no_grad():
        fusion.attention.weight.zero_()  # type: ignore[union-attr,operator]
        fusion.attention.bias.copy_(torch.tensor([-50.0, 50.0]))  # type: ignore[union-attr,operator]
    deeper = Q([2, 3, 4, 4], 2)
    _, fused = fusion(Q([2, 4, 4, 4], 1), deeper, (4, 4))
    torch.testing.assert_close(fused, deeper)


@pytest.mark.parametrize(("width", "taken"), [(3, 3), (512, 6)])
def test_it_fuses_in_the_width_of_the_deepest_layer_or_less(width: int, taken: int) -> None:
    assert [fusion.reduce[0].out_channels for fusion in built("low", "high", width=width).fusions] == [taken, taken]  # type: ignore[index,union-attr]


def test_a_width_below_1_is_refused() -> None:
    with pytest.raises(UserError, match="width must be at least 1, given 0"):
        ReviewKD(width=0)
