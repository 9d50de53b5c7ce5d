from __future__ import annotations

import pytest

from distill.errors import UserError, did_you_mean


def test_a_user_error_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)


def test_at_prepends_the_configuration_key() -> None:
    error = UserError("temperature must be above 0, given -1").at("model.heads.kd")
    assert isinstance(error, UserError)
    assert str(error) == "model.heads.kd: temperature must be above 0, given -1"


@pytest.mark.parametrize(
    ("given", "known", "expected"),
    [
        ("layr4", ["layer1", "layer4", "fc"], "did you mean 'layer4' or 'layer1'?"),
        ("rkd", ["KD", "RKD"], "did you mean 'RKD'?"),
        ("Kd", ["DKD", "KD", "RKD"], "did you mean 'KD'?"),
        ("resnet18", ["ResNet34"], "did you mean 'ResNet34'?"),
        ("block", ["stages.0.blocks", "head"], "did you mean 'stages.0.blocks'?"),
        ("x", ["layer1", "fc"], "known are 'fc' and 'layer1'"),
        ("x", ["only"], "known is 'only'"),
        ("x", [], "none is known"),
    ],
)
def test_did_you_mean_suggests_close_matches_or_lists_known_names(given: str, known: list[str], expected: str) -> None:
    assert did_you_mean(given, known) == expected


def test_did_you_mean_counts_the_names_beyond_its_limit() -> None:
    names = [f"name{i}" for i in range(5)]
    assert did_you_mean("?", names, limit=3) == "known are 'name0', 'name1', 'name2' and 2 more"
