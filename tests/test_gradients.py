"""Shares of gradients against finite differences, over batches and over ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from distill.distiller import Distiller, ViewPasses
from distill.distributed import rank, world_size
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.gradients import Share, TermGradients, allow_retained_graphs, gradient_shares, shared_parameters
from distill.heads import RKD, Batch, CrossEntropy, EmbeddingRegression, Head, TokenRegression
from distill.networks import Timm
from distill.networks.torch_module import TorchModule
from distill.objective import Losses, Objective, Term
from distill.schedules import Progress
from tests.golden import Q
from tests.nets import Plain
from tests.two_ranks import RankPool

SHAPES = FeatureSpec(logits=(3,), embedding=(4,))


class Scaled(Head):
    """Squared difference of the embeddings, times a constant."""

    needs = frozenset({"embedding"})

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return self.factor * mse_loss(student["embedding"], teacher["embedding"])


class Detached(Head):
    """A loss without a gradient."""

    needs = frozenset({"logits"})

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return student["logits"].detach().sum()


class Broken(Head):
    """A finite loss whose gradient is not finite."""

    needs = frozenset({"embedding"})

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return (0.0 * student["embedding"]).sqrt().sum()


class Toy(nn.Module):
    """A linear backbone and a linear classifier in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 4).double()
        self.classifier = nn.Linear(4, 3).double()

    def forward(self, image: Tensor) -> Features:
        embedding = self.backbone(image).tanh()
        return Features(logits=self.classifier(embedding), embedding=embedding)


def toy(**heads: Term) -> tuple[Toy, Objective]:
    torch.manual_seed(0)
    return Toy(), Objective({"task": Term(CrossEntropy()), **heads}, SHAPES, SHAPES)


def batch(size: int = 8) -> Batch:
    return {"image": Q([size, 5], 1), "label": torch.arange(size) % 3, "teacher": Q([size, 4], 2)}


def losses_of(network: Toy, objective: Objective, inputs: Batch) -> tuple[Features, Losses]:
    student = network(inputs["image"])
    teacher = Features(logits=Q([len(inputs["image"]), 3], 3), embedding=inputs["teacher"])
    losses: Losses = objective(student, teacher, inputs, Progress())
    return student, losses


def by_differences(objective: Objective, network: Toy, name: str) -> Tensor:
    """The gradient of a term at the backbone, by central differences."""

    def value() -> float:
        with torch.no_grad():
            return float(losses_of(network, objective, batch())[1].values[name])

    gradient = []
    for parameter in network.backbone.parameters():
        flat = parameter.data.view(-1)
        for index in range(len(flat)):
            before = float(flat[index])
            flat[index] = before + 1e-6
            above = value()
            flat[index] = before - 1e-6
            gradient.append((above - value()) / 2e-6)
            flat[index] = before
    return torch.tensor(gradient, dtype=torch.float64)


def test_norms_and_cosines_are_those_of_finite_differences() -> None:
    network, objective = toy(mse=Term(Scaled(), weight=5.0), rkd=Term(RKD(), weight=0.5))
    _, losses = losses_of(network, objective, batch())
    shares = gradient_shares(losses, "task", list(network.backbone.parameters()))
    expected = {name: by_differences(objective, network, name) for name in shares}
    assert list(shares) == ["task", "mse", "rkd"]
    for name, share in shares.items():
        gradient, task = expected[name], expected["task"]
        assert share.value == float(losses.values[name])
        assert share.norm == pytest.approx(float(gradient.norm()), rel=1e-6)
        assert share.ratio == pytest.approx(float(gradient.norm() / task.norm()), rel=1e-6)
        assert share.share == pytest.approx(losses.weights[name] * share.ratio, rel=1e-12)
        for other, cosine in share.cosines.items():
            exact = torch.cosine_similarity(gradient, expected[other], dim=0)
            assert cosine == pytest.approx(float(exact), abs=1e-7)
        assert share.cosine == (1.0 if name == "task" else share.cosines["task"])


def test_measuring_leaves_the_backward_pass_as_it_is() -> None:
    network, objective = toy(mse=Term(Scaled()))
    plain = deepcopy(network)
    _, losses = losses_of(network, objective, batch())
    random_state = torch.get_rng_state()
    gradient_shares(losses, "task", list(network.backbone.parameters()))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in network.parameters())
    losses.total.backward()
    losses_of(plain, objective, batch())[1].total.backward()
    for measured, expected in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(measured.grad, expected.grad)


