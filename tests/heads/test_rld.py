from __future__ import annotations

import pytest
import torch

from distill.errors import UserError
from distill.features import Features
from distill.functional import rld
from distill.heads.rld import RLD
from distill.schedules import Linear, Progress
from tests.new_methods import CASES, assert_case, inputs


@pytest.mark.parametrize("name", ["rld", "rld_same_T", "rld_lskd"])
def test_value_and_gradient_are_the_golden_ones(name: str) -> None:
    case, params = inputs(name), CASES[name]["params"]
    same = params["T"] == params["T_scd"]
    head = RLD(params["alpha"], params["beta"], params["T"], None if same else params["T_scd"], params["standardise"])
    assert_case(name, head(Features(case["s"]), Features(case["t"]), {"label": case["y"]}), case.__getitem__)


def test_mean_runs_over_the_labeled_samples() -> None:
    case = inputs("rld")
    kept = torch.arange(8) != 2
    expected = rld(case["s"][kept], case["t"][kept], case["y"][kept]).mean()
    found = RLD()(Features(case["s"]), Features(case["t"]), {"label": case["y"].masked_fill(~kept, -1)})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_without_a_temperature_of_its_own_the_confidence_follows_the_others() -> None:
    case = inputs("rld")
    networks, batch = (Features(case["s"]), Features(case["t"])), {"label": case["y"]}
    head = RLD(temperature=Linear(2.0, 4.0), confidence_temperature=None)
    head.progress = Progress(step=5, steps=10)
    assert torch.equal(head(*networks, batch), RLD(temperature=3.0, confidence_temperature=3.0)(*networks, batch))


@pytest.mark.parametrize("name", ["temperature", "confidence_temperature"])
def test_temperatures_are_above_zero(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} must be above 0, given -1"):
        RLD(**{name: -1.0})  # type: ignore[arg-type]
