from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distill.functional import (
    adjacency_divergence,
    context_difference,
    nearest_neighbors,
    neighbor_distances,
    neighbor_divergence,
    node_contrast,
)
from distill.functional.graphs import edge_similarities
from tests.golden import GOLDEN, Q

FIGURE = GOLDEN["trg"][0]
DIVERGENCES = pytest.mark.parametrize("divergence", [neighbor_divergence, adjacency_divergence])
CHUNKS = pytest.mark.parametrize("chunk", [None, 1, 5, 18, 50])


def inputs() -> tuple[Tensor, Tensor]:
    return Q([3, 6, 5], 70).requires_grad_(), Q([3, 6, 8], 71)


def unit(tokens: Tensor) -> Tensor:
    return F.normalize(tokens.flatten(0, 1), dim=1)


def squared(a: Tensor, b: Tensor) -> float:
    return sum((p - q) ** 2 for p, q in zip(a.tolist(), b.tolist(), strict=True))


def literal_neighbors(nodes: Tensor, k: int) -> list[list[int]]:
    found = []
    for i, node in enumerate(nodes):
        others = sorted((squared(node, other), j) for j, other in enumerate(nodes) if j != i)
        found.append([j for _, j in others[:k]])
    return found


def literal_adjacency(nodes: Tensor, k: int, sigma: float) -> Tensor:
    adjacency = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    for i, row in enumerate(literal_neighbors(nodes, k)):
        for j in row:
            adjacency[i, j] = math.exp(-squared(nodes[i], nodes[j]) / (2 * sigma))
    return adjacency


def rotation(d: int, seed: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(Q([d, d], seed)).Q
    return basis


def assert_golden(loss: Tensor, student: Tensor, name: str) -> None:
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(FIGURE[name], rel=1e-12)
    assert gradient.norm().item() == pytest.approx(FIGURE["grad_norm_student"][name], rel=1e-8)


@CHUNKS
def test_local_value_and_gradient_are_the_golden_ones(chunk: int | None) -> None:
    student, teacher = inputs()
    loss = neighbor_divergence(unit(student), unit(teacher), FIGURE["inputs"]["neighbors"], chunk=chunk)
    assert_golden(loss.mean(), student, "local")


@CHUNKS
def test_local_value_in_the_printed_form_is_the_golden_one(chunk: int | None) -> None:
    student, teacher = (tokens.flatten(0, 1) for tokens in inputs())
    loss = adjacency_divergence(student, teacher, FIGURE["inputs"]["neighbors"], sigma=1.0, chunk=chunk)
    assert loss.sum().item() == pytest.approx(FIGURE["local_paper_sigma1_sum"], rel=1e-12)


@CHUNKS
def test_global_value_and_gradient_are_the_golden_ones(chunk: int | None) -> None:
    student, teacher = inputs()
    anchors, keys = unit(student @ Q([5, 5], 72).T), unit(teacher @ Q([5, 8], 73).T)
    loss = node_contrast(anchors, keys, FIGURE["inputs"]["temperature"], chunk)
    assert_golden(loss.mean(), student, "global")


def test_contextual_value_and_gradient_are_the_golden_ones() -> None:
    student, teacher = inputs()
    assert_golden(context_difference(student, teacher), student, "contextual")


@CHUNKS
@pytest.mark.parametrize(("shape", "k"), [([18, 4], 5), ([30, 1], 29), ([2, 3], 1), ([25, 60], 3)])
def test_neighbors_and_distances_are_those_of_brute_force(shape: list[int], k: int, chunk: int | None) -> None:
    nodes = Q(shape, 3)
    places = nearest_neighbors(nodes, k, chunk)
    assert places.tolist() == literal_neighbors(nodes, k)
    expected = [[squared(nodes[i], nodes[j]) for j in row] for i, row in enumerate(places.tolist())]
    torch.testing.assert_close(neighbor_distances(nodes, places, chunk), torch.tensor(expected).double())


def test_a_far_origin_hides_no_neighbor() -> None:
    nodes = Q([20, 8], 5)
    assert torch.equal(nearest_neighbors(nodes.float() + 1000, 4), nearest_neighbors(nodes, 4))


def test_a_duplicate_is_the_nearest_neighbor_at_distance_zero_and_no_node_is_its_own() -> None:
    nodes = Q([6, 5], 4)[[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]].float()
    places = nearest_neighbors(nodes, 11)
    assert places[:, 0].tolist() == [(i + 6) % 12 for i in range(12)]
    assert [sorted(row) for row in places.tolist()] == [[j for j in range(12) if j != i] for i in range(12)]
    distances = neighbor_distances(nodes, places)
    assert not distances[:, 0].any()
    assert (distances[:, 1:] > 0.1).all()


@pytest.mark.parametrize(("sizes", "k", "sigma"), [((18, 5, 8), 4, 1.0), ((9, 3, 3), 8, 0.2), ((40, 6, 2), 1, 3.0)])
def test_printed_form_is_the_divergence_of_softmaxes_over_the_whole_adjacency(
    sizes: tuple[int, int, int], k: int, sigma: float
) -> None:
    student, teacher = Q([sizes[0], sizes[1]], 8), Q([sizes[0], sizes[2]], 9)
    p, q = (literal_adjacency(nodes, k, sigma).softmax(1) for nodes in (student, teacher))
    expected = (p * (p.log() - q.log())).sum(1)
    torch.testing.assert_close(adjacency_divergence(student, teacher, k, sigma), expected, rtol=1e-9, atol=1e-12)


def test_printed_form_fades_with_the_number_of_nodes_and_keeps_its_digits_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        F.normalize(torch.randn(2048, width, generator=generator, dtype=torch.float64), dim=1) for width in (16, 24)
    )
    few, many = (adjacency_divergence(student[:n], teacher[:n], 8, sigma=1.0).mean().item() for n in (128, 2048))
    assert 1e-3 < many < few / 8  # though the two are unrelated
    found = adjacency_divergence(student.float(), teacher.float(), 8, sigma=1.0).mean().item()
    assert found == pytest.approx(many, rel=1e-4)


