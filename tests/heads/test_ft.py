from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.__main__ import main
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import factor_transfer
from distill.heads.ft import FT
from distill.heads.parts.adapters import GlobalBatchNorm2d
from distill.schedules import Progress
from distill.testing import check_head
from tests.golden import Q, assert_relative
from tests.program import TEACHER as TEACHER_ARGUMENTS
from tests.program import TINY
from tests.stages import curves, every_step, moved, weights_by_step
from tests.two_ranks import RankPool

STUDENT, TEACHER = Features(maps={"layer": Q([4, 5, 8, 8], 6)}), Features(maps={"layer": Q([4, 7, 8, 8], 8)})

HEADS = "distiller.objective.heads"


def built(initialization: float | None = None, share: float = 0.5, batch_norm: bool = True) -> FT:
    torch.manual_seed(0)
    head = FT("layer", share, initialization, batch_norm)
    head.build(FeatureSpec.of(STUDENT), FeatureSpec.of(TEACHER))
    return head.double()


def gradients(head: FT, epoch: float = 0.0) -> dict[str, Tensor]:
    """The gradient of the student's map and of all of the head's parameters that learn; each must have one."""
    student = STUDENT.apply(lambda tensor: tensor.clone().requires_grad_())
    head.progress = Progress(epoch=epoch)
    learning = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(head(student, TEACHER, {}), [student["layer"], *learning.values()])
    return dict(zip(["student", *learning], found, strict=True))


def with_gradient(found: dict[str, Tensor]) -> set[str]:
    return {name.split(".")[0] for name, gradient in found.items() if gradient.any()}


def literal(x: Tensor, stack: nn.Module) -> Tensor:
    """Three convolutions, each followed by a leaky ReLU, and before it by batch normalization if the stack has any."""
    convolutions = [layer for layer in stack.modules() if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in stack.modules() if isinstance(layer, GlobalBatchNorm2d)]
    assert len(convolutions) == 3
    for layer, norm in zip(convolutions, norms or [None] * 3, strict=True):
        x = F.conv2d(x, layer.weight, layer.bias, padding=1)
        if norm is not None:
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            x = (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
        x = torch.where(x > 0, x, 0.1 * x)
    return x


def test_value_and_gradient_of_bare_maps_are_the_golden_ones() -> None:
    head, student = built(0), STUDENT["layer"].clone().requires_grad_()
    head.translators, head.paraphrasers = nn.ModuleList([nn.Identity()]), nn.ModuleList([nn.Identity()])
    assert_relative("ft", head(Features(maps={"layer": student}), TEACHER, {}), student)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_as_in_the_public_code_the_translator_alone_normalizes_before_each_leaky_relu(batch_norm: bool) -> None:
    head = built(batch_norm=batch_norm)
    norms = {name.split(".")[0] for name, layer in head.named_modules() if isinstance(layer, GlobalBatchNorm2d)}
    assert norms == ({"translators"} if batch_norm else set())
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(head.named_parameters()):
            if name.startswith("translators"):  # weights and biases of the norms, too
                parameter.copy_(
                    0.5 + Q([*parameter.shape], seed) if parameter.ndim == 3 else Q([*parameter.shape], seed)
                )
    assert len(norms) == 0 or literal(STUDENT["layer"], head.translators[0]).std() > 0.1
    factors = literal(STUDENT["layer"], head.translators[0]), literal(TEACHER["layer"], head.encoders[0])
    assert factors[0].shape == factors[1].shape == (4, 3, 8, 8)
    error = (literal(factors[1], head.decoders[0]) - TEACHER["layer"]).square().mean()
    loss, parts = head(STUDENT, TEACHER, {}), head.diagnostics()
    torch.testing.assert_close(loss, factor_transfer(*factors) + error)
    torch.testing.assert_close(parts["factors"], factor_transfer(*factors).detach())
    torch.testing.assert_close(parts["reconstruction"], error.detach())


def test_in_the_initialization_the_autoencoder_alone_learns_and_all_take_part() -> None:
    head = built(initialization=2)
    assert with_gradient(gradients(head, epoch=1.99)) == {"encoders", "decoders"}
    assert with_gradient(gradients(head, epoch=2.0)) == {"student", "translators"}
    assert with_gradient(gradients(built(), epoch=9.0)) == {"student", "translators", "encoders", "decoders"}


def test_the_paraphraser_is_frozen_as_it_was_in_the_last_step_of_the_initialization() -> None:
    head = built(initialization=1)
    gradients(head, epoch=0.5)
    kept = [parameter.clone() for parameter in head.encoders.parameters()]
    with torch.no_grad():
        for parameter in head.encoders.parameters():
            parameter.add_(1.0)  # as an optimizer, weight decay or momentum would
    gradients(head, epoch=1.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, head.paraphrasers.parameters(), strict=True))
    gradients(head, epoch=0.9)
    assert all(torch.equal(a + 1, b) for a, b in zip(kept, head.paraphrasers.parameters(), strict=True))