@pytest.mark.parametrize("factor", [1e-4, 3000.0])
def test_a_term_that_is_multiplied_has_its_ratio_multiplied(factor: float) -> None:
    plain, multiplied = (
        gradient_shares(losses_of(network, objective, batch())[1], "task", list(network.backbone.parameters()))["mse"]
        for network, objective in (toy(mse=Term(Scaled())), toy(mse=Term(Scaled(factor), weight=1 / factor)))
    )
    assert multiplied.ratio == pytest.approx(factor * plain.ratio, rel=1e-12)
    assert multiplied.share == pytest.approx(plain.share, rel=1e-12)
    assert multiplied.cosine == pytest.approx(plain.cosine, rel=1e-12)


def test_a_term_with_weight_0_is_measured() -> None:
    network, objective = toy(mse=Term(Scaled()))
    _, losses = losses_of(network, objective, batch())
    off = Losses(losses.total, losses.values, {**losses.weights, "mse": 0.0}, {})
    on, without = (gradient_shares(part, "task", list(network.backbone.parameters()))["mse"] for part in (losses, off))
    assert without.ratio == on.ratio
    assert without.share == 0.0


def test_a_scale_is_divided_out() -> None:
    network, objective = toy(mse=Term(Scaled()))
    at = list(network.backbone.parameters())
    _, losses = losses_of(network, objective, batch())
    assert gradient_shares(losses, "task", at, scale=2.0**16) == gradient_shares(losses, "task", at)


