from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.distributed import gather, own_rows
from distill.errors import UserError
from distill.memory import ClassBank, EmbeddingQueue, SampleBank, with_gradient_now
from distill.testing import no_waiting
from tests.golden import Q
from tests.two_ranks import RankPool


def numbered(start: int, count: int) -> Tensor:
    """Rows that tell when they were put in."""
    return torch.arange(start, start + count).float().unsqueeze(1).expand(-1, 2)


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 20), max_size=12))
def test_after_any_batches_the_queue_is_the_list_of_the_last_rows(size: int, batches: list[int]) -> None:
    queue = EmbeddingQueue(size, 2)
    model: list[list[float]] = []
    for count in batches:
        fresh = numbered(int(queue.count) + 1, count)
        queue.enqueue(fresh)
        model = (model + fresh.tolist())[-size:]
        assert queue.latest().tolist() == model
        assert int(queue.filled) == len(model)
        assert sorted(queue.rows[: len(model)].tolist()) == sorted(model)  # what is scored
        assert not queue.rows[len(model) :].any()


def test_rows_are_written_in_a_ring() -> None:
    queue = EmbeddingQueue(4, 2)
    for start, count in ((1, 3), (4, 3), (7, 6)):
        queue.enqueue(numbered(start, count))
    assert queue.rows[:, 0].tolist() == [9, 10, 11, 12]
    queue.enqueue(numbered(13, 1))
    assert queue.rows[:, 0].tolist() == [13, 10, 11, 12]


def test_no_graph_grows_in_the_queue() -> None:
    queue = EmbeddingQueue(4, 2)
    for _ in range(3):
        queue.enqueue((numbered(1, 3) * 2).requires_grad_() * 2)
    assert not queue.rows.requires_grad
    assert queue.rows.grad_fn is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_queue_saved_in_the_middle_of_the_ring_goes_on_bit_for_bit(dtype: str) -> None:
    straight, restored = EmbeddingQueue(7, 3, dtype), EmbeddingQueue(7, 3, dtype)
    batches = [torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    for batch in batches[:2]:
        straight.enqueue(batch)
    restored.load_state_dict(deepcopy(straight.state_dict()))
    for batch in batches[2:]:
        straight.enqueue(batch)
        restored.enqueue(batch)
    assert straight.rows.dtype == getattr(torch, dtype)
    assert torch.equal(straight.rows, restored.rows)
    assert torch.equal(straight.count, restored.count)
    assert int(restored.count) % 7 != 0
    assert torch.equal(straight.latest(), torch.cat(batches)[-7:].to(straight.rows.dtype))


def filled_by_all(batches: list[Tensor]) -> dict[str, Tensor]:
    queue = EmbeddingQueue(7, 3)
    for batch in batches:
        queue.enqueue(gather(own_rows(batch)))
    return queue.state_dict()


def test_two_ranks_hold_the_queue_of_one_process_bit_for_bit(pool: RankPool) -> None:
    batches = [Q([count, 3], count).float() for count in (2, 6, 4, 16, 8)]
    expected = filled_by_all(batches)
    for state in pool.run(filled_by_all, batches):
        assert torch.equal(state["rows"], expected["rows"])
        assert torch.equal(state["count"], expected["count"])


@pytest.mark.parametrize(("size", "width", "message"), [(0, 4, "size .* given 0"), (4, -1, "width .* given -1")])
def test_a_queue_without_rows_or_width_is_refused(size: int, width: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EmbeddingQueue(size, width)


def test_a_place_in_the_bank_moves_towards_what_is_seen() -> None:
    bank = SampleBank(6, 3, momentum=0.25).double()
    before = deepcopy(bank)
    index, student, teacher = torch.tensor([4, 1]), Q([2, 3], 1), Q([2, 3], 2)
    bank.update(index, student, teacher, torch.tensor([8, 9]))
    for side, fresh in (("student", student), ("teacher", teacher)):
        old, new = getattr(before, side), getattr(bank, side)
        torch.testing.assert_close(new[index], F.normalize(0.25 * old[index] + 0.75 * fresh, dim=1))
        untouched = torch.tensor([0, 2, 3, 5])
        assert torch.equal(new[untouched], old[untouched])
    assert bank.label.tolist() == [-2, 9, -2, -2, 8, -2]
    assert int(bank.filled) == 2


def test_of_a_sample_that_occurs_twice_the_last_one_counts() -> None:
    bank = SampleBank(6, 3).double()
    other = deepcopy(bank)
    fresh, label = Q([4, 3], 1), torch.arange(4)
    bank.update(torch.tensor([2, 5, 2, 2]), fresh, fresh, label)
    other.update(torch.tensor([5, 2]), fresh[[1, 3]], fresh[[1, 3]], label[[1, 3]])
    for key, value in bank.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"samples": 1}, "samples .* given 1"), ({"width": 0}, "width .* given 0"), ({"momentum": 1.5}, "given 1.5")],
)
def test_a_bank_of_nothing_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SampleBank(**arguments)