def test_an_evaluation_in_the_initialization_does_not_touch_the_paraphraser_and_is_of_that_stage() -> None:
    head = built(initialization=1)
    gradients(head, epoch=0.5)
    kept = [parameter.clone() for parameter in head.paraphrasers.parameters()]
    with torch.no_grad():
        for parameter in head.encoders.parameters():
            parameter.add_(1.0)
    gradients(head.eval(), epoch=0.5)
    assert all(torch.equal(a, b) for a, b in zip(kept, head.paraphrasers.parameters(), strict=True))
    assert [built(stage).is_scheduled for stage in (1, 0, None)] == [True, False, False]


def test_without_initialization_epochs_the_paraphraser_stays_at_random() -> None:
    found = gradients(built(0))
    assert set(found) == {"student", *(name for name in found if name.startswith("translators."))}


def test_as_in_the_public_code_the_decoder_begins_like_transposed_convolutions() -> None:
    torch.manual_seed(0)
    head = FT("layer")
    head.build(FeatureSpec(maps={"layer": (20, 4, 4)}), FeatureSpec(maps={"layer": (64, 4, 4)}))
    for layers, kind in (
        (head.encoders, nn.Conv2d),
        (head.decoders, nn.ConvTranspose2d),
        (head.translators, nn.Conv2d),
    ):
        for layer in layers.modules():
            if isinstance(layer, nn.Conv2d):
                expected = kind(layer.in_channels, layer.out_channels, 3).weight
                assert layer.weight.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.01)
                assert layer.weight.std().item() == pytest.approx(expected.std().item(), rel=0.05)


@pytest.mark.parametrize("initialization", [0.0, None])
def test_both_ways_without_a_stage_keep_the_contract(initialization: float | None, pool: RankPool) -> None:
    make = partial(FT, ("low", "high"), initialization=initialization)
    check_head(make, run=pool.run, exact_gradient={"initialization": 0.0})


def test_without_batch_norm_it_keeps_the_contract(pool: RankPool) -> None:
    check_head(partial(FT, batch_norm=False), run=pool.run, exact_gradient={"initialization": 0.0})


def test_a_head_restored_between_the_stages_goes_on_alike() -> None:
    head, restored = built(initialization=1), built(initialization=1, share=0.5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(1.5)
    gradients(head, epoch=0.9)
    restored.load_state_dict(head.state_dict())
    for name, gradient in gradients(head, epoch=1.0).items():
        assert torch.equal(gradient, gradients(restored, epoch=1.0)[name])


@pytest.mark.parametrize(("share", "width"), [(0.5, 3), (1.0, 7), (0.01, 1), (2.0, 14)])
def test_factors_have_their_share_of_the_teachers_channels(share: float, width: int) -> None:
    head = built(share=share)
    assert (
        head.translators[0](STUDENT["layer"]).shape == head.paraphrasers[0](TEACHER["layer"]).shape == (4, width, 8, 8)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.0}, "share must be above 0, given 0.0"),
        ({"initialization": -1.0}, "initialization must be at least 0, given -1.0"),
    ],
)
def test_an_argument_out_of_its_range_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FT(**arguments)  # type: ignore[arg-type]


def test_a_run_trains_the_autoencoder_first_and_the_student_then(tmp_path: Path) -> None:
    arguments = [
        *("--model.student.taps={mid: layer2}", "--model.teacher.taps={mid: blocks.1}"),
        *("--model.heads.ft.head=FT", "--model.heads.ft.head.of=mid", "--model.heads.ft.head.initialization=1"),
        *("--model.heads.ft.weight=Step", "--model.heads.ft.weight.milestones=[1]"),
        "--model.heads.ft.weight.factor=200",
        *("--model.task.weight=After", "--model.task.weight.epochs=1"),
        *("--model.optimizer.momentum=0.9", "--model.optimizer.weight_decay=0.1"),
    ]
    assert main(["fit", *TINY, *TEACHER_ARGUMENTS, *arguments, *every_step(tmp_path)]) == 0
    rows, weights = curves(tmp_path), weights_by_step(tmp_path)
    assert [(row["train/ft_weight"], row["train/task_weight"]) for row in rows] == [(1, 0), (1, 0), (200, 1), (200, 1)]
    for row, part in zip(rows, ["reconstruction"] * 2 + ["factors"] * 2, strict=True):
        assert row["train/ft"] == row[f"train/ft/{part}"] > 0

    def coder(step: int, name: str) -> list[Tensor]:
        return [tensor for key, tensor in weights[step].items() if key.startswith(f"{HEADS}.ft.{name}.")]

    assert all(torch.equal(*pair) for pair in zip(coder(1, "encoders"), coder(2, "paraphrasers"), strict=True))
    first, second = moved(weights[1], weights[2]), moved(weights[2], weights[4])
    assert f"{HEADS}.ft.encoders.0.0.weight" in first
    assert f"{HEADS}.ft.paraphrasers.0.0.weight" in first
    assert {
        f"{HEADS}.ft.translators.0.0.0.weight",
        "distiller.student.model.layer2.0.conv1.weight",
    } <= second
    assert not {name for name in second if "paraphrasers" in name}
