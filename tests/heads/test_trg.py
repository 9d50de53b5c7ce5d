from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distill.distributed import own_rows, rank, world_size
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import neighbor_divergence, node_contrast
from distill.heads import RunInfo
from distill.heads.trg import TRG
from distill.networks import Timm
from distill.schedules import Linear, Progress
from distill.testing import check_head
from tests.golden import GOLDEN, Q
from tests.two_ranks import RankPool

FIGURE = GOLDEN["trg"][0]
ONLY: dict[str, dict[str, float]] = {
    part: {"local_weight": 0.0, "global_weight": 0.0, "contextual_weight": 0.0} | {f"{part}_weight": 1.0}
    for part in ("local", "global", "contextual")
}
VARIANTS: dict[str, Any] = {
    **{f"only {part}": partial(TRG, **weights) for part, weights in ONLY.items()},
    "as printed": partial(TRG, mode="paper", normalize=False, sigma=2.0),
    "as printed, sigma from the edges": partial(TRG, mode="paper", tokens_per_image=3),
    "all tokens in chunks": partial(TRG, tokens_per_image=None, chunk=20),
    "maps on a coarse grid": partial(TRG, of="last", grid=(2, 3), tokens_per_image=5, neighbors=3),
    "this process alone": partial(TRG, scope="batch"),
}


def on_grid(tokens: Tensor, grid: tuple[int, int]) -> Features:
    return Features(tokens=tokens, grid=grid)


def built(head: TRG, student: Features, teacher: Features) -> TRG:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    return head.double()


def pair(batch: int = 6, student: tuple[int, int] = (4, 4), teacher: tuple[int, int] = (4, 4)) -> list[Features]:
    return [
        on_grid(Q([batch, math.prod(grid), width], seed), grid)
        for grid, width, seed in ((student, 5, 70), (teacher, 8, 71))
    ]


def index(batch: int = 6) -> dict[str, Tensor]:
    return {"index": 3 * torch.arange(batch)}


def at_step(head: TRG, step: int, steps: int | None = 100) -> TRG:
    head.progress = Progress(step=step, steps=steps)
    return head


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_keeps_the_contract(variant: Any, pool: RankPool) -> None:
    check_head(variant, run=pool.run)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("part", ONLY)
def test_each_part_alone_has_the_golden_value_and_gradient(part: str, chunk: int | None) -> None:
    student, teacher = on_grid(Q([3, 6, 5], 70).requires_grad_(), (2, 3)), on_grid(Q([3, 6, 8], 71), (2, 3))
    head = TRG(**ONLY[part], tokens_per_image=None, neighbors=4, temperature=0.5, width=5, chunk=chunk)  # type: ignore[arg-type]
    built(head, student, teacher)
    if part == "global":
        head.student_projection.load_state_dict({"weight": Q([5, 5], 72)})
        head.teacher_projection.load_state_dict({"weight": Q([5, 8], 73)})
    loss = head(student, teacher, index(3))
    (gradient,) = torch.autograd.grad(loss, student["tokens"])
    scale = 6**2 if part == "contextual" else 1  # N^2, so that one weight serves all grids
    assert loss.item() == pytest.approx(scale * FIGURE[part], rel=1e-12)
    assert gradient.norm().item() == pytest.approx(scale * FIGURE["grad_norm_student"][part], rel=1e-8)
    assert head.diagnostics()[part].item() == loss.item()


def test_the_printed_form_has_the_golden_value() -> None:
    student, teacher = on_grid(Q([3, 6, 5], 70), (2, 3)), on_grid(Q([3, 6, 8], 71), (2, 3))
    head = TRG(**ONLY["local"], mode="paper", normalize=False, sigma=1.0, tokens_per_image=None, neighbors=4)  # type: ignore[arg-type]
    loss = built(head, student, teacher)(student, teacher, index(3))
    assert loss.item() == pytest.approx(FIGURE["local_paper_sigma1_sum"], rel=1e-12)


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    student, teacher = pair()
    head = built(TRG(local_weight=2.0, global_weight=3.0, contextual_weight=0.5), student, teacher)
    loss = head(student, teacher, index())
    parts = head.diagnostics()
    assert set(parts) == {"local", "global", "contextual", "temperature"}
    assert not any(value.requires_grad for value in parts.values())
    assert loss.item() == pytest.approx(2 * parts["local"] + 3 * parts["global"] + 0.5 * parts["contextual"])


