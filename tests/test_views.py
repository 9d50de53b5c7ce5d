"""Two views of each image through student, teachers and terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.distiller import Distiller
from distill.distributed import all_mean, own_rows
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads import CRD, CRLD, DIST, DKD, FT, KD, MLKD, RKD, RRD, TRG, CrossEntropy, Head, RunInfo, SeRKD
from distill.memory import EmbeddingQueue
from distill.networks import FrozenTeacher, Network
from distill.objective import Objective, Term
from distill.schedules import Progress
from distill.views import batch_of_views, count_views
from tests.two_ranks import RankPool

START = Progress(step=0)
IMAGES = 4


class Small(Network):
    """A convolution, and a classifier on its mean; with or without BatchNorm."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.norm = norm

    def create(self, num_classes: int) -> nn.Module:
        """Create the layers."""
        body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6) if self.norm else nn.Identity(), nn.ReLU())
        return nn.ModuleDict({"body": body, "fc": nn.Linear(6, num_classes)})

    def forward_features(self, image: Tensor) -> Features:
        """Run both."""
        model: Any = self.model
        cells = model["body"](image)
        embedding = cells.mean((2, 3))
        tokens = cells.flatten(2).mT
        grid = (cells.shape[2], cells.shape[3])
        return Features(logits=model["fc"](embedding), embedding=embedding, tokens=tokens, grid=grid)


def network(seed: int, norm: bool = False) -> Network:
    torch.manual_seed(seed)
    built = Small(norm)
    built.build(5, (3, 8, 8), learns=seed == 0)
    return built.double()


def distiller(terms: Mapping[str, Term], norm: bool = False, **options: Any) -> Distiller:
    student, teacher = network(0, norm), FrozenTeacher(network(1), torch.float64)
    torch.manual_seed(2)
    objective = Objective(dict(terms), student.spec, teacher.spec).double()
    return Distiller(student, teacher, objective, **options)


def batch_with(views: int, images: int = IMAGES) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    index = torch.arange(images)
    image = torch.rand(3 * images, 3, 8, 8, generator=generator, dtype=torch.float64)[: views * images]
    segments = torch.randint(4, (3 * images, 8, 8), generator=generator)[: views * images]
    batch = {"image": image, "label": (index % 5).repeat(views), "index": index.repeat(views), "segments": segments}
    return batch | ({"view": torch.arange(views).repeat_interleave(images)} if views > 1 else {})


def view_of(batch: Mapping[str, Any], view: int) -> dict[str, Any]:
    rows = slice(view * IMAGES, (view + 1) * IMAGES)
    return {key: value[rows] for key, value in batch.items() if key != "view"}


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def test_two_views_in_separate_passes_are_two_runs_of_one_view_where_nothing_relates_them() -> None:
    terms = {"task": Term(CrossEntropy()), "kd": Term(KD(), 0.5), "dkd": Term(DKD(), 2.0), "serkd": Term(SeRKD())}
    module, both = distiller(terms, norm=True), batch_with(2)
    assert module.view_passes == "separate"
    losses = module(both, START)
    parts = [module(view_of(both, view), START) for view in range(2)]
    for name in terms:
        mean = (parts[0].values[name] + parts[1].values[name]) / 2
        torch.testing.assert_close(losses.values[name], mean, rtol=1e-10, atol=1e-12)
    expected = gradients(module, (parts[0].total + parts[1].total) / 2)
    torch.testing.assert_close(gradients(module, losses.total), expected, rtol=1e-10, atol=1e-12)


def test_a_student_with_batch_norm_normalizes_each_view_by_itself_unless_its_passes_are_joint() -> None:
    both = batch_with(2)
    separate, joint = (distiller({"kd": Term(KD())}, norm=True, view_passes=passes) for passes in ("separate", "joint"))
    assert not torch.allclose(separate(both, START).total, joint(both, START).total)
    counted = [int(module.student.model["body"][1].num_batches_tracked) for module in (separate, joint)]  # type: ignore[index,union-attr]
    assert counted == [2, 1]
    without = distiller({"kd": Term(KD())})
    assert without.view_passes == "joint"
    other = distiller({"kd": Term(KD())}, view_passes="separate")
    torch.testing.assert_close(without(both, START).total, other(both, START).total, rtol=1e-10, atol=1e-12)


