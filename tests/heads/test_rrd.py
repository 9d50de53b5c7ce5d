from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.distributed import own_rows
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional.contrast import info_nce
from distill.heads.rrd import RRD
from distill.schedules import Linear, Progress
from distill.testing import Case, two_ranks_equal_one
from tests.golden import GOLDEN, Q
from tests.two_ranks import RankPool


def of(embedding: Tensor) -> Features:
    return Features(embedding=embedding)


def built(student: int = 6, teacher: int = 12, dtype: torch.dtype = torch.float64, **arguments: Any) -> RRD:
    head = RRD(**{"width": 4, "size": 20} | arguments)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head.build(FeatureSpec(embedding=(student,)), FeatureSpec(embedding=(teacher,)))
    return head.to(dtype)


def set_linear(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    layer.load_state_dict({"weight": weight, "bias": bias})


def call(head: RRD, number: int, batch: int = 6, student: int = 6, teacher: int = 12) -> Tensor:
    return head(of(Q([batch, student], 2 * number + 1)), of(Q([batch, teacher], 2 * number + 2)), {})


@pytest.mark.parametrize(("figure", "seed"), list(zip(GOLDEN["rrd"], (80, 90), strict=True)), ids=["whole", "wrapping"])
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("distance", ["cross_entropy", "kl"])
def test_values_gradient_and_queue_are_the_golden_ones(
    figure: dict[str, Any], seed: int, chunk: int | None, distance: str
) -> None:
    batch, d_student, d_teacher, size = (8, 6, 12, 32) if seed == 80 else (6, 5, 9, 20)
    head = built(d_student, d_teacher, size=size, chunk=chunk, distance=distance)
    set_linear(head.student_projection, Q([4, d_student], seed), 0.1 * Q([4], seed + 1))
    set_linear(head.teacher_projection, Q([4, d_teacher], seed + 2), 0.1 * Q([4], seed + 3))
    head.queue.rows.copy_(F.normalize(Q([size, 4], seed + 4), dim=1))
    head.queue.count.fill_(size + figure["first_pointer"])
    for step, (expected, pointer) in enumerate(zip(figure["losses"], figure["pointers_after"], strict=True)):
        student = Q([batch, d_student], seed + 5 + 2 * step).requires_grad_()
        loss = head(of(student), of(Q([batch, d_teacher], seed + 6 + 2 * step)), {})
        (gradient,) = torch.autograd.grad(loss, student)
        entropy = head.diagnostics()["teacher_entropy"] if distance == "kl" else 0.0
        assert (loss + entropy).item() == pytest.approx(expected, rel=1e-9)
        assert int(head.queue.count) % size == pointer
        if step == 0:
            assert gradient.norm().item() == pytest.approx(figure["grad_norm_student_step0"], rel=1e-9)
    assert head.queue.rows[0].tolist() == pytest.approx(figure["queue_row0_after"], rel=1e-9)


def test_as_in_the_public_code_a_start_from_noise_scores_every_row_from_step_0() -> None:
    """Against a slow loop over a queue that begins as noise and has a whole number of batches."""
    size, batch = 24, 6
    noise, filled = built(size=size, start="noise", seed=3), built(size=size)
    queue = [row.clone() for row in noise.queue.rows.double()]
    lengths = torch.stack(queue).norm(dim=1)
    torch.testing.assert_close(torch.stack(queue).norm(dim=0), torch.ones(4).double())  # over the rows, not per row
    assert 0 < lengths.min() < lengths.mean() < 0.6, "sqrt(4 / 24) is 0.41"
    for step in range(6):
        student, teacher = Q([batch, 6], 20 + 2 * step).requires_grad_(), Q([batch, 12], 21 + 2 * step)
        projected = [
            F.normalize(F.linear(embedding, layer.weight, layer.bias), dim=1)
            for embedding, layer in ((student, noise.student_projection), (teacher, noise.teacher_projection))
        ]
        for number, key in enumerate(projected[1].detach()):
            queue[(step * batch + number) % size] = key
        p_student, p_teacher = (
            torch.stack([torch.stack([row @ query / temperature for row in queue]) for query in queries])
            for queries, temperature in zip(projected, (0.1, 0.02), strict=True)
        )
        expected = -(p_teacher.softmax(1) * p_student.log_softmax(1)).sum(1).mean()
        loss = noise(of(student), of(teacher), {})
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(value, student)[0] for value in (loss, expected)]
        torch.testing.assert_close(*gradients)
        same = torch.equal(loss, filled(of(student), of(teacher), {}))
        assert same == (step >= size // batch - 1), "the two starts agree once the queue is full"
        assert noise.diagnostics()["filled"].item() == min((step + 1) * batch, size) / size


def test_noise_depends_on_the_heads_own_seed_alone() -> None:
    rows = []
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        head = RRD(size=20, width=4, start="noise", seed=seed)
        torch.manual_seed(state)
        before = torch.get_rng_state()
        queue = built(size=20, start="noise", seed=seed).queue.rows
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(state)
        head.build(FeatureSpec(embedding=(6,)), FeatureSpec(embedding=(12,)))
        assert torch.equal(head.queue.rows, queue.float())
        rows.append(head.queue.rows)
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    student, teacher = built(start="noise").similarities(of(Q([3, 6], 1)), of(Q([3, 12], 2)))
    assert bool((student > 0).all()), "every row is scored before the first batch"
    assert bool((teacher > 0).all())
    assert built(start="noise").plot(of(Q([3, 6], 1)), of(Q([3, 12], 2)), {}, images=1) is not None


def test_with_a_teacher_of_temperature_zero_it_is_info_nce_against_the_queue() -> None:
    head = built(teacher_temperature=1e-4, student_temperature=0.1)
    for number in range(4):
        call(head, number)
    student, teacher = Q([6, 6], 11), Q([6, 12], 12)
    loss = head(of(student), of(teacher), {})
    logits = head.student_projection(student) @ head.queue.rows.T / 0.1
    places = (head.queue.count - 6 + torch.arange(6)) % 20  # where the batch has just been put
    torch.testing.assert_close(loss, info_nce(logits, places).mean())


def test_after_scoring_the_queue_is_one_batch_behind() -> None:
    before, after = built(enqueue="before"), built(enqueue="after")
    assert call(after, 0).item() == 0.0  # there is nothing to compare with
    call(before, 0)
    assert torch.equal(before.queue.rows, after.queue.rows)
    rows = after.queue.latest().clone()
    student = after.student_projection(Q([6, 6], 3)) @ rows.T / 0.1
    teacher = after.teacher_projection(Q([6, 12], 4)) @ rows.T / 0.02
    expected = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(call(after, 1), expected)


def test_backward_is_right_after_the_queue_was_written_over() -> None:
    head = built(enqueue="after", size=6)
    call(head, 0)
    copy, student = deepcopy(head).eval(), Q([6, 6], 3).requires_grad_()
    (given,) = torch.autograd.grad(head(of(student), of(Q([6, 12], 4)), {}), student)
    (expected,) = torch.autograd.grad(copy(of(student), of(Q([6, 12], 4)), {}), student)
    assert not torch.equal(head.queue.rows, copy.queue.rows)
    assert torch.equal(given, expected)


@pytest.mark.parametrize("batch", [3, 7, 20, 33])
def test_any_batch_size_goes_into_the_queue(batch: int) -> None:
    head = built()
    for number in range(5):
        assert call(head, number, batch).isfinite()
    teacher = torch.cat([head.teacher_projection(Q([batch, 12], 2 * number + 2)) for number in range(5)])
    torch.testing.assert_close(head.queue.latest(), teacher[-20:])


def test_divergence_of_equal_embeddings_at_equal_temperatures_is_zero() -> None:
    head = built(student=12, distance="kl", student_temperature=0.1, teacher_temperature=0.1)
    head.student_projection.load_state_dict(head.teacher_projection.state_dict())
    for number in range(3):
        embedding = Q([6, 12], number + 1)
        assert head(of(embedding), of(embedding), {}).item() == pytest.approx(0.0, abs=1e-12)
        assert call(head, number, student=12) > 1e-3


def test_presets_give_what_is_not_given() -> None:
    default, old, mixed = RRD(), RRD(preset="2024"), RRD(preset="2024", teacher_temperature=0.5, enqueue="before")
    assert (default.student_temperature, default.teacher_temperature, default.enqueue) == (0.10, 0.02, "before")
    assert (old.student_temperature, old.teacher_temperature, old.enqueue) == (0.04, 0.10, "after")
    assert (mixed.student_temperature, mixed.teacher_temperature, mixed.enqueue) == (0.04, 0.5, "before")


def test_temperatures_can_be_schedules() -> None:
    head = built(student_temperature=Linear(1.0, 0.1), teacher_temperature=Linear(1.0, 0.02))
    head.progress = Progress(step=10, steps=10)
    torch.testing.assert_close(call(head, 0), call(built(), 0), rtol=1e-12, atol=0)


def test_random_teacher_projection_is_frozen_and_in_the_checkpoint() -> None:
    head = built()
    assert not any(parameter.requires_grad for parameter in head.teacher_projection.parameters())
    assert "teacher_projection.weight" in head.state_dict()


def test_orthogonal_teacher_projection_has_orthonormal_rows() -> None:
    projection = built(teacher_projection="orthogonal").teacher_projection
    torch.testing.assert_close(projection.weight @ projection.weight.T, torch.eye(4).double(), rtol=0, atol=1e-6)
    assert not projection.bias.any()


def test_identity_teacher_projection_takes_the_teachers_width() -> None:
    head = built(teacher_projection="identity")
    call(head, 0)
    assert head.queue.rows.shape == (20, 12)
    torch.testing.assert_close(head.queue.latest(), F.normalize(Q([6, 12], 2), dim=1))


def test_in_eval_mode_the_queue_does_not_move() -> None:
    head = built()
    call(head, 0)
    state = deepcopy(head.state_dict())
    call(head.eval(), 1)
    for key, value in head.state_dict().items():
        assert torch.equal(value, state[key])


def test_queue_in_bfloat16_is_half_the_size_and_gives_nearly_the_same() -> None:
    half, whole = RRD(size=64, width=4, dtype="bfloat16"), RRD(size=64, width=4)
    for head in (half, whole):
        head.build(FeatureSpec(embedding=(6,)), FeatureSpec(embedding=(12,)))
    whole.load_state_dict(half.state_dict())
    for number in range(3):
        features = of(Q([6, 6], number + 1).float()), of(Q([6, 12], number + 2).float())
        given, expected = half(*features, {}), whole(*features, {})
        assert given.dtype == torch.float32
        torch.testing.assert_close(given, expected, rtol=0.02, atol=0)
    assert half.queue.rows.element_size() == 2
    assert torch.equal(half.queue.rows, whole.queue.rows.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_value_and_gradients_are_finite(dtype: torch.dtype) -> None:
    head = built(dtype=torch.float32, teacher_temperature=1e-3)
    for number in range(4):
        student = Q([6, 6], number + 1).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype):
            loss = head(of(student), of(Q([6, 12], number + 5).to(dtype)), {})
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in head.student_projection.parameters())


