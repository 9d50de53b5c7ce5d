from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

import distill.heads
from distill.distributed import mean_over_ranks, own_rows, rank
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads import KD, Batch, Head, RelationHead, shipped
from distill.heads.base import Scope
from distill.objective import Term
from distill.schedules import Constant, Linear, Progress
from distill.testing import check_head
from tests.golden import Q
from tests.two_ranks import RankPool


class CosineRelation(RelationHead):
    """A relation loss in ten lines.

    Args:
        scope: over what it ranges.
    """

    needs = frozenset({"embedding"})

    def __init__(self, scope: Scope = "global") -> None:
        super().__init__(scope)

    def tokens(self, features: Features, batch: Batch) -> Tensor:
        return features["embedding"]

    def relate(self, tokens: Tensor) -> Tensor:
        tokens = normalize(tokens, dim=-1)
        return tokens @ tokens.mT

    def compare(self, student_relation: Tensor, teacher_relation: Tensor) -> Tensor:
        return mse_loss(student_relation, teacher_relation)


def test_a_users_relation_loss_keeps_the_whole_contract(pool: RankPool) -> None:
    check_head(CosineRelation, run=pool.run)


def batch_loss(whole: Tensor) -> Tensor:
    own = own_rows(whole)
    loss: Tensor = CosineRelation("batch")(Features(embedding=own), Features(embedding=own.square()), {})
    return loss


def test_at_scope_batch_ranks_relate_their_own_batch_alone(pool: RankPool) -> None:
    whole = Q([8, 5], 1)
    for place, loss in enumerate(pool.run(batch_loss, whole)):
        own = Features(embedding=whole[place::2])
        assert torch.equal(loss, CosineRelation()(own, own.apply(torch.square), {}))


def test_an_unknown_scope_is_refused_with_near_matches() -> None:
    with pytest.raises(UserError, match="CosineRelation has no scope 'globl': did you mean 'global'"):
        CosineRelation("globl")  # type: ignore[arg-type]


def test_a_relation_without_a_memory_has_no_scope_memory() -> None:
    with pytest.raises(UserError, match="has no scope 'memory'"):
        CosineRelation("memory")


def test_what_a_network_lacks_is_named_with_its_side() -> None:
    full, bare = FeatureSpec(embedding=(3,)), FeatureSpec(logits=(2,))
    with pytest.raises(UserError, match=r"CosineRelation needs 'embedding' of the teacher, .* 'logits'"):
        CosineRelation().check(full, bare)
    with pytest.raises(UserError, match=r"CosineRelation compares with a teacher, but model\.teacher is not given"):
        CosineRelation().check(full, None)


class LabelLoss(Head):
    needs = frozenset({"embedding"})
    needs_teacher = False

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return student["embedding"].mean()


def test_a_loss_on_the_labels_asks_nothing_of_a_teacher() -> None:
    LabelLoss().check(FeatureSpec(embedding=(3,)), None)
    LabelLoss().check(FeatureSpec(embedding=(3,)), FeatureSpec(logits=(2,)))


def test_shipped_heads_are_found_by_name_and_patterns_are_not_among_them() -> None:
    assert {"KD", "DKD", "RKD", "CrossEntropy"} <= set(shipped())
    assert not {"Head", "LogitHead", "RelationHead"} & set(shipped())
    assert distill.heads.KD is shipped()["KD"]


def test_every_methods_file_is_exported() -> None:
    found = {}
    for info in iter_modules(distill.heads.__path__):
        if info.ispkg or info.name == "base":
            continue
        module = import_module(f"distill.heads.{info.name}")
        heads = {
            name: item
            for name, item in vars(module).items()
            if isinstance(item, type) and issubclass(item, Head) and item.__module__ == module.__name__
        }
        assert heads, f"{info.name} defines no head"
        found |= heads
    assert found == shipped()
    assert all(getattr(distill.heads, name) is item for name, item in found.items())


def test_a_head_of_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"'distill\.heads' has no attribute 'KDD'"):
        distill.heads.KDD  # noqa: B018  # the access is the test


def test_a_weight_is_a_number_or_a_schedule_and_only_a_constant_zero_is_off() -> None:
    head = LabelLoss()
    assert Term(head, 0).is_off
    assert not Term(head).is_off
    assert not Term(head, Constant(0.0)).is_off
    assert Term(head).weight_at(Progress()) == 1.0
    assert Term(head, Linear(0, 2)).weight_at(Progress(step=5, steps=10)) == 1.0


class Projected(Head):
    """A head of a user with plain modules of torch, a buffer of its own type among them."""

    needs = frozenset({"embedding"})

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        self.project = torch.nn.Linear(*student["embedding"], *teacher["embedding"])  # type: ignore[misc]
        self.register_buffer("kept", torch.zeros(2, dtype=torch.bfloat16))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return mse_loss(self.project(student["embedding"]), teacher["embedding"])


def test_a_head_keeps_float32_in_a_module_of_half_precision_and_follows_to_float64() -> None:
    head = Projected()
    head.build(FeatureSpec(embedding=(4,)), FeatureSpec(embedding=(3,)))
    before = head.project.weight.clone()
    torch.nn.Sequential(head).bfloat16()
    assert torch.equal(head.project.weight, before)
    assert head.kept.dtype == torch.bfloat16
    torch.nn.Sequential(head).double()
    assert head.project.weight.dtype == torch.float64


def test_a_temperature_is_a_constant_above_zero_or_a_schedule() -> None:
    schedule = Linear(4, 1)
    assert KD(0.5).temperature == 0.5
    assert KD(schedule).temperature is schedule
    with pytest.raises(UserError, match="temperature must be above 0, given 0"):
        KD(0)


def share(totals: list[float], masses: list[int]) -> float:
    return mean_over_ranks(torch.tensor(totals[rank()]), torch.tensor(masses[rank()])).item()


@pytest.mark.parametrize("masses", [[3, 1], [4, 0], [0, 0]])
def test_shares_of_the_mean_average_to_the_mean_over_all_ranks(pool: RankPool, masses: list[int]) -> None:
    totals = [2.0 * mass for mass in masses]
    shares = pool.run(share, totals, masses)
    assert sum(shares) / 2 == pytest.approx(sum(totals) / max(sum(masses), 1))
