from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.distiller import Distiller
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import dkd, kd, standardize
from distill.heads import CTKD, DIST, DKD, KD, MLKD, RLD, CurriculumTemperature, Head, RunInfo
from distill.objective import Objective, Term
from distill.schedules import Constant, Cosine, Progress, Schedule
from tests.golden import Q
from tests.new_methods import CASES, assert_case, inputs


def at(head: Head, epoch: float) -> Head:
    head.progress = Progress(epoch=epoch)
    return head


@pytest.mark.parametrize("name", ["ctkd", "ctkd_lskd"])
def test_value_and_gradients_are_the_golden_ones(name: str) -> None:
    case, params = inputs(name), CASES[name]["params"]
    head = CTKD(params["t_start"], params["t_end"], standardize=params["standardise"]).double()
    assert isinstance(head.temperature, CurriculumTemperature)
    theta = head.temperature.theta
    theta.data.copy_(case["theta"].squeeze())
    loss = at(head, params["epoch"])(Features(case["s"]), Features(case["t"]), {})
    assert_case(name, loss, {"s": case["s"], "theta": theta}.__getitem__)


def gradients(scale: float, standardized: bool = False) -> tuple[Tensor, Tensor]:
    """Of the student and of theta."""
    student = (2 * Q([8, 10], 1)).requires_grad_()
    head = CTKD(gradient_scale=scale, standardize=standardized).double()
    loss = head(Features(student), Features(3 * Q([8, 10], 2)), {})
    found: tuple[Tensor, Tensor] = torch.autograd.grad(loss, (student, *head.parameters()))
    return found


@pytest.mark.parametrize("standardized", [False, True])
def test_only_thetas_gradient_is_scaled_and_that_exactly(standardized: bool) -> None:
    student, theta = gradients(1.0, standardized)
    z = standardize if standardized else torch.clone
    temperature = torch.tensor(1 + 20 / (1 + math.exp(-1.0)), dtype=torch.float64, requires_grad=True)
    loss = kd(z(2 * Q([8, 10], 1)), z(3 * Q([8, 10], 2)), temperature).mean()
    (slope,) = torch.autograd.grad(loss, temperature)
    share = 1 / (1 + math.exp(-1.0))
    torch.testing.assert_close(theta, slope * 20 * share * (1 - share), rtol=1e-10, atol=0)
    for scale in (0.0, -0.3, -1.0):
        again, scaled = gradients(scale, standardized)
        assert torch.equal(again, student)
        torch.testing.assert_close(scaled, scale * theta, rtol=1e-12, atol=0)


def test_the_ramp_is_the_public_codes() -> None:
    head = CTKD()
    assert isinstance(head.temperature, CurriculumTemperature)
    assert isinstance(scale := head.temperature.gradient_scale, Schedule)
    expected = [(math.cos(math.pi * min(epoch, 10) / 10) + 1) / 2 - 1 for epoch in range(13)]
    assert [scale(Progress(epoch=epoch)) for epoch in range(13)] == pytest.approx(expected, abs=1e-12)
    assert expected[3] == pytest.approx(CASES["ctkd"]["params"]["lambda"])


def test_a_step_of_the_optimizer_climbs_with_theta_and_descends_with_the_student() -> None:
    teacher, student = Features(3 * Q([8, 10], 2)), (2 * Q([8, 10], 1)).requires_grad_()
    head = at(CTKD().double(), epoch=10.0)

    def loss() -> Tensor:
        value: Tensor = head(Features(student), teacher, {})
        return value

    before = loss()
    before.backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(head.parameters(), lr=1e-3).step()
    climbed = loss()
    torch.optim.SGD([student], lr=1e-3).step()
    assert before < climbed
    assert loss() < climbed


BATCH = {"label": (3 * torch.arange(8) + 1) % 10}


@pytest.mark.parametrize("kind", [KD, DKD, DIST, RLD, MLKD])
def test_any_softened_loss_can_learn_its_temperature(kind: type[KD | DKD | DIST | RLD | MLKD]) -> None:
    student, teacher = Features(2 * Q([8, 10], 1)), Features(3 * Q([8, 10], 2))
    head = kind(temperature=CurriculumTemperature(2.0, 6.0, gradient_scale=-1.0)).double()
    (theta,) = head.parameters()
    loss = head(student, teacher, BATCH)
    (gradient,) = torch.autograd.grad(loss, theta)
    now = 2 + 6 / (1 + math.exp(-1.0))
    assert head.diagnostics()["temperature"].item() == pytest.approx(now)
    torch.testing.assert_close(loss, kind(temperature=now)(student, teacher, BATCH), rtol=1e-12, atol=0)
    with torch.no_grad():
        theta += 1e-5
        above = head(student, teacher, BATCH)
        theta -= 2e-5
        below = head(student, teacher, BATCH)
    assert gradient.item() == pytest.approx(-(above - below).item() / 2e-5, rel=1e-5)


def test_on_dkd_only_the_temperature_is_replaced() -> None:
    student, teacher = 2 * Q([8, 10], 1), 3 * Q([8, 10], 2)
    head = DKD(temperature=CurriculumTemperature()).double()
    expected = dkd(student, teacher, BATCH["label"], temperature=1 + 20 / (1 + math.exp(-1.0))).mean()
    torch.testing.assert_close(head(Features(student), Features(teacher), BATCH), expected, rtol=1e-12, atol=0)


def test_it_is_trained_stored_and_logged_with_the_objective() -> None:
    classes = FeatureSpec(logits=(10,))
    objective = Objective({"ctkd": Term(CTKD(), 0.9)}, classes, classes)
    distiller = Distiller(torch.nn.Identity(), None, objective)  # type: ignore[arg-type]
    assert [name for name, _ in distiller.named_parameters()] == ["objective.heads.ctkd.temperature.theta"]
    assert "heads.ctkd.temperature.theta" in objective.state_dict()
    losses = objective(Features(Q([4, 10], 1)), Features(Q([4, 10], 2)), {}, Progress())
    assert losses.diagnostics["ctkd"]["temperature"].item() == pytest.approx(15.62, abs=0.01)
    assert KD().diagnostics() == {}


def test_numbers_out_of_range_are_refused() -> None:
    for name, value in {"start": 0.0, "span": -1.0}.items():
        with pytest.raises(UserError, match=f"{name} must be above 0, given"):
            CTKD(**{name: value})
    for name in ("start", "theta", "gradient_scale"):
        with pytest.raises(UserError, match=f"{name} must be finite"):
            CTKD(**{name: math.inf})


class Broken(Constant):
    def __call__(self, progress: Progress) -> float:
        return math.nan


@pytest.mark.parametrize(
    ("schedule", "message"),
    [(Broken(1.0), "Broken gives nan at step 0"), (Cosine(0, -1), "Cosine over a run without an end needs")],
)
@pytest.mark.parametrize(
    ("make", "key"), [(CTKD, "gradient_scale"), (CurriculumTemperature, r"temperature\.gradient_scale")]
)
def test_a_scale_that_does_not_fit_the_run_is_refused_with_its_key(
    schedule: Schedule, message: str, make: type[CTKD | CurriculumTemperature], key: str
) -> None:
    made, classes = make(gradient_scale=schedule), FeatureSpec(logits=(10,))
    objective = Objective({"a": Term(made if isinstance(made, CTKD) else DIST(temperature=made))}, classes, classes)
    with pytest.raises(UserError, match=rf"^model\.heads\.a\.head: {key}: {message}"):
        objective.prepare(RunInfo())