@pytest.mark.parametrize("part", ONLY)
def test_a_part_of_weight_0_has_no_parameters_and_no_diagnostics(part: str) -> None:
    student, teacher = pair()
    head = built(TRG(**ONLY[part]), student, teacher)  # type: ignore[arg-type]
    head(student, teacher, {} if part == "contextual" else index())  # it alone draws no tokens
    assert bool(list(head.parameters())) == (part == "global")
    assert set(head.diagnostics()) == ({"global", "temperature"} if part == "global" else {part})


def test_graph_parts_are_those_of_the_drawn_tokens_of_all_images() -> None:
    student, teacher = pair()
    head = at_step(built(TRG(tokens_per_image=3, neighbors=5, temperature=0.2), student, teacher), 4)
    head(student, teacher, index())
    places = head.positions(index()["index"]).tolist()
    drawn = [
        torch.stack([side["tokens"][image, place] for image, row in enumerate(places) for place in row])
        for side in (student, teacher)
    ]
    local = neighbor_divergence(F.normalize(drawn[0], dim=1), F.normalize(drawn[1], dim=1), 5).mean()
    anchors, keys = (
        F.normalize(nodes @ projection.weight.T, dim=1)
        for nodes, projection in zip(drawn, (head.student_projection, head.teacher_projection), strict=True)
    )
    torch.testing.assert_close(head.diagnostics()["local"], local)
    torch.testing.assert_close(head.diagnostics()["global"], node_contrast(anchors, keys, 0.2).mean())


def test_tokens_are_drawn_without_replacement_and_equally_often() -> None:
    head = built(TRG(tokens_per_image=5), *pair())
    places = head.positions(torch.arange(4000))
    assert places.shape == (4000, 5)
    assert all(len(set(row)) == 5 for row in places.tolist())
    counts = places.flatten().bincount(minlength=16).double()
    expected = 4000 * 5 / 16
    assert ((counts - expected).abs() < 4.5 * expected**0.5).all()


def test_draws_depend_on_seed_step_and_sample_alone() -> None:
    head = at_step(built(TRG(), *pair()), 3)
    samples = torch.arange(50)
    state = torch.get_rng_state()
    places = head.positions(samples)
    assert torch.equal(torch.get_rng_state(), state)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head.positions(samples[order]), places[order])
    assert torch.equal(at_step(built(TRG(), *pair()), 3, steps=None).positions(samples), places)  # as after a resume
    for other in (at_step(built(TRG(), *pair()), 4), at_step(built(TRG(seed=1), *pair()), 3)):
        assert (other.positions(samples) != places).any(dim=1).all()


def drawn_on_a_rank(steps: list[int]) -> list[Tensor]:
    head, samples = built(TRG(), *pair()), own_rows(torch.arange(20))
    return [at_step(head, step).positions(samples) for step in steps]


def test_two_ranks_draw_the_tokens_of_one_process(pool: RankPool) -> None:
    halves = pool.run(drawn_on_a_rank, [0, 1, 7])
    for whole, first, second in zip(drawn_on_a_rank([0, 1, 7]), *halves, strict=True):
        assert torch.equal(torch.stack([first, second], dim=1).flatten(0, 1), whole)


def loss_of_half(scope: Any, half: int | None = None) -> float:
    student, teacher = pair()
    rows = slice(rank() if half is None else half, None, 2)
    head = built(TRG(scope=scope), student, teacher)
    batch = {"index": index()["index"][rows]}
    loss: float = head(student.apply(lambda t: t[rows]), teacher.apply(lambda t: t[rows]), batch).item()
    return loss


def test_at_scope_batch_a_rank_relates_its_own_images(pool: RankPool) -> None:
    alone = [loss_of_half("global", half) for half in (0, 1)]
    assert pool.run(loss_of_half, "batch") == pytest.approx(alone)
    assert pool.run(loss_of_half, "global") != pytest.approx(alone)


def test_local_and_contextual_parts_of_a_student_that_is_its_teacher_are_zero() -> None:
    (teacher,) = pair()[:1]
    for head in (TRG(global_weight=0.0), TRG(global_weight=0.0, mode="paper")):
        assert built(head, teacher, teacher)(teacher, teacher, index()).item() == pytest.approx(0.0, abs=1e-12)


def test_turning_the_student_changes_neither_local_nor_contextual_part() -> None:
    student, teacher = pair()
    basis = torch.linalg.qr(Q([5, 5], 9)).Q
    head = built(TRG(global_weight=0.0), student, teacher)
    torch.testing.assert_close(
        head(student.apply(lambda tokens: tokens @ basis), teacher, index()), head(student, teacher, index())
    )


