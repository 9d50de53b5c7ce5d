from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.distributed import gather, own_rows
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import class_costs, linear_cka
from distill.heads.wkd_l import WKDL
from distill.networks import Timm
from distill.testing import check_head
from tests.golden import Q
from tests.new_methods import CASES, assert_case, inputs
from tests.two_ranks import RankPool


def built(student: Features, teacher: Features, **arguments: Any) -> WKDL:
    head = WKDL(**arguments)
    for method in (head.check, head.build):
        method(FeatureSpec.of(student), FeatureSpec.of(teacher))
    return head.double()


def networks(x: dict[str, Tensor], bias: int | None = None) -> tuple[Features, Features]:
    """Logits of both networks, and a teacher with a classifier; the logits are not the classifier's."""
    shift = None if bias is None else Q([10], bias)
    classify = partial(F.linear, weight=x["W"], bias=shift)
    return Features(x["s"]), Features(x["t"], Q([8, 6], 30), classify=classify)


@pytest.mark.parametrize("name", ["wkd_l_fc", "wkd_l_plain_cost"])
@pytest.mark.parametrize("bias", [None, 5])
def test_with_costs_from_the_classifier_value_and_gradient_are_the_golden_ones(name: str, bias: int | None) -> None:
    x, params = inputs(name), CASES[name]["params"]
    student, teacher = networks(x, bias)
    head = built(
        student,
        teacher,
        gamma=params["gamma"],
        temperature=params["T"],
        sharpness=params["sharpen"],
        regularization=params["reg"],
        iterations=params["iters"],
    )
    assert_case(name, head(student, teacher, {"label": x["y"]}), x.__getitem__)


def test_with_costs_from_features_value_and_gradient_are_the_golden_ones() -> None:
    """The features come in three batches, and the loss of a batch does not depend on its own."""
    name = "wkd_l_cka"
    x = inputs(name)
    student, teacher = Features(x["s"]), Features(x["t"], Q([8, 4], 30))
    head = built(student, teacher, cost="features", samples=9)
    label = torch.arange(10)[:, None].expand(10, 9)
    for rows in (slice(0, 2), slice(2, 5), slice(5, 9)):
        seen = x["F"][:, rows].transpose(0, 1).flatten(0, 1)
        logits = Features(Q([len(seen), 10], 1).requires_grad_())
        head(logits, Features(logits["logits"], seen), {"label": label[:, rows].T.flatten()})
    assert head.filled() == 1
    assert_case(name, head(student, teacher, {"label": x["y"]}), x.__getitem__)
    torch.testing.assert_close(head.costs(teacher), class_costs(linear_cka(x["F"])), msg="full rows stay")


def test_costs_are_known_before_the_memory_is_full_and_only_training_fills_it() -> None:
    student, teacher, label = Features(Q([8, 10], 1)), Features(Q([8, 10], 2), Q([8, 4], 3)), torch.arange(8) % 3
    head = built(student, teacher, cost="features", samples=4)
    head.eval()
    head(student, teacher, {"label": label})
    assert head.filled() == 0
    unrelated = 1 - torch.exp(torch.tensor(-1.0, dtype=torch.float64))
    torch.testing.assert_close(head.costs(teacher), unrelated * (1 - torch.eye(10, dtype=torch.float64)))
    head.train()
    head(student, teacher, {"label": label})
    found = head.costs(teacher)
    expected = class_costs(linear_cka(torch.stack([teacher["embedding"][label == kind][:2] for kind in (0, 1)])))
    assert 0 < found[0, 1] < unrelated
    torch.testing.assert_close(found[2, 3:], unrelated.expand(7))
    head = built(student, teacher, cost="features", samples=2)
    head(student, teacher, {"label": label})
    torch.testing.assert_close(head.costs(teacher)[:2, :2], expected)


def test_costs_from_features_keep_the_contract(pool: RankPool) -> None:
    check_head(partial(WKDL, cost="features", samples=3, gamma=30.0), run=pool.run)


def _costs_of_rank(classes: int) -> Tensor:
    features, label = own_rows(Q([12, 4], 1)), own_rows(torch.arange(12) % classes - 1)
    logits = Features(own_rows(Q([12, 10], 2)), features)
    head = built(logits, logits, cost="features", samples=3)
    head(Features(logits["logits"].clone().requires_grad_()), logits, {"label": label})
    return gather(head.costs(logits).unsqueeze(0))


def test_two_ranks_have_the_costs_of_one_process(pool: RankPool) -> None:
    (expected,) = _costs_of_rank(4)
    for found in pool.run(_costs_of_rank, 4):
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-12, atol=0)


def test_mean_runs_over_the_labeled_samples_and_soft_labels_count_as_their_largest_class() -> None:
    x = inputs("wkd_l_fc")
    student, teacher = networks(x)
    head, label = built(student, teacher), x["y"].clone()
    label[[0, 5]] = -1
    kept = label >= 0
    rows = (Features(student["logits"][kept]), Features(x["t"][kept], classify=teacher.classify))
    expected = head(*rows, {"label": label[kept]})
    torch.testing.assert_close(head(student, teacher, {"label": label}), expected)
    soft = 0.7 * F.one_hot(label.clamp_min(0), 10) + 0.03 * kept[:, None]
    soft[~kept] = 0
    torch.testing.assert_close(head(student, teacher, {"label": soft}), expected)
    assert head(student, teacher, {"label": torch.full((8,), -1)}).item() == 0


def test_costs_of_a_real_classifier_are_one_less_the_cosines_of_its_rows() -> None:
    torch.manual_seed(0)
    network = Timm("test_resnet")
    network.build(10, (3, 32, 32))
    features = network.eval()(torch.rand(2, 3, 32, 32))
    head = built(features, features, sharpness=0.0)
    weight = network.model.get_submodule(network.classifier[0]).weight.detach()
    cosine = F.cosine_similarity(weight[:, None], weight[None], dim=2)
    found = head.costs(features.apply(Tensor.detach))
    torch.testing.assert_close(found, (1 - cosine).fill_diagonal_(0), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    bare = FeatureSpec(logits=(5,), embedding=(6,))
    with pytest.raises(UserError, match="WKDL calls the teacher's classifier, but this teacher has none"):
        WKDL().check(bare, bare)
    WKDL(cost="features").check(FeatureSpec(logits=(5,)), bare)
    with pytest.raises(UserError, match="WKDL needs 'embedding' of the teacher"):
        WKDL(cost="features").check(bare, FeatureSpec(logits=(5,)))
    with pytest.raises(UserError, match="1 class"):
        WKDL().build(FeatureSpec(logits=(1,)), FeatureSpec(logits=(1,), embedding=(3,)))
    with pytest.raises(UserError, match="cost cannot be 'feature': did you mean 'features'"):
        WKDL(cost="feature")  # type: ignore[arg-type]


def test_a_memory_of_another_size_is_refused_before_anything_is_loaded() -> None:
    spec = FeatureSpec(logits=(5,), embedding=(6,))
    small, large = WKDL(cost="features", samples=2), WKDL(cost="features", samples=3)
    for head in (small, large):
        head.build(spec, spec)
    with pytest.raises(
        UserError, match="WKDL: the bank .* is 16 x 6 in the checkpoint and 11 x 6 in the configuration"
    ):
        small.load_state_dict(large.state_dict())
