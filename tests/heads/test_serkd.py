from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import angle_cosines, angles, huber, normalized_distances
from distill.heads.serkd import SeRKD
from distill.superpixels import segment_tokens
from distill.testing import check_head, evaluate
from distill.testing.case import Case
from tests.golden import GOLDEN, Q
from tests.two_ranks import RankPool

INPUTS = {
    "2*Q([2,36,5],50)": (2 * Q([2, 36, 5], 50), 2 * Q([2, 36, 7], 51)),
    "1*Q([2,24,6],60)": (Q([2, 24, 6], 60), Q([2, 24, 4], 61)),
}
VARIANTS: dict[str, Any] = {
    "segments": partial(SeRKD, superpixels="segments", count=5),
    "features": partial(SeRKD, features=1.0, iterations=2),
    "all neighbors": partial(SeRKD, neighborhood="all", gradient="full"),
    "average": partial(SeRKD, of="last", cell=(1, 1)),
    "max": partial(SeRKD, of="last", cell=(1, 1), tokenizer="max", features=0.5),
    "convolution": partial(SeRKD, of="last", cell=(1, 1), tokenizer="convolution"),
    "segments of a map": partial(SeRKD, superpixels="segments", of="last", stride=1, features=1.0),
}


def built(head: SeRKD, student: Features, teacher: Features) -> SeRKD:
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    return head.double()


def on_grid(tokens: Tensor, grid: tuple[int, int]) -> Features:
    return Features(tokens=tokens, grid=grid)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_keeps_the_contract(variant: Any, pool: RankPool) -> None:
    check_head(variant, run=pool.run, exact_gradient={"gradient": "full"})


@pytest.mark.parametrize("figure", GOLDEN["serkd"], ids=lambda figure: figure["inputs"]["student"])
@pytest.mark.parametrize("gradient", ["values", "full"])
@pytest.mark.parametrize("term", ["distance", "angle"])
def test_value_and_gradient_are_the_golden_ones(figure: dict[str, Any], gradient: Any, term: str) -> None:
    given = figure["inputs"]
    student, teacher = (on_grid(tokens, tuple(given["grid"])) for tokens in INPUTS[given["student"]])
    student = student.apply(lambda tokens: tokens.clone().requires_grad_())
    weights = {"distance": 0.0, "angle": 0.0} | {term: 1.0}
    head = SeRKD(cell=tuple(given["cell"]), iterations=given["iterations"], gradient=gradient, **weights)
    loss = built(head, student, teacher)(student, teacher, {})
    (found,) = torch.autograd.grad(loss, student["tokens"])
    assert loss.item() == pytest.approx(figure[term], rel=1e-12)
    assert found.norm().item() == pytest.approx(figure[f"grad_norm_student_{gradient}"][term], rel=1e-8)


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    student, teacher = on_grid(Q([2, 16, 5], 3), (4, 4)), on_grid(Q([2, 16, 5], 4), (4, 4))
    head = built(SeRKD(distance=2.0, angle=3.0, features=0.5), student, teacher)
    loss = head(student, teacher, {})
    parts = head.diagnostics()
    assert loss.item() == pytest.approx(2 * parts["distance"] + 3 * parts["angle"] + 0.5 * parts["features"])
    difference = head.projection(student["tokens"]) - teacher["tokens"]
    assert parts["features"].item() == pytest.approx(difference.square().mean().item())


def test_a_student_that_is_its_teacher_up_to_scale_and_place_has_no_loss() -> None:
    teacher = on_grid(Q([2, 36, 5], 3), (6, 6))
    student = teacher.apply(lambda tokens: 3 * tokens)
    head = built(SeRKD(superpixels="segments", count=9), student, teacher)
    batch = {"image": torch.zeros(2, 3, 12, 12), "segments": torch.arange(288).view(2, 12, 12) % 7}
    assert head(student, teacher, batch).item() == pytest.approx(0.0, abs=1e-20)


