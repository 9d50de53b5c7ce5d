"""A teacher never learns, is never saved and never changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from distill.networks import FrozenTeacher, Timm, TorchModule

SHAPE = (3, 32, 32)


class Parent(nn.Module):
    def __init__(self, teacher: FrozenTeacher) -> None:
        super().__init__()
        self.student = nn.Linear(3, 2)
        self.teacher = teacher


def network(name: str = "test_resnet", **options) -> Timm:
    torch.manual_seed(0)
    network = Timm(name, options=options)
    network.build(5, SHAPE)
    return network


def images() -> torch.Tensor:
    return torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1))


def snapshot(teacher: FrozenTeacher) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in teacher.network.model.state_dict().items()}


def test_weights_and_statistics_stay_bit_equal_whatever_the_parent_does():
    parent = Parent(FrozenTeacher(network()))
    before = snapshot(parent.teacher)
    parent.train()
    parent.requires_grad_(True)
    for _ in range(3):
        parent.teacher(images())
    assert not any(module.training for module in (parent.teacher, *parent.teacher.network.modules()))
    assert not any(parameter.requires_grad for parameter in parent.teacher.network.parameters())
    after = snapshot(parent.teacher)
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_train_of_the_teacher_itself_leaves_it_in_eval_mode():
    teacher = FrozenTeacher(network())
    assert teacher.train() is teacher
    assert not teacher.training
    assert not teacher.network.training


def test_dropout_is_off():
    parent = Parent(FrozenTeacher(network("test_vit", drop_rate=0.5, drop_path_rate=0.5))).train()
    assert torch.equal(parent.teacher(images()).logits, parent.teacher(images()).logits)


def test_features_carry_no_gradient_and_can_be_saved_for_backward():
    teacher = FrozenTeacher(network())
    features = teacher(images())
    assert not any(features[name].requires_grad for name in ("logits", "embedding", "tokens"))
    student = torch.ones(4, 5, requires_grad=True)
    (student * features.logits).sum().backward()
    assert torch.equal(student.grad, features.logits)


def test_optimizers_averages_and_broadcasts_see_nothing_of_it():
    parent = Parent(FrozenTeacher(network()))
    assert {name for name, _ in parent.named_parameters()} == {"student.weight", "student.bias"}
    assert not list(parent.buffers())


def parents() -> dict[str, nn.Module]:
    parent = Parent(FrozenTeacher(network()))
    return {
        "alone": parent.teacher,
        "submodule": parent,
        "deeper": nn.Sequential(nn.Identity(), parent),
        "deep copy": copy.deepcopy(parent),
        "averaged": AveragedModel(parent),
    }


@pytest.mark.parametrize("where", parents())
def test_the_teacher_is_not_in_the_checkpoint_and_not_asked_for(where):
    module = parents()[where]
    state = module.state_dict()
    assert not any("teacher" in key or "conv" in key for key in state)
    module.load_state_dict(state, strict=True)


@pytest.mark.parametrize("key", ["bogus", "network.model.fc.weight", "model.fc.weight"])
@pytest.mark.parametrize("where", parents())
def test_a_checkpoint_with_teacher_tensors_is_refused(where, key):
    module = parents()[where]
    prefix = {"alone": "", "deeper": "1.teacher.", "averaged": "module.teacher."}.get(where, "teacher.")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict({**module.state_dict(), prefix + key: torch.ones(5, 96)}, strict=True)


def test_a_missing_student_tensor_is_still_refused():
    parent = Parent(FrozenTeacher(network()))
    state = parent.state_dict()
    del state["student.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        parent.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_sees_the_same_and_is_frozen_too(copied):
    teacher = FrozenTeacher(network())
    other = copied(Parent(teacher)).train().teacher
    assert other.network is not teacher.network
    assert torch.equal(other(images()).logits, teacher(images()).logits)
    assert other.fingerprint == teacher.fingerprint


def test_a_dtype_of_its_own_holds_outside_autocast_and_against_the_parents():
    parent = Parent(FrozenTeacher(network(), dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.float16):
        assert parent.teacher(images()).logits.dtype == torch.bfloat16
    parent.double()
    assert parent.student.weight.dtype == torch.float64
    assert parent.teacher(images()).logits.dtype == torch.bfloat16
    exact = FrozenTeacher(network(), dtype=torch.float32)
    before = snapshot(exact)
    Parent(exact).bfloat16().float()
    assert all(torch.equal(tensor, before[key]) for key, tensor in snapshot(exact).items())


def test_without_a_dtype_it_follows_the_trainer():
    parent = Parent(FrozenTeacher(network()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert parent.teacher(images()).logits.dtype == torch.bfloat16
    parent.double()
    assert parent.teacher(images().double()).logits.dtype == torch.float64


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_moves_with_its_parent(dtype):
    parent = Parent(FrozenTeacher(network(), dtype=dtype)).to("meta")
    assert {tensor.device.type for tensor in parent.teacher.network.state_dict().values()} == {"meta"}
    assert parent.teacher.network.mean.device.type == "meta"


def test_the_fingerprint_is_of_the_weights_as_loaded():
    one, other = network(), network()
    assert FrozenTeacher(one).fingerprint == FrozenTeacher(other, dtype=torch.float16).fingerprint


@pytest.mark.parametrize("change", ["value", "shape", "dtype", "name"])
def test_the_fingerprint_changes_with_any_part_of_the_weights(change):
    def of(**tensors: torch.Tensor) -> str:
        module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
        nn.init.ones_(module[2].weight), nn.init.zeros_(module[2].bias)
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        wrapped = TorchModule(module)
        wrapped.build(5, SHAPE)
        return FrozenTeacher(wrapped).fingerprint

    others = {
        "value": {"more": torch.tensor([0.0, 1.0])},
        "shape": {"more": torch.zeros(1, 2)},
        "dtype": {"more": torch.zeros(2, dtype=torch.int32)},
        "name": {"else": torch.zeros(2)},
    }
    assert of(more=torch.zeros(2)) == of(more=torch.zeros(2))
    assert of(more=torch.zeros(2)) != of(**others[change])


def test_spec_and_name_are_the_networks():
    teacher = FrozenTeacher(network())
    assert teacher.spec == teacher.network.spec
    assert teacher.name == "test_resnet"