class Watching(Head):
    """Keeps what it is given."""

    needs = frozenset({"logits"})

    def forward(self, student: Features, teacher: Features, batch: dict[str, Any]) -> Tensor:
        """Return a value of both."""
        self.seen = student["logits"], teacher["logits"], batch
        return student["logits"].mean()


def seen(views: Sequence[int] | None, teacher_views: Sequence[int] | None, count: int = 3) -> Any:
    module = distiller({"w": Term(Watching(), views=views, teacher_views=teacher_views)})
    batch = batch_with(count) | {"stored": {"teacher": {"row": torch.arange(count * IMAGES)}}}
    module(batch, START)
    head: Any = module.objective.heads["w"]
    return module, batch, head.seen


def test_a_term_chooses_the_views_of_both_networks_and_the_batch_follows_the_students() -> None:
    module, batch, (student, teacher, found) = seen([2, 0], [1, 2])
    expected = module.student(batch["image"])["logits"]
    assert torch.equal(student, torch.cat([expected[8:], expected[:4]]))
    frozen: Any = module.teachers["teacher"]
    target = torch.cat([frozen(batch["image"][4:8])["logits"], frozen(batch["image"][8:])["logits"]])
    torch.testing.assert_close(teacher, target)
    for key in ("image", "label", "index", "segments"):
        assert torch.equal(found[key], torch.cat([batch[key][8:], batch[key][:4]])), key
    assert found["stored"]["teacher"]["row"].tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
    assert found["view"].tolist() == [0] * 4 + [1] * 4, "numbered anew"


def test_one_view_of_the_teacher_serves_all_of_the_students() -> None:
    _, _, (student, teacher, _) = seen(None, [0], count=2)
    assert len(student) == len(teacher) == 8
    assert torch.equal(teacher[:4], teacher[4:])


def test_a_single_view_comes_as_a_batch_without_views() -> None:
    _, batch, (student, _, found) = seen([1], None)
    assert len(student) == 4
    assert "view" not in found
    assert torch.equal(found["image"], batch["image"][4:8])


