from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads import RunInfo
from distill.heads.crd import CRD
from distill.testing import Case, two_ranks_equal_one
from tests.golden import Q, assert_relative
from tests.two_ranks import RankPool

INDEX = (7 * torch.arange(8) + 3) % 20
UNKNOWN = torch.full((8,), -1)


def built(make: type[CRD] = CRD, **arguments: Any) -> CRD:
    head = make(**{"samples": 20, "negatives": 5, "width": 4} | arguments)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head.build(FeatureSpec(embedding=(6,)), FeatureSpec(embedding=(12,)))
    return head.double()


def call(head: CRD, student: Tensor | None = None, index: Tensor = INDEX, label: Tensor = UNKNOWN) -> Tensor:
    student = Q([8, 6], 3) if student is None else student
    features = Features(embedding=student[: len(index)]), Features(embedding=Q([8, 12], 4)[: len(index)])
    return head(*features, {"index": index, "label": label})


class Fixed(CRD):
    """CRD with given negatives."""

    def draw(self, index: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        drawn = (index.unsqueeze(1) + 3 * torch.arange(1, 6) + torch.arange(len(index)).unsqueeze(1)) % 20
        return torch.cat([index.unsqueeze(1), drawn], dim=1), torch.ones(len(index), 5)


def golden_head() -> CRD:
    head = built(Fixed)
    state = {"weight": Q([4, 6], 15), "bias": 0.1 * Q([4], 16)}
    head.student_projection.load_state_dict(state)
    head.teacher_projection.load_state_dict({"weight": Q([4, 12], 17), "bias": 0.1 * Q([4], 18)})
    head.bank.student.copy_(0.75**0.5 * Q([20, 4], 19))
    head.bank.teacher.copy_(0.75**0.5 * Q([20, 4], 20))
    return head


def test_value_and_gradient_of_the_first_call_are_the_golden_ones() -> None:
    student = Q([8, 6], 3).requires_grad_()
    assert_relative("crd", call(golden_head(), student), student)


def test_later_calls_keep_the_first_normalizer() -> None:
    head = golden_head()
    call(head)
    first = head.normalizer.clone()
    call(head, 2 * Q([8, 6], 9))
    assert first.all()
    assert torch.equal(head.normalizer, first)


def test_bank_holds_what_both_networks_saw() -> None:
    head = golden_head()
    before = deepcopy(head.bank)
    call(head, label=torch.arange(8))
    for side, seen in (("student", Q([8, 6], 3)), ("teacher", Q([8, 12], 4))):
        embedding = getattr(head, f"{side}_projection")(seen)
        expected = F.normalize(0.5 * getattr(before, side)[INDEX] + 0.5 * embedding, dim=1)
        torch.testing.assert_close(getattr(head.bank, side)[INDEX], expected)
    assert torch.equal(head.bank.label[INDEX], torch.arange(8))


def test_in_eval_mode_nothing_moves() -> None:
    head = built().eval()
    state = deepcopy(head.state_dict())
    call(head)
    for key, value in head.state_dict().items():
        assert torch.equal(value, state[key])


def test_negatives_are_all_samples_but_the_own_one_equally_often() -> None:
    head = built(negatives=20_000)
    places, weight = head.draw(INDEX, UNKNOWN)
    assert torch.equal(places[:, 0], INDEX)
    counts = torch.stack([row.bincount(minlength=20) for row in places[:, 1:]])
    assert not counts.gather(1, INDEX.unsqueeze(1)).any()
    expected = 20_000 / 19
    assert ((counts.sort(1).values[:, 1:] - expected).abs() < 5 * expected**0.5).all()
    assert torch.equal(weight, torch.ones(8, 20_000))


def test_draws_depend_on_seed_call_and_sample_alone() -> None:
    head = built(negatives=50)
    places, _ = head.draw(INDEX, UNKNOWN)
    torch.rand(3)
    assert torch.equal(head.draw(INDEX[[5, 2]], UNKNOWN[:2])[0], places[[5, 2]])
    assert not torch.equal(built(negatives=50, seed=1).draw(INDEX, UNKNOWN)[0], places)
    call(head)
    assert not torch.equal(head.draw(INDEX, UNKNOWN)[0], places)


def test_negatives_of_the_own_class_do_not_count_and_the_others_make_up_for_them() -> None:
    head = built(negatives=200)
    head.bank.label.copy_(torch.arange(20) % 3)
    places, weight = head.draw(INDEX, INDEX % 3)
    alike = head.bank.label[places[:, 1:]] == (INDEX % 3).unsqueeze(1)
    assert alike.any(1).all()
    assert torch.equal(weight == 0, alike)
    torch.testing.assert_close(weight.sum(1), torch.full((8,), 200.0))


def test_class_positives_are_drawn_from_the_own_class() -> None:
    head = built(negatives=200, positives="class")
    head.bank.label.copy_(torch.arange(20) % 3)
    chosen = []
    for number in range(50):
        head.calls.fill_(number)
        chosen.append(head.draw(INDEX, INDEX % 3)[0][:, 0])
    for place, found in zip(INDEX.tolist(), torch.stack(chosen).T, strict=True):
        others = {other for other in range(20) if other % 3 == place % 3 and other != place}
        assert set(found.tolist()) == others


def test_without_another_of_its_class_an_image_is_its_own_positive() -> None:
    head = built(positives="class")
    assert torch.equal(head.draw(INDEX, UNKNOWN)[0][:, 0], INDEX)
    assert torch.equal(head.draw(INDEX, torch.arange(8))[0][:, 0], INDEX)


def test_soft_labels_count_as_their_largest_class_and_empty_ones_as_unknown() -> None:
    label = torch.tensor([0, 1, 2, 0, 1, 2, 0, -1])
    soft = 0.8 * torch.eye(3)[label] + 0.1
    soft[-1] = 0
    hard, softened = (built(), built())
    for _ in range(3):
        assert torch.equal(call(hard, label=label), call(softened, label=soft))
    assert torch.equal(hard.bank.label, softened.bank.label)


def make_small(positives: str) -> CRD:
    return CRD(samples=40, negatives=30, width=5, positives=positives)  # type: ignore[arg-type]


@pytest.mark.parametrize("positives", ["exact", "class"])
def test_two_ranks_equal_one_process_where_samples_come_again(positives: str, pool: RankPool) -> None:
    two_ranks_equal_one(Case(partial(make_small, positives)), pool.run)


def test_bank_must_have_one_place_for_each_sample() -> None:
    CRD(samples=20).prepare(RunInfo(samples=20))
    with pytest.raises(UserError, match="CRD has samples 20, but the training set has 30: give samples 30"):
        CRD(samples=20).prepare(RunInfo(samples=30))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 1}, "samples must be at least 2, given 1"),
        ({"negatives": 0}, "negatives must be at least 1, given 0"),
        ({"width": 0}, "width must be at least 1, given 0"),
        ({"momentum": -0.1}, "momentum must be between 0 and 1, given -0.1"),
        ({"temperature": 0.0}, "temperature must be above 0, given 0"),
        ({"positives": "clas"}, "positives cannot be 'clas': did you mean 'class'"),
    ],
)
def test_an_argument_out_of_its_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CRD(**arguments)


def test_a_checkpoint_with_another_number_of_samples_is_refused() -> None:
    state = built().state_dict()
    with pytest.raises(UserError, match=r"CRD: the bank .* is 20 x 4 in the checkpoint and 21 x 4 in the"):
        built(samples=21).load_state_dict(state)