def test_contrast_at_an_infinite_temperature_is_the_log_of_the_number_of_nodes() -> None:
    student, teacher = pair()
    head = built(TRG(**ONLY["global"], temperature=1e12), student, teacher)  # type: ignore[arg-type]
    assert head(student, teacher, index()).item() == pytest.approx(math.log(6 * 8))


def test_temperature_falls_over_the_run_unless_it_is_given() -> None:
    student, teacher = pair()
    default, own = built(TRG(), student, teacher), built(TRG(temperature=Linear(1.0, 0.2)), student, teacher)
    found = []
    for step, steps in ((0, 100), (50, 100), (100, 100), (3, None)):
        at_step(default, step, steps)(student, teacher, index())
        found.append(default.diagnostics()["temperature"].item())
    assert found == pytest.approx([0.5, 0.285, 0.07, 0.07])
    at_step(own, 25)(student, teacher, index())
    assert own.diagnostics()["temperature"].item() == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("student", "teacher", "given", "common"),
    [
        ((14, 14), (7, 7), None, (7, 7)),
        ((8, 4), (4, 6), None, (4, 4)),
        ((8, 8), (8, 8), (4, 4), (4, 4)),
        ((14, 14), (7, 7), [4, 4], (4, 4)),
    ],
)
def test_different_grids_are_averaged_to_a_common_one(student: Any, teacher: Any, given: Any, common: Any) -> None:
    sides = pair(3, student, teacher)
    head = built(TRG(grid=given), *sides)
    assert head.common == common
    for before, after in zip(sides, head.on_common_grid(*sides), strict=True):
        assert after.grid == common
        assert after["tokens"].shape[1] == math.prod(common)
        h, w = before.grid or ()
        if h % common[0] == w % common[1] == 0:
            maps = before["tokens"].mT.unflatten(2, (h, w))
            expected = F.adaptive_avg_pool2d(maps, common).flatten(2).mT
            torch.testing.assert_close(after["tokens"], expected)
    assert bool(head(*sides, index(3)).isfinite())


def test_networks_of_one_grid_are_compared_token_by_token() -> None:
    student, teacher = pair()
    own, other = built(TRG(), student, teacher).on_common_grid(student, teacher)
    assert torch.equal(own["tokens"], student["tokens"])
    assert torch.equal(other["tokens"], teacher["tokens"])


@pytest.mark.parametrize("of", ["tokens", "parts"])
def test_a_vit_learns_from_a_cnn(of: str) -> None:
    student = Timm("test_vit", options={"patch_size": 4}, taps={"parts": "norm"})
    teacher = Timm("test_resnet", taps={"parts": "layer2"})
    torch.manual_seed(0)
    for network in (student, teacher):
        network.build(10, (3, 64, 64))
    head = TRG(of=of, tokens_per_image=4)
    head.build(student.spec, teacher.spec)
    image = torch.rand(4, 3, 64, 64)
    head(student(image), teacher(image), index(4)).backward()
    assert head.common == head.teacher_grid.grid != head.student_grid.grid
    reached = [parameter.grad for name, parameter in student.named_parameters() if "blocks" in name]
    assert all(gradient is not None and bool(gradient.isfinite().all() and gradient.any()) for gradient in reached)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["teacher", "paper"])
def test_under_autocast_duplicate_tokens_give_a_finite_value_and_gradient(mode: Any, dtype: torch.dtype) -> None:
    student, teacher = (side.apply(lambda tokens: tokens[:, [0, 1] * 8].to(dtype)) for side in pair())
    head = built(TRG(mode=mode), student, teacher).float()
    leaf = student.apply(lambda tokens: tokens.requires_grad_())
    with torch.autocast("cpu", dtype):
        loss = head(leaf, teacher, index())
    loss.backward()
    assert loss.dtype == torch.float32
    assert bool(loss.isfinite())
    for tensor in (leaf["tokens"], *head.parameters()):
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all())


@pytest.mark.parametrize(("chunk", "most"), [(None, 6.0), (512, 1.5)])
def test_forward_and_backward_on_4096_nodes_hold_few_pairwise_tensors(chunk: int | None, most: float) -> None:
    student, teacher = (on_grid(torch.randn(64, 64, 384), (8, 8)) for _ in range(2))
    head = TRG(tokens_per_image=None, chunk=chunk)
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    student["tokens"].requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        head(student, teacher, index(64)).backward()
    assert measured.profiler is not None
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    assert 0.1 < held.max().item() / (4 * 4096**2) < most