@pytest.mark.parametrize("enqueue", ["before", "after"])
def test_training_resumed_from_the_middle_of_the_ring_goes_on_bit_for_bit(enqueue: str) -> None:
    def train(head: RRD, steps: range) -> list[Tensor]:
        optimizer = torch.optim.SGD(head.student_projection.parameters(), lr=0.1)
        for step in steps:
            optimizer.zero_grad()
            call(head, step).backward()
            optimizer.step()
        return list(head.state_dict().values())

    straight, resumed = built(enqueue=enqueue), built(enqueue=enqueue, size=20)
    train(straight, range(5))
    resumed.load_state_dict(deepcopy(straight.state_dict()))
    for one, other in zip(train(straight, range(5, 9)), train(resumed, range(5, 9)), strict=True):
        assert torch.equal(one, other)


def queue_after(size: int, batches: list[int]) -> tuple[Tensor, Tensor]:
    head = built(size=size, dtype=torch.float32)
    for number, batch in enumerate(batches):
        student, teacher = (own_rows(Q([batch, width], number + width)).float() for width in (6, 12))
        head(of(student), of(teacher), {})
    return head.queue.rows, head.queue.count


@pytest.mark.parametrize("size", [20, 7])
def test_two_ranks_hold_the_queue_of_one_process_bit_for_bit(size: int, pool: RankPool) -> None:
    batches = [8, 6, 10, 2, 16]
    expected = queue_after(size, batches)
    for rows, count in pool.run(queue_after, size, batches):
        assert torch.equal(rows, expected[0])
        assert torch.equal(count, expected[1])


