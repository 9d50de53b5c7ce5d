from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.parts.classifier import region_scores
from distill.heads.parts.map_reader import MapReader
from distill.heads.sdd import SDD
from distill.networks import Timm
from distill.objective import Objective, Term
from distill.testing import check_head
from tests.new_methods import CASES, assert_case, inputs
from tests.two_ranks import RankPool

every_case = pytest.mark.parametrize("name", ["sdd_kd", "sdd_kd_12", "sdd_dkd", "sdd_nkd", "sdd_nkd_mended"])


def networks(x: dict[str, Tensor]) -> tuple[Features, Features]:
    def network(cells: Tensor, weight: Tensor, bias: Tensor) -> Features:
        classify = partial(F.linear, weight=weight, bias=bias)
        embedding = cells.mean((2, 3))
        return Features(classify(embedding), embedding, maps={"last": cells}, classify=classify)

    return network(x["f"], x["Ws"], x["bs"]), network(x["g"], x["Wt"], x["bt"])


def built(student: Features, teacher: Features, **arguments: Any) -> SDD:
    head = SDD(of="last", **arguments)
    for method in (head.check, head.build):
        method(FeatureSpec.of(student), FeatureSpec.of(teacher))
    return head


def arguments_of(name: str) -> dict[str, Any]:
    params = CASES[name]["params"]
    given = {"loss": params["base"], "temperature": params["T"], "scales": params["scales"]}
    return given | {key: params[key] for key in ("alpha", "beta", "keep_target") if key in params}


@every_case
def test_value_and_gradient_are_the_golden_ones(name: str) -> None:
    x = inputs(name)
    student, teacher = networks(x)
    head = built(student, teacher, **arguments_of(name))
    assert_case(name, head(student, teacher, {"label": x["y"]}), x.__getitem__)


@every_case
def test_value_is_that_of_the_literal_formula_in_probabilities(name: str) -> None:
    x, params = inputs(name), CASES[name]["params"]
    student, teacher = networks(x)
    temperature, target = params["T"], x["y"].tolist()

    def scores(cells: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        cells = F.adaptive_avg_pool2d(cells, 4)
        regions = [F.adaptive_avg_pool2d(cells, scale).flatten(2) for scale in params["scales"]]
        return [weight @ region + bias for region in torch.cat(regions, 2).detach().permute(2, 0, 1).flatten(0, 1)]

    def row(s: Tensor, t: Tensor, c: int) -> float:
        q, p = (torch.softmax(z / temperature, 0) for z in (s, t))
        rest = torch.arange(10) != c

        def divergence(p: Tensor, q: Tensor) -> Tensor:
            return temperature**2 * (p * (p / q).log()).sum()

        if params["base"] == "kd":
            return divergence(p, q).item()
        if params["base"] == "dkd":
            binary = divergence(torch.stack([p[c], 1 - p[c]]), torch.stack([q[c], 1 - q[c]]))
            others = divergence(p[rest] / p[rest].sum(), q[rest] / q[rest].sum())
            return (params["alpha"] * binary + params["beta"] * others).item()
        kept = torch.ones(10, dtype=torch.bool) if params["keep_target"] else rest
        cross = -(p[kept] / p[kept].sum() * (q[kept] / q[kept].sum()).log()).sum()
        first = -torch.softmax(t, 0)[c] * torch.log_softmax(s, 0)[c]
        return (first + params["beta"] * temperature**2 * cross).item()

    ours, theirs = scores(x["f"], x["Ws"], x["bs"]), scores(x["g"], x["Wt"], x["bt"])
    total = 0.0
    for place, (s, t) in enumerate(zip(ours, theirs, strict=True)):
        sample = place % 4
        agrees = (t.argmax() == target[sample]) == (theirs[sample].argmax() == target[sample])
        total += (1 if agrees else 2) * row(s, t, target[sample])
    head = built(student, teacher, **arguments_of(name))
    assert head(student, teacher, {"label": x["y"]}).item() == pytest.approx(total / len(ours), rel=1e-10)


@pytest.mark.parametrize("loss", ["dkd", "nkd"])
def test_other_losses_keep_the_contract(loss: Any, pool: RankPool) -> None:
    check_head(partial(SDD, loss, scales=(2, 1)), run=pool.run)


def test_mean_runs_over_the_labeled_samples() -> None:
    x = inputs("sdd_dkd")
    student, teacher = networks(x)
    head, label = built(student, teacher, loss="dkd"), x["y"].clone()
    label[2] = -1
    kept = label >= 0
    rows = [features.apply(lambda tensor: tensor[kept]) for features in (student, teacher)]
    expected = head(rows[0], rows[1], {"label": label[kept]})
    torch.testing.assert_close(head(student, teacher, {"label": label}), expected)
    soft = F.one_hot(label.clamp_min(0), 10).double() * kept[:, None]
    torch.testing.assert_close(head(student, teacher, {"label": soft}), expected)
    assert head(student, teacher, {"label": torch.full((4,), -1)}).item() == 0


def test_on_a_real_network_the_whole_image_scores_its_logits_and_the_classifier_learns() -> None:
    torch.manual_seed(0)
    student, teacher = Timm("test_resnet"), Timm("test_efficientnet")
    for network in (student, teacher):
        network.build(10, (3, 64, 64))
    objective = Objective({"sdd": Term(SDD())}, student.spec, teacher.spec)
    image, batch = torch.rand(3, 3, 64, 64), {"label": torch.tensor([1, 7, 3])}
    seen = student(image)
    scores = region_scores(seen, MapReader("tokens", student.spec, "student"), 1, 2)
    torch.testing.assert_close(scores[:, 0], seen["logits"], rtol=1e-4, atol=1e-4)
    objective.heads["sdd"](seen, teacher.eval()(image), batch).backward()
    classifier = student.model.get_submodule(student.classifier[0])
    assert bool(classifier.weight.grad.any())  # type: ignore[union-attr,operator]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_network_whose_classifier_cannot_be_called_is_refused_by_its_term() -> None:
    spec = FeatureSpec(logits=(5,), embedding=(6,), tokens=(16, 6), grid=(4, 4), classifies=True)
    bare = FeatureSpec(embedding=(6,), tokens=(16, 6), grid=(4, 4))
    for side, pair in (("student", (bare, spec)), ("teacher", (spec, bare))):
        with pytest.raises(UserError, match=rf"model\.heads\.sdd\.head: SDD calls the {side}'s classifier, but this"):
            Objective({"sdd": Term(SDD())}, *pair)


def test_a_layer_that_the_classifier_does_not_read_is_refused() -> None:
    spec = FeatureSpec(logits=(5,), embedding=(6,), maps={"low": (4, 8, 8)}, classifies=True)
    with pytest.raises(
        UserError, match="parts of 'low', but it has 4 channels in the student, whose classifier takes 6"
    ):
        SDD(of="low").build(spec, spec)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": (2, 4)}, r"with 1 among them, given \[2, 4\]"),
        ({"scales": (1, 2, 2)}, r"different numbers of cells, with 1 among them, given \[1, 2, 2\]"),
        ({"loss": "dkb"}, "loss cannot be 'dkb': did you mean 'dkd'"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SDD(**arguments)
