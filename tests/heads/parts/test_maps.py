"""The common behavior of heads that compare maps: reading of layers, and any pair of networks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.ab import AB
from distill.heads.at import AT
from distill.heads.fitnet import FitNet
from distill.heads.fsp import FSP
from distill.heads.ft import FT
from distill.heads.nst import NST
from distill.heads.parts.map_reader import MapReader
from distill.heads.parts.maps import MapHead
from distill.heads.review_kd import ReviewKD
from distill.heads.vid import VID
from distill.testing import check_head
from tests.golden import Q
from tests.heads.test_contract import EXPECTED
from tests.two_ranks import RankPool

HEADS: list[Any] = [AT, NST, FitNet, VID, AB, FT, FSP, ReviewKD]
PAIRS = {
    "CNN and ViT": (FeatureSpec(maps={"low": (6, 8, 8), "high": (5, 4, 4)}), (17, 9)),
    "ViT and CNN": (FeatureSpec(grid=(4, 4), maps={"low": (18, 6), "high": (17, 6)}), (9, 6, 3)),
    "a finer and a coarser CNN": (FeatureSpec(maps={"low": (4, 9, 9), "high": (7, 6, 4)}), (9, 4, 5)),
}


def spec(seen: Features) -> FeatureSpec:
    return FeatureSpec.of(seen)


@pytest.mark.parametrize("head", [head for head in HEADS if head is not FSP], ids=lambda head: head.__name__)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        pytest.param(*pair, id=name, marks=pytest.mark.slow if number else ())
        for number, (name, pair) in enumerate(PAIRS.items())
    ],
)
def test_every_head_keeps_the_contract_on_two_layers_of_any_networks(
    head: Any, student: FeatureSpec, teacher: Any, pool: RankPool
) -> None:
    other = FeatureSpec(grid=(4, 4), maps={"low": teacher, "high": teacher})
    check_head(partial(head, of=("low", "high")), student, other, run=pool.run, **EXPECTED.get(head, {}))


@pytest.mark.parametrize("head", [FitNet, VID, AB, ReviewKD], ids=lambda head: head.__name__)
def test_a_vector_is_a_map_of_one_cell(head: Any, pool: RankPool) -> None:
    check_head(partial(head, of="embedding"), run=pool.run)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_a_head_in_half_precision_computes_in_the_type_of_the_features(head: Any) -> None:
    student = Features(tokens=Q([4, 16, 6], 1), embedding=Q([4, 6], 2), grid=(4, 4)).apply(Tensor.float)
    built = head()
    built.build(spec(student), spec(student))
    loss = built.bfloat16()(student, student.apply(torch.square), {})
    assert loss.dtype == torch.float32
    assert bool(loss.isfinite())


@pytest.mark.parametrize("name", ["map", "block", "tokens"])
def test_a_layer_is_read_as_the_map_it_is(name: str) -> None:
    cells = Q([2, 5, 3, 4], 3)
    tokens = cells.flatten(2).mT
    block = torch.cat([100 * Q([2, 2, 5], 9), tokens], dim=1)  # a class and a distillation token before the patches
    seen = Features(tokens=tokens, grid=(3, 4), maps={"map": cells, "block": block})
    reader = MapReader(name, spec(seen), "student")
    assert (reader.width, reader.grid) == (5, (3, 4))
    assert torch.equal(reader(seen), cells)


def test_a_token_grid_of_another_size_than_at_the_build_is_read_by_its_own_grid() -> None:
    reader = MapReader("tokens", FeatureSpec(tokens=(16, 5), grid=(4, 4)), "student")
    cells = Q([2, 5, 6, 3], 3)
    assert torch.equal(reader(Features(tokens=cells.flatten(2).mT, grid=(6, 3))), cells)


def test_layers_are_summed() -> None:
    seen = Features(maps={"low": Q([3, 4, 6, 6], 1), "high": Q([3, 4, 4, 4], 2)})
    other = Features(maps={"low": Q([3, 5, 6, 6], 3), "high": Q([3, 5, 3, 3], 4)})

    def loss(of: Any) -> Tensor:
        head = AT(of)
        head.build(spec(seen), spec(other))
        return head(seen, other, {})

    torch.testing.assert_close(loss(["low", "high"]), loss("low") + loss("high"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((40, 7), r"'layer' of the student has the shape \(40, 7\): name 'tokens', 'embedding', or a layer that gives"),
        ((2, 3, 4, 5), r"'layer' of the student has the shape \(2, 3, 4, 5\)"),
    ],
)
def test_a_layer_that_is_no_map_is_refused(shape: tuple[int, ...], message: str) -> None:
    student = FeatureSpec(grid=(4, 4), maps={"layer": shape})
    with pytest.raises(UserError, match=message):
        AT("layer").build(student, student)


@pytest.mark.parametrize("of", [(), ("low", "low")])
def test_no_layer_or_one_twice_is_refused(of: Any) -> None:
    with pytest.raises(UserError, match="of must name one or more layers, each once, given"):
        AT(of)


@pytest.mark.parametrize("head", [AT, FT, NST])
def test_attention_over_a_single_cell_is_refused(head: type[MapHead]) -> None:
    student = FeatureSpec(maps={"layer": (5, 1, 4)})
    teacher = FeatureSpec(maps={"layer": (5, 4, 1)})
    with pytest.raises(UserError, match="'layer' has 1 x 4 cells in the student and 4 x 1 in the teacher: name layers"):
        head(of="layer").build(student, teacher)  # type: ignore[call-arg]


STAGES = FeatureSpec(maps={"stem": (3, 8, 8), "stage1": (4, 8, 8), "stage2": (5, 4, 4)})


@pytest.mark.parametrize("head", [AT, NST], ids=lambda head: head.__name__)
def test_a_pattern_stands_for_the_taps_of_such_names_in_their_order(head: Any) -> None:
    head_of_pattern = head(of="stage*")
    head_of_pattern.check(STAGES, STAGES)
    assert head_of_pattern.needs == {"stage1", "stage2"}
    seen = Features(maps={name: Q([3, *shape], 1) for name, shape in STAGES.maps.items()})
    other = Features(maps={name: Q([3, *shape], 2) for name, shape in STAGES.maps.items()})
    losses = []
    for of in (["stem", "stage*"], ["stem", "stage1", "stage2"]):
        built = head(of=of)
        built.build(STAGES, STAGES)
        assert built.of == ["stem", "stage1", "stage2"]
        losses.append(built(seen, other, {}))
    assert torch.equal(*losses)
    assert losses[0].item() > 0


@pytest.mark.parametrize(
    ("of", "taps", "message"),
    [
        ("stage*", {"stage1": (4, 8, 8)}, r"'stage\*' fits stage1, stage2 of the student and stage1 of the teacher"),
        ("pre*", STAGES.maps, r"'pre\*' fits no tap of the student and no tap of the teacher: give both the same taps"),
        (["stage1", "stage*"], STAGES.maps, "each once, given"),
    ],
)
def test_a_pattern_that_fits_nothing_or_differently_is_refused(of: Any, taps: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AT(of).check(STAGES, FeatureSpec(maps=taps))