def make_small_and_late() -> RRD:
    return RRD(size=13, width=5, preset="2024", distance="kl", chunk=4)


def test_two_ranks_equal_one_process_when_the_queue_wraps_and_is_scored_first(pool: RankPool) -> None:
    two_ranks_equal_one(Case(make_small_and_late), pool.run)


def test_two_ranks_equal_one_process_with_a_start_from_noise(pool: RankPool) -> None:
    two_ranks_equal_one(Case(partial(RRD, size=30, width=5, start="noise")), pool.run)


def test_diagnostics_are_the_entropies_and_the_filled_share() -> None:
    head = built()
    assert head.diagnostics() == {}
    call(head, 0)
    call(head, 1)
    of_student, of_teacher = head.similarities(of(Q([6, 6], 3)), of(Q([6, 12], 4)))
    seen = head.diagnostics()
    assert seen["filled"].item() == pytest.approx(12 / 20)
    assert seen["student_entropy"].item() == pytest.approx(-torch.xlogy(of_student, of_student).sum(1).mean().item())
    assert seen["teacher_entropy"].item() == pytest.approx(-torch.xlogy(of_teacher, of_teacher).sum(1).mean().item())
    assert not any(value.requires_grad for value in seen.values())


def test_similarities_are_distributions_over_the_filled_rows() -> None:
    head = built()
    assert not any(part.any() for part in head.similarities(of(Q([3, 6], 1)), of(Q([3, 12], 2))))
    call(head, 0)
    for part in head.similarities(of(Q([3, 6], 1)), of(Q([3, 12], 2))):
        assert part.shape == (3, 20)
        torch.testing.assert_close(part.sum(1), torch.ones(3).double())
        assert not part[:, 6:].any()