def test_with_segments_it_is_the_literal_mean_over_those_present() -> None:
    student, teacher = on_grid(Q([2, 16, 5], 3), (4, 4)), on_grid(Q([2, 36, 4], 4), (6, 6))
    segments = torch.arange(2 * 12 * 12).view(2, 12, 12) % 5 + torch.tensor([0, 2]).view(2, 1, 1)
    segments[1][segments[1] == 4] = 3  # the images have different numbers of segments
    batch = {"image": torch.zeros(2, 3, 12, 12), "segments": segments}
    expected = []
    for image in range(2):
        labels = segments[image].unique()
        own, other = (
            segment_tokens(side["tokens"][[image]], side.grid or (), segments[[image]], 8)[0][0, labels]
            for side in (student, teacher)
        )
        expected.append(
            huber(normalized_distances(own), normalized_distances(other))
            + 2 * huber(angle_cosines(own), angle_cosines(other))
        )
    loss = built(SeRKD(superpixels="segments", count=8), student, teacher)(student, teacher, batch)
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-10, atol=0)


def test_room_for_more_segments_changes_nothing() -> None:
    sample = Case(partial(SeRKD, superpixels="segments")).sample()
    losses = [evaluate(Case(partial(SeRKD, superpixels="segments", count=n)).head(), sample).loss for n in (4, 9, 49)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_relations_stay_within_their_image() -> None:
    student, teacher = on_grid(Q([3, 16, 5], 3), (4, 4)), on_grid(Q([3, 16, 7], 4), (4, 4))
    head = built(SeRKD(), student, teacher)
    each = [head(*(side.apply(lambda t, i=i: t[[i]]) for side in (student, teacher)), {}) for i in range(3)]
    torch.testing.assert_close(head(student, teacher, {}), torch.stack(each).mean())


@pytest.mark.parametrize(("student", "teacher", "target"), [((4, 4), (6, 6), (2, 2)), ((14, 14), (7, 9), (4, 5))])
def test_the_coarser_grid_decides_where_the_superpixels_lie(student: Any, teacher: Any, target: Any) -> None:
    seen = [on_grid(Q([2, grid[0] * grid[1], 5], 3), grid) for grid in (student, teacher)]
    head = built(SeRKD(features=1.0), seen[0], seen[1])
    assert head.target == target
    assert bool(head(seen[0], seen[1], {}).isfinite())


def test_class_and_register_tokens_of_a_tapped_block_are_dropped() -> None:
    patches = Q([2, 16, 5], 3)
    block = torch.cat([100 * Q([2, 5, 5], 9), patches], dim=1)
    seen = Features(tokens=patches, grid=(4, 4), maps={"block": block})
    teacher = Features(tokens=Q([2, 16, 7], 4), grid=(4, 4), maps={"block": Q([2, 17, 7], 4)})
    head = built(SeRKD(of="block"), seen, teacher)
    assert torch.equal(head.student_grid(seen)["tokens"], patches)
    assert head.teacher_grid(teacher)["tokens"].shape == (2, 16, 7)


@pytest.mark.parametrize(("tokenizer", "size"), [*itertools.product(["average", "max", "convolution"], [6, 7])])
def test_a_map_becomes_tokens_row_by_row(tokenizer: Any, size: int) -> None:
    seen = Features(maps={"last": Q([2, 5, size, 8], 3)})
    head = built(SeRKD(of="last", cell=(1, 1), tokenizer=tokenizer), seen, seen)
    tokens = head.student_grid(seen)
    assert tokens.grid == head.student_grid.grid
    assert tokens.grid == (3 if size == 6 or tokenizer == "convolution" else 4, 4)
    corner = seen["last"][0, :, 0:2, 2:4].flatten(1)
    if tokenizer != "convolution":
        expected = corner.mean(1) if tokenizer == "average" else corner.amax(1)
        torch.testing.assert_close(tokens["tokens"][0, 1], expected)


def test_a_convolution_is_trained_on_the_students_side_only() -> None:
    seen = Features(maps={"last": Q([2, 5, 6, 6], 3)})
    head = built(SeRKD(of="last", tokenizer="convolution", cell=(1, 1)), seen, seen)
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {"student_grid"}


def test_no_tensor_grows_with_the_triples_of_superpixels() -> None:
    grids = (14, 14), (14, 14)
    student, teacher = (on_grid(Q([2, 196, width], 3), grid) for width, grid in zip((40, 80), grids, strict=True))
    student = student.apply(lambda tokens: tokens.requires_grad_())
    head = built(SeRKD(cell=(1, 1)), student, teacher)
    with profile(profile_memory=True) as memory:
        torch.autograd.grad(head(student, teacher, {}), student["tokens"])
    largest = max(event.self_cpu_memory_usage for event in memory.events())
    assert 0 < largest <= 3 * 8 * max(2 * 196**2, angles.COSINES_PER_CHUNK["cpu"])


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_teachers_summary_gives_the_same_loss_as_its_features(variant: Any) -> None:
    case = Case(variant)
    head, sample = case.head(), case.sample()
    assert sample.teacher is not None
    summary = head.summary(sample.teacher, sample.batch)
    assert "gram" in summary.maps
    live = head(sample.student, sample.teacher, sample.batch)
    assert torch.equal(live, head(sample.student, summary, sample.batch))


def test_only_segments_are_asked_for_by_a_head_that_reads_them() -> None:
    assert SeRKD(superpixels="segments").batch_needs == {"segments"}
    assert not SeRKD().batch_needs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distance": 0, "angle": 0, "features": 1}, "distance 0 and angle 0"),
        ({"superpixels": "segment"}, "did you mean 'segments'"),
        ({"neighborhood": "cell"}, "did you mean 'cells'"),
        ({"gradient": "value"}, "did you mean 'values'"),
        ({"tokenizer": "mean"}, "known are 'average', 'convolution' and 'max'"),
        ({"iterations": -1}, "iterations must be at least 0, given -1"),
        ({"count": 0}, "count must be at least 1, given 0"),
        ({"stride": 0}, "stride must be at least 1, given 0"),
    ],
)
def test_an_argument_out_of_its_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SeRKD(**arguments)


