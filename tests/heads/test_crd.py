from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import profile

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads import RunInfo, crd
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


LARGE: dict[str, Any] = {"samples": 400, "negatives": 5}
"""A bank with far more rows than are drawn."""


def steps(head: CRD, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Losses and gradients of three steps in which samples come again, and the memory that they leave."""
    head, found = head.to(dtype), []
    for number in range(3):
        student = Q([8, 6], 30 + number).to(dtype).requires_grad_()
        teacher = Features(embedding=Q([8, 12], 40 + number).to(dtype))
        index = (torch.arange(8) * (number + 1)) % 20
        loss = head(Features(embedding=student), teacher, {"index": index, "label": index % 3})
        found += [loss.detach(), *torch.autograd.grad(loss, [student, *head.parameters()])]
    return found + list(head.state_dict().values())


@pytest.mark.parametrize("numbers", [1, 60, 10_000])
def test_scoring_the_drawn_rows_in_any_parts_is_scoring_all(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for dense in (10**6, 0):
        monkeypatch.setattr(crd, "DENSE", dense)
        monkeypatch.setattr(crd, "rows_per_chunk", lambda row, device: max(1, numbers // row))
        found.append(steps(built(**LARGE)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arguments", [{}, LARGE, {**LARGE, "positives": "class"}])
def test_a_bank_on_the_host_gives_the_same_bits(arguments: dict[str, Any]) -> None:
    on_device, on_host = (steps(built(**arguments, bank_device=device), torch.float32) for device in (None, "cpu"))
    for expected, given in zip(on_device, on_host, strict=True):
        assert torch.equal(given, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_bank_on_the_host_gives_the_same_bits_on_a_gpu() -> None:
    found = []
    for bank_device in (None, "cpu"):
        head = built(**LARGE, bank_device=bank_device).float().cuda()
        assert head.bank.student.is_cuda == (bank_device is None)
        index = INDEX.cuda()
        for number in range(3):
            student, teacher = (Q([8, width], number).float().cuda() for width in (6, 12))
            leaf = student.requires_grad_()
            loss = head(Features(embedding=leaf), Features(embedding=teacher), {"index": index, "label": index % 3})
            found.append([loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()])
        found[-1] += [head.bank.student.cpu(), head.bank.teacher.cpu()]
    for expected, given in zip(found[:3], found[3:], strict=True):
        for one, other in zip(expected, given, strict=True):
            assert torch.equal(one, other)


def test_a_checkpoint_moves_between_banks_on_the_host_and_on_the_device() -> None:
    trained = built(**LARGE)
    call(trained)
    for device in (None, "cpu"):
        resumed = built(**LARGE, bank_device=device)
        resumed.load_state_dict(deepcopy(trained.state_dict()))
        assert torch.equal(call(resumed), call(deepcopy(trained)))


def test_a_step_that_was_undone_leaves_the_normalizer_to_the_next() -> None:
    head, expected = built(), call(built())
    before = {name: buffer.clone() for name, buffer in head.named_buffers()}
    call(head, 2 * Q([8, 6], 9))
    for name, buffer in head.named_buffers():  # as after a trial step
        buffer.copy_(before[name])
    assert torch.equal(call(head), expected)


def test_where_few_rows_are_drawn_the_memory_of_a_step_does_not_grow_with_the_bank() -> None:
    peaks = []
    for samples in (1_000, 100_000):
        head = built(samples=samples, negatives=5).float()
        call(head)
        with profile(profile_memory=True) as measured:
            call(head)
        peaks.append(max(event.self_cpu_memory_usage for event in measured.events()))
    assert 0 < peaks[1] == peaks[0]


def test_two_ranks_equal_one_process_with_a_large_bank_on_the_host(pool: RankPool) -> None:
    two_ranks_equal_one(Case(partial(CRD, samples=400, negatives=5, width=5, bank_device="cpu")), pool.run)


def test_the_bank_is_on_the_host_or_where_the_head_is() -> None:
    with pytest.raises(UserError, match="bank_device cannot be 'disk'"):
        CRD(bank_device="disk")  # type: ignore[arg-type]


def test_the_weights_of_the_negatives_are_in_float32_whatever_torchs_default_type_is() -> None:
    head = built(positives="class").float()
    label = INDEX % 3
    _, expected = head.draw(INDEX, label)
    torch.set_default_dtype(torch.bfloat16)
    try:
        _, found = head.draw(INDEX, label)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