def test_plot_draws_both_distributions_of_each_image() -> None:
    head = built()
    call(head, 0)
    of_student, of_teacher = head.similarities(of(Q([6, 6], 1)), of(Q([6, 12], 2)))
    figure = head.plot(of(Q([6, 6], 1)), of(Q([6, 12], 2)), {}, images=3, rows=5)
    assert len(figure.axes) == 3
    for axes, p, q in zip(figure.axes, of_teacher, of_student, strict=False):
        teacher, student = (line.get_ydata() for line in axes.lines)
        order = p.argsort(descending=True)[:5]
        assert list(teacher) == pytest.approx(p[order].tolist(), rel=1e-6)
        assert list(student) == pytest.approx(q[order].tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be at least 1, given 0"),
        ({"width": 0}, "width must be at least 1, given 0"),
        ({"chunk": 0}, "chunk must be at least 1, given 0"),
        ({"student_temperature": 0.0}, "student_temperature must be above 0, given 0"),
        ({"teacher_temperature": -1}, "teacher_temperature must be above 0, given -1"),
        ({"enqueue": "befor"}, "enqueue cannot be 'befor': did you mean 'before'"),
        ({"preset": "2023"}, "preset cannot be '2023'"),
        ({"distance": "mse"}, "distance cannot be 'mse'"),
        ({"teacher_projection": "orthogonl"}, "teacher_projection cannot be 'orthogonl': did you mean 'orthogonal'"),
        ({"dtype": "int8"}, "dtype cannot be 'int8'"),
        ({"start": "noisy"}, "start cannot be 'noisy': did you mean 'noise'"),
    ],
)
def test_an_argument_out_of_its_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RRD(**arguments)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"size": 21}, r"RRD: the queue \(size x width\) is 20 x 4 in the checkpoint and 21 x 4 in the configuration"),
        ({"width": 5}, r"RRD: the queue \(size x width\) is 20 x 4 in the checkpoint and 20 x 5 in"),
        ({"teacher": 13}, r"RRD: the teacher's projection .* is 4 x 12 in the checkpoint and 4 x 13 in"),
        ({"student": 7}, r"RRD: the student's projection .* is 4 x 6 in the checkpoint and 4 x 7 in"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused_and_nothing_is_loaded(other: dict[str, int], message: str) -> None:
    stored = built()
    call(stored, 0)
    head = nn.ModuleDict({"rrd": built(**other)})
    before = deepcopy(head.state_dict())
    with pytest.raises(UserError, match=message):
        head.load_state_dict({f"rrd.{key}": value for key, value in stored.state_dict().items()})
    for key, value in head.state_dict().items():
        assert torch.equal(value, before[key])