def test_sigma_is_the_mean_over_the_edges_and_its_gradient_makes_the_divergence_blind_to_scale() -> None:
    student, teacher = Q([18, 5], 8).requires_grad_(), Q([18, 8], 9)
    loss = neighbor_divergence(student, teacher, 4).mean()
    places = nearest_neighbors(teacher, 4)
    sigmas = [neighbor_distances(nodes.detach(), places).mean().item() for nodes in (student, teacher)]
    scaled = [nodes / sigma**0.5 for nodes, sigma in zip((student, teacher), sigmas, strict=True)]
    torch.testing.assert_close(neighbor_divergence(scaled[0], scaled[1], 4, sigma=1.0).mean(), loss)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.norm() > 1e-3
    along = (gradient * (student - student.mean(0))).sum()  # growing all distances alike changes nothing
    assert abs(along.item()) < 1e-12


@DIVERGENCES
@pytest.mark.parametrize("sigma", [None, 0.5])
def test_gradients_are_the_derivatives(divergence: Any, sigma: float | None) -> None:
    teacher = Q([10, 6], 7)
    for chunk in (None, 4):
        assert torch.autograd.gradcheck(
            lambda student, chunk=chunk: divergence(student, teacher, 3, sigma, chunk),
            (Q([10, 4], 6).requires_grad_(),),
        )