@settings(max_examples=100, deadline=None)
@given(samples=st.integers(1, 4), batches=st.lists(st.lists(st.integers(-1, 2), max_size=9), max_size=5))
def test_after_any_batches_each_class_has_its_first_embeddings(samples: int, batches: list[list[int]]) -> None:
    bank, model, number = ClassBank(3, samples, 2), [[], [], []], 1  # type: ignore[var-annotated]
    for labels in batches:
        bank.enter(numbered(number, len(labels)), torch.tensor(labels, dtype=torch.int64))
        for label in labels:
            if label >= 0:
                model[label].append(number)
            number += 1
    expected = [(came[:samples] + samples * [0])[:samples] for came in model]
    assert bank.rows.tolist() == [[[value, value] for value in row] for row in expected]
    assert bank.present.tolist() == [[value > 0 for value in row] for row in expected]
    assert bank.count.tolist() == [len(came) for came in model]
    assert not bank.flat[-1].any()


def test_a_gradient_taken_at_once_outlives_what_it_was_computed_from() -> None:
    memory, inputs = Q([5, 3], 1), [Q([4, 3], seed).requires_grad_() for seed in (2, 3)]

    def loss(part: slice, one: Tensor, other: Tensor) -> Tensor:
        return ((one @ memory.T).square() * (other @ memory.T)).sum()

    expected = loss(slice(None), *inputs)
    gradients = torch.autograd.grad(3 * expected, inputs)
    given = with_gradient_now(loss, *inputs)
    in_parts = with_gradient_now(loss, *inputs, parts=[slice(0, 3), slice(3, 6)])
    memory.zero_()
    assert torch.equal(given, expected)
    torch.testing.assert_close(in_parts, expected)
    for value in (given, in_parts):
        torch.testing.assert_close(torch.autograd.grad(3 * value, inputs), gradients)


def test_of_repeated_samples_the_last_counts_in_a_bank() -> None:
    bank, index = SampleBank(6, 2, momentum=0.0), torch.tensor([4, 1, 4, 0, 1])
    rows = torch.nn.functional.normalize(Q([5, 2], 1).float(), dim=1)
    bank.update(index, rows, -rows, torch.arange(5))
    assert bank.label.tolist() == [3, 4, -2, -2, 2, -2]
    torch.testing.assert_close(bank.student[[4, 1, 0]], rows[[2, 4, 3]])
    torch.testing.assert_close(bank.teacher[[4, 1, 0]], -rows[[2, 4, 3]])


def test_a_bank_on_the_host_stays_there_and_changes_its_type() -> None:
    moving, staying = SampleBank(6, 2), SampleBank(6, 2, device="cpu")
    names = list(moving.state_dict())
    for bank, kept in ((moving, "meta"), (staying, "cpu")):
        bank.double().to("meta")
        assert list(bank.state_dict()) == names
        assert [tensor.device.type for tensor in (bank.student, bank.teacher, bank.label)] == [kept, kept, "meta"]
        assert bank.student.dtype == bank.teacher.dtype == torch.float64


def test_memories_on_a_device_are_those_of_the_cpu_and_do_not_wait(device: torch.device) -> None:
    def filled(device: torch.device) -> dict[str, Tensor]:
        torch.manual_seed(0)
        queue, bank, classes = (memory.to(device) for memory in (EmbeddingQueue(7, 3), SampleBank(6, 3), ClassBank(3)))
        for count in (2, 9, 4):
            fresh = Q([count, 3], count).float().to(device)
            index = (torch.arange(count) % 6).to(device)
            with no_waiting(device):
                queue.enqueue(fresh)
                bank.update(index, fresh, fresh.flip(0), index % 3)
                classes.enter(F.pad(fresh, (0, 125)), index % 3)
                assert queue.filled.device.type == device.type
        memories = (queue, bank, classes)
        return {f"{type(m).__name__}.{key}": value.cpu() for m in memories for key, value in m.state_dict().items()}

    torch.testing.assert_close(filled(device), filled(torch.device("cpu")))