@pytest.mark.parametrize(
    ("arguments", "spec", "message"),
    [
        (
            {"of": "x"},
            FeatureSpec(maps={"x": (6,)}),
            r"'x' of the student has the shape \(6,\): name 'tokens' or",
        ),
        ({"of": "x"}, FeatureSpec(grid=(4, 4), maps={"x": (15, 6)}), r"has the shape \(15, 6\): name"),
        ({"of": "x"}, FeatureSpec(maps={"x": (16, 6)}), r"has the shape \(16, 6\): name"),
        ({"of": "x", "stride": 5}, FeatureSpec(maps={"x": (6, 4, 4)}), "stride 5 is larger than the map"),
        ({"of": "x"}, FeatureSpec(maps={"x": (6, 4, 4)}), "make 1 x 1 superpixels of 2 x 2 tokens"),
        ({"cell": (0, 1)}, FeatureSpec(tokens=(16, 6), grid=(4, 4)), "given 0 x 1"),
    ],
)
def test_features_that_do_not_fit_are_refused_before_the_first_step(
    arguments: dict[str, Any], spec: FeatureSpec, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        SeRKD(**arguments).build(spec, spec)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": torch.zeros(2, 3, 8, 8)}, "SeRKD needs 'segments', but a batch has image"),
        (
            {"image": torch.zeros(2, 3, 8, 8), "segments": torch.zeros(2, 4, 4, dtype=torch.long)},
            r"as large as the images, \(8, 8\), given \(2, 4, 4\)",
        ),
    ],
)
def test_segments_that_do_not_fit_are_refused(batch: dict[str, Tensor], message: str) -> None:
    seen = on_grid(Q([2, 16, 5], 3), (4, 4))
    with pytest.raises(UserError, match=message):
        built(SeRKD(superpixels="segments"), seen, seen)(seen, seen, batch)