@pytest.mark.parametrize("chunk", [None, 4])
def test_gradients_of_contrast_and_context_are_the_derivatives(chunk: int | None) -> None:
    anchors, keys = Q([10, 4], 6).requires_grad_(), Q([10, 4], 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda *nodes: node_contrast(*nodes, 0.3, chunk), (anchors, keys))
    assert torch.autograd.gradcheck(context_difference, (Q([2, 5, 3], 6).requires_grad_(), Q([2, 5, 4], 7)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(1, 10_000), scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_divergences_are_zero_between_a_network_and_itself_moved(seed: int, scale: float, shift: float) -> None:
    nodes = Q([12, 5], seed)
    moved = scale * (nodes @ rotation(5, seed + 1)) + shift
    for divergence in (neighbor_divergence, adjacency_divergence):
        torch.testing.assert_close(divergence(moved, nodes, 4), torch.zeros(12).double(), rtol=0, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(1, 10_000), order=st.permutations(range(12)))
def test_divergences_are_positive_and_follow_a_permutation_of_the_nodes(seed: int, order: list[int]) -> None:
    student, teacher = Q([12, 5], seed), Q([12, 4], seed + 1)
    for divergence in (neighbor_divergence, adjacency_divergence):
        found = divergence(student, teacher, 4)
        assert found.mean() > 1e-5
        assert (found > -1e-12).all()
        torch.testing.assert_close(divergence(student[order], teacher[order], 4), found[order])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(1, 10_000))
def test_turning_the_student_changes_no_divergence_and_turning_both_no_context(seed: int) -> None:
    student, teacher, turn = Q([12, 5], seed), Q([12, 4], seed + 1), rotation(5, seed + 2)
    for divergence in (neighbor_divergence, adjacency_divergence):
        torch.testing.assert_close(divergence(student @ turn, teacher, 4), divergence(student, teacher, 4))
    student, teacher = student.view(2, 6, 5), teacher.view(2, 6, 4)
    torch.testing.assert_close(context_difference(student @ turn, teacher), context_difference(student, teacher))
    assert context_difference(student @ turn, student).item() == pytest.approx(0.0, abs=1e-25)


def test_contrast_at_an_infinite_temperature_is_the_log_of_the_number_of_nodes() -> None:
    loss = node_contrast(unit(Q([2, 9, 4], 1)), unit(Q([2, 9, 4], 2)), 1e12)
    torch.testing.assert_close(loss, torch.full((18,), math.log(18), dtype=torch.float64))


@DIVERGENCES
@pytest.mark.parametrize("kind", ["all equal", "pairs", "equal in the student"])
def test_duplicate_nodes_give_a_finite_value_and_gradient(divergence: Any, kind: str) -> None:
    student, teacher = Q([12, 5], 1).float(), Q([12, 4], 2).float()
    if kind != "pairs":
        student = student[:1].repeat(12, 1)
    if kind == "all equal":
        teacher = teacher[:1].repeat(12, 1)
    if kind == "pairs":
        student, teacher = student[torch.arange(12) // 2], teacher[torch.arange(12) // 2]
    student.requires_grad_()
    loss = divergence(student, teacher, 4).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())
    if kind == "all equal":
        assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_a_value_that_is_not_a_number_is_not_hidden() -> None:
    student, teacher = Q([12, 5], 1), Q([12, 4], 2)
    student[3, 1] = math.nan
    assert bool(neighbor_divergence(student, teacher, 4).isnan().any())
    assert bool(adjacency_divergence(student, teacher, 4).isnan().any())


def test_edges_weigh_from_zero_to_one() -> None:
    assert edge_similarities(torch.tensor([0.0, 2.0, 4.0]), 1.0).tolist() == pytest.approx(
        [1, math.exp(-1), math.exp(-2)]
    )
    assert edge_similarities(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([math.exp(-0.25), math.exp(-0.75)])
    assert edge_similarities(torch.zeros(2, 3)).eq(1).all()


def peak(nodes: int, width: int, mode: Any, chunk: int | None) -> float:
    """The most bytes that forward and backward pass hold at a time, in `[M, M]` float32 tensors; inputs not counted."""
    student, teacher = torch.randn(nodes, width).requires_grad_(), torch.randn(nodes, width)
    projections = [(torch.randn(width, 128) / width**0.5).requires_grad_() for _ in range(2)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        local = mode(F.normalize(student, dim=1), F.normalize(teacher, dim=1), 8, chunk=chunk)
        anchors, keys = (
            F.normalize(side @ projection, dim=1)
            for side, projection in zip((student, teacher), projections, strict=True)
        )
        (local.mean() + node_contrast(anchors, keys, 0.1, chunk).mean()).backward()
    assert measured.profiler is not None
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    return held.max().item() / (4 * nodes**2)


@DIVERGENCES
@pytest.mark.parametrize(("chunk", "most"), [(None, 6.0), (512, 1.0)])
def test_memory_of_forward_and_backward_is_a_few_pairwise_tensors(
    divergence: Any, chunk: int | None, most: float
) -> None:
    assert 0.1 < peak(4096, 384, divergence, chunk) < most


def test_chunks_are_recomputed_in_float32_also_where_the_backward_pass_runs_under_autocast() -> None:
    found = []
    for enabled in (False, True):
        x, y = (torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in (0, 1))
        loss = node_contrast(x, y, 0.5, chunk=3).mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss.backward()
        found.append((x.grad, y.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