def global_shares(where: str, batches: int) -> dict[str, float]:
    """Shares over two batches that are dealt over the ranks."""
    network, objective = toy(mse=Term(Scaled(), weight=5.0), rkd=Term(RKD(), weight=0.5))
    gradients, whole = TermGradients(), batch(16)
    parts = batches * world_size()
    for number in range(batches):
        start = (number * world_size() + rank()) * 16 // parts
        part = {key: value[start : start + 16 // parts] for key, value in whole.items()}
        student, losses = losses_of(network, objective, part)
        at = list(network.backbone.parameters()) if where == "parameters" else [student["embedding"]]
        gradients.add(losses, at)
    found = gradients.measure().shares("task")
    return {f"{name} {key}": value for name in found for key, value in numbers(found[name]).items()}


def numbers(share: object) -> dict[str, float]:
    return {key: value for key, value in vars(share).items() if isinstance(value, float)}


@pytest.mark.parametrize("where", ["parameters", "embedding"])
def test_two_ranks_equal_one_process_with_two_batches(where: str, pool: RankPool) -> None:
    expected = global_shares(where, 2)
    first, second = pool.run(global_shares, where, 2)
    assert first == pytest.approx(expected, rel=1e-10)
    assert first == second, "to the last bit"


@pytest.mark.parametrize("where", ["parameters", "embedding"])
def test_accumulated_batches_equal_one_large_batch(where: str) -> None:
    network, objective = toy(mse=Term(Scaled()))
    found = []
    for parts in (1, 4):
        gradients = TermGradients()
        for start in range(0, 16, 16 // parts):
            part = {key: value[start : start + 16 // parts] for key, value in batch(16).items()}
            student, losses = losses_of(network, objective, part)
            gradients.add(
                losses, list(network.backbone.parameters()) if where == "parameters" else [student["embedding"]]
            )
        found.append(gradients.measure().shares("task"))
    for name, share in found[0].items():
        assert numbers(found[1][name]) == pytest.approx(numbers(share), rel=1e-12)


@pytest.mark.parametrize(
    ("heads", "reference", "at", "message"),
    [
        ({}, "task", "backbone", "'task' is the only term: add one to model.heads"),
        ({"mse": Scaled}, "kd", "backbone", "there is no term 'kd' to compare with; there are task, mse"),
        ({"mse": Scaled}, "mse", "classifier", "the gradient of 'mse' does not reach these tensors"),
        ({"mse": Scaled, "bad": Broken}, "task", "backbone", "the gradient of the term 'bad' is not finite"),
        ({"mse": Scaled}, "task", "nothing", "given none: the terms share no layer"),
    ],
)
def test_what_cannot_be_compared_is_reported_in_one_sentence(
    heads: dict[str, type[Head]], reference: str, at: str, message: str
) -> None:
    network, objective = toy(**{name: Term(kind()) for name, kind in heads.items()})
    _, losses = losses_of(network, objective, batch())
    tensors = [] if at == "nothing" else list(getattr(network, at).parameters())
    with pytest.raises(UserError, match=message):
        gradient_shares(losses, reference, tensors)


def test_a_term_that_does_not_reach_the_tensors_is_left_out() -> None:
    network, objective = toy(mse=Term(Scaled()), none=Term(Detached()))
    _, losses = losses_of(network, objective, batch())
    assert set(gradient_shares(losses, "task", list(network.classifier.parameters()))) == {"task"}
    both = [*network.classifier.parameters(), *network.backbone.parameters()]
    assert set(gradient_shares(losses, "task", both)) == {"task", "mse"}


def test_the_shared_parameters_are_those_below_the_classifier() -> None:
    network = TorchModule(Plain())
    network.build(10, (3, 32, 32))
    assert shared_parameters(network) == [*network.model.layers[1].parameters()]
    network.model.layers[1].requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter below its classifier"):
        shared_parameters(network)


def of_two_views(passes: ViewPasses, with_norm: bool, at: str) -> tuple[Distiller, Batch, Mapping[str, Share]]:
    """Measure a student that runs on two views of two images."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4) if with_norm else nn.Tanh()
    layers = nn.Conv2d(3, 4, 3, 2), norm, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    network = TorchModule(nn.Sequential(*layers), tokens="2")
    network.build(3, (3, 8, 8))
    network.double()
    terms = {"task": Term(CrossEntropy()), "embedding": Term(EmbeddingRegression()), "tokens": Term(TokenRegression())}
    distiller = Distiller(network, None, Objective(terms, network.spec, network.spec), passes).double()
    distiller.objective.views = 2
    inputs = {"image": Q([4, 3, 8, 8], 1), "label": torch.tensor([0, 1] * 2), "view": torch.tensor([0, 0, 1, 1])}
    student = distiller.student_features(inputs)
    teacher = Features(Q([4, 3], 2), Q([4, 16], 3), Q([4, 4, 4], 4), student.grid)
    losses = distiller.objective(student, teacher, inputs, Progress())
    return distiller, inputs, gradient_shares(losses, "task", [student[at]])


@pytest.mark.parametrize("at", ["embedding", "tokens"])
def test_separate_passes_of_the_views_have_the_shares_of_a_joint_one(at: str) -> None:
    (*_, separate), (*_, joint) = (of_two_views(passes, False, at) for passes in ("separate", "joint"))
    assert separate.keys() == joint.keys() == {"task", "embedding", "tokens"}
    for name, share in separate.items():
        assert share.norm == pytest.approx(joint[name].norm, rel=1e-9)
        assert share.cosines == pytest.approx(joint[name].cosines, rel=1e-9)


def test_the_gradient_at_the_views_of_a_student_with_batch_norm_is_that_of_their_passes() -> None:
    distiller, inputs, shares = of_two_views("separate", True, "embedding")
    passes = [distiller.student(view) for view in inputs["image"].chunk(2)]
    loss = cross_entropy(torch.cat([features["logits"] for features in passes]), inputs["label"])
    parts = torch.autograd.grad(loss, [features["embedding"] for features in passes])
    assert shares["task"].norm == pytest.approx(float(torch.cat(parts).norm()), rel=1e-9)


def test_columns_that_are_joined_stay_whole() -> None:
    left, right = (torch.rand(2, 3, dtype=torch.float64).requires_grad_() * 1 for _ in range(2))
    joined = torch.cat([left, right], dim=1)
    values = {"task": joined.sum(), "left": left.sum()}
    losses = Losses(sum(values.values()), values, dict.fromkeys(values, 1.0), {})
    shares = gradient_shares(losses, "task", [joined])
    assert shares.keys() == {"task"}
    assert shares["task"].norm == pytest.approx(12**0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_tokens_stand_for_the_map_that_all_terms_read(name: str) -> None:
    network = Timm(name, options={"patch_size": 8} if name == "test_vit" else {})
    network.build(10, (3, 64, 64))
    shapes = network.spec
    student = network(torch.rand(4, 3, 64, 64))
    values = {"task": student["logits"].square().mean(), "tokens": student["tokens"].square().mean()}
    losses = Losses(sum(values.values()), values, dict.fromkeys(values, 1.0), {})
    shares = gradient_shares(losses, "task", [student["tokens"]])
    assert shares["task"].norm > 0
    tokens = torch.autograd.grad(values["tokens"], student["tokens"])[0]
    assert shares["tokens"].norm == pytest.approx(float(tokens.norm()), rel=1e-5)
    assert shapes["tokens"] == tuple(tokens.shape[1:])


@pytest.mark.slow
def test_a_compiled_network_can_be_measured_if_its_graph_is_retained(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._functorch.config as options

    monkeypatch.setattr(options, "donated_buffer", options.donated_buffer)
    allow_retained_graphs()
    network, objective = toy(mse=Term(Scaled()))
    expected = gradient_shares(losses_of(network, objective, batch())[1], "task", list(network.backbone.parameters()))
    network.compile(backend="aot_eager")
    _, losses = losses_of(network, objective, batch())
    shares = gradient_shares(losses, "task", list(network.backbone.parameters()))
    assert shares["mse"].ratio == pytest.approx(expected["mse"].ratio, rel=1e-12)
    losses.total.backward()
    assert math.isfinite(float(network.backbone.weight.grad.norm()))