def test_a_batch_with_too_few_nodes_is_refused_before_and_in_a_step() -> None:
    student, teacher = pair(2)
    head = built(TRG(tokens_per_image=4), student, teacher)
    message = r"neighbors is 8, but a batch has 8 nodes \(4 tokens of each image\), of which each has 7 others: give"
    with pytest.raises(UserError, match=message):
        head.prepare(RunInfo(batch_size=2))
    with pytest.raises(UserError, match=message):
        head(student, teacher, index(2))
    head.prepare(RunInfo(batch_size=3))
    for harmless in (ONLY["global"], ONLY["contextual"]):
        other = built(TRG(**harmless, tokens_per_image=4), student, teacher)  # type: ignore[arg-type]
        other.prepare(RunInfo(batch_size=1))
        assert bool(other(student, teacher, index(2)).isfinite())


def refused_on_a_rank(scope: Any) -> bool:
    head = built(TRG(tokens_per_image=4, scope=scope), *pair(2))
    try:
        head.prepare(RunInfo(batch_size=2, world_size=world_size()))
    except UserError:
        return True
    return False


def test_the_images_of_all_ranks_count_at_global_scope_only(pool: RankPool) -> None:
    assert pool.run(refused_on_a_rank, "global") == [False, False]
    assert pool.run(refused_on_a_rank, "batch") == [True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_weight": 0, "global_weight": 0, "contextual_weight": 0}, "TRG compares nothing with local_weight 0"),
        ({"tokens_per_image": 0}, "tokens_per_image must be at least 1, given 0"),
        ({"neighbors": 0}, "neighbors must be at least 1, given 0"),
        ({"neighbors": 1}, "neighbors must be at least 2 in mode 'teacher'"),
        ({"width": 0}, "width must be at least 1, given 0"),
        ({"chunk": 0}, "chunk must be at least 1, given 0"),
        ({"mode": "papr"}, "mode cannot be 'papr': did you mean 'paper'"),
        ({"sigma": 0.0}, "sigma must be above 0, given 0"),
        ({"temperature": -1.0}, "temperature must be above 0, given -1"),
        ({"scope": "image"}, "TRG has no scope 'image': known are 'batch' and 'global'"),
    ],
)
def test_an_argument_out_of_its_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TRG(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens_per_image": 17}, "tokens_per_image is 17, but the common grid of both networks, 4 x 4, has 16: give"),
        ({"grid": (5, 4)}, "grid must be at least 1 x 1 and no finer than 4 x 4, .* given 5 x 4"),
        ({"grid": (0, 4)}, "grid must be at least 1 x 1 .* given 0 x 4"),
        ({"of": "x"}, "'x' of the student has the shape .*: name 'tokens' or a layer"),
    ],
)
def test_grids_that_do_not_fit_are_refused_before_the_first_step(arguments: dict[str, Any], message: str) -> None:
    student, teacher = (
        FeatureSpec(tokens=(grid[0] * grid[1], 5), grid=grid, maps={"x": (6,)}) for grid in ((4, 4), (6, 6))
    )
    with pytest.raises(UserError, match=message):
        TRG(**arguments).build(student, teacher)


def test_plot_draws_every_edge_of_both_graphs_and_says_how_many_are_shared() -> None:
    student, teacher = pair(batch=5)
    head = built(TRG(neighbors=3), student, teacher)
    figure = head.plot(student, teacher, {"image": torch.rand(5, 3, 20, 20)})
    rows = [figure.axes[3 * row : 3 * row + 3] for row in range(3)]
    assert len(figure.axes) == 9
    for image, of_teacher, of_student in rows:
        assert not image.collections
        counts = [[len(part.get_segments()) for part in axes.collections[:2]] for axes in (of_teacher, of_student)]
        assert [sum(count) for count in counts] == [16 * 3, 16 * 3]
        assert counts[0][1] == counts[1][1]  # the shared ones
        assert of_student.get_xlabel() == f"{100 * counts[1][1] / 48:.0f} % of the edges are shared"


def test_plot_of_equal_networks_shares_all_edges_and_a_small_grid_draws_all_there_are() -> None:
    (teacher,) = pair(batch=1, student=(2, 2))[:1]
    head = built(TRG(tokens_per_image=4), teacher, teacher)
    figure = head.plot(teacher, teacher, {"image": torch.rand(1, 1, 8, 8)})
    assert figure.axes[2].get_xlabel() == "100 % of the edges are shared"
    assert len(figure.axes[2].collections[1].get_segments()) == 4 * 3