class Remembering(Head):
    """Keeps a queue of the teacher's embeddings, and says so."""

    needs = frozenset({"embedding"})

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Create the queue."""
        self.queue = EmbeddingQueue(32, 6)

    def forward(self, student: Features, teacher: Features, batch: dict[str, Any]) -> Tensor:
        """Enqueue."""
        self.queue.enqueue(teacher["embedding"])
        return student["embedding"].mean()

    def filled(self) -> Tensor:
        """Return the filled share."""
        return self.queue.filled / 32


@pytest.mark.parametrize("make", [lambda: RRD(size=32), Remembering])
def test_a_memory_takes_the_first_view_unless_told(make: Any) -> None:
    for views, rows in ((None, 4), ([1], 4), ([0, 1], 8)):
        module = distiller({"m": Term(make(), views=views)})
        module(batch_with(2), START)
        head: Any = module.objective.heads["m"]
        assert head.queue.count == rows


def test_a_bank_gets_each_image_once() -> None:
    both = batch_with(2)
    module, alone = (distiller({"crd": Term(CRD(samples=IMAGES, negatives=3))}) for _ in range(2))
    assert torch.equal(module(both, START).total, alone(view_of(both, 0), START).total)
    states = [part.objective.state_dict() for part in (module, alone)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_tokens_are_drawn_alike_in_both_views() -> None:
    head = TRG(tokens_per_image=3, neighbors=2)
    module, both = distiller({"trg": Term(head)}), batch_with(2)
    module(both, START)
    assert torch.equal(*head.positions(both["index"]).chunk(2))


@pytest.mark.parametrize(
    ("term", "sentence"),
    [
        (
            Term(TRG(neighbors=2), views=[0], teacher_views=[1]),
            "teacher_views is .1., but TRG compares 'tokens', whose",
        ),
        (Term(SeRKD(), views=[0], teacher_views=[1]), "teacher_views is .1., but SeRKD compares 'tokens'"),
        (Term(FT(), teacher_views=[0]), "teacher_views is .0., but FT compares 'tokens'"),
        (Term(CrossEntropy(), teacher_views=[0]), "CrossEntropy compares with no teacher: remove the term's teacher_v"),
    ],
)
def test_views_that_cannot_be_compared_are_refused(term: Term, sentence: str) -> None:
    with pytest.raises(UserError, match=f"model.heads.a: {sentence}"):
        distiller({"a": term})


@pytest.mark.parametrize(
    ("term", "views", "sentence"),
    [
        (Term(KD(), views=[1]), 1, "model.heads.a: views names view 1, but the data give one view, 0: see data.train"),
        (Term(KD(), teacher_views=[3]), 2, "model.heads.a: teacher_views names view 3, but the data give 2 views, 0 "),
        (Term(KD(), teacher_views=[0, 1]), 3, "model.heads.a: teacher_views must name one view, or one for each"),
        (Term(CRLD()), 1, r"model.heads.a.head: CRLD needs view: give two views of each image, such as data.train_"),
        (Term(CRLD(), views=[0]), 2, "model.heads.a.head: CRLD needs view: give two views"),
        (Term(CRLD()), 3, "model.heads.a.head: CRLD compares two views of each image, given 3"),
    ],
)
def test_views_that_the_data_do_not_give_are_refused_before_the_first_step(
    term: Term, views: int, sentence: str
) -> None:
    provides = frozenset({"image", "label", "index"} | ({"view"} if views > 1 else set()))
    objective = distiller({"a": term}).objective
    with pytest.raises(UserError, match=sentence):
        objective.prepare(RunInfo(views=views, provides=provides))


def test_two_of_three_views_suit_a_head_on_two() -> None:
    module = distiller({"a": Term(CRLD(), views=[0, 2])})
    module.objective.prepare(RunInfo(views=3, provides=frozenset({"image", "label", "index", "view"})))
    three = batch_with(3)
    pair = {key: torch.cat([value[:4], value[8:]]) for key, value in three.items() if key != "view"}
    other = distiller({"a": Term(CRLD())})
    assert torch.equal(module(three, START).total, other(pair | {"view": torch.arange(8) // 4}, START).total)


def test_views_that_are_no_numbers_from_0_are_refused() -> None:
    for views in ([], [-1], [0, 0]):
        with pytest.raises(UserError, match="views must list"):
            Term(KD(), views=views)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5, 6], [0, 4, 1, 5, 2, 6, 3, 7]])
def test_a_batch_that_is_not_view_after_view_is_refused(rows: list[int]) -> None:
    broken = {key: value[rows] for key, value in batch_with(2).items()}
    with pytest.raises(UserError, match="images in 2 views, which are not . images in the first view, then as many"):
        distiller({"kd": Term(KD())})(broken, START)


def test_counting_reads_no_value_from_a_device_that_has_to_be_waited_for() -> None:
    batch = {"view": torch.zeros(6, dtype=torch.int64, device="meta"), "image": torch.zeros(6, 3, device="meta")}
    assert count_views(batch, known=2) == 2
    assert batch_of_views(batch, [1, 0], 2)["view"].shape == (6,)


RELATED = {
    "task": Term(CrossEntropy()),
    "kd": Term(KD()),
    "dkd": Term(DKD(), views=[1], teacher_views=[0]),
    "rkd": Term(RKD()),
    "dist": Term(DIST()),
    "crld": Term(CRLD()),
    "mlkd": Term(MLKD()),
    "rrd": Term(RRD(size=32), views=[1, 0]),
    "trg": Term(TRG(neighbors=2)),
}


def dealt(images: int) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """This rank's mean loss and gradients as DDP averages them, and the state after the step."""
    module = distiller(RELATED)
    batch = {key: own_rows(value) for key, value in batch_with(2, images).items()}
    total = module(batch, START).total
    return all_mean(total), [all_mean(each) for each in gradients(module, total)], module.objective.state_dict()


def test_two_views_on_two_ranks_equal_one_process(pool: RankPool) -> None:
    expected = dealt(8)
    for found in pool.run(dealt, 8):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
