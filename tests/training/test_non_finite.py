import pytest
import torch

from distill.training.non_finite import NonFiniteGuard, NonFiniteLossError


def test_finite_values_pass():
    guard = NonFiniteGuard()
    guard.check(0, {"kd": torch.tensor(1.0), "rkd": torch.tensor(0.0)})
    guard.flush()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_term_and_the_step_are_named(bad):
    with pytest.raises(NonFiniteLossError, match="at step 7: the term 'rkd' gave NaN"):
        NonFiniteGuard().check(7, {"kd": torch.tensor(1.0), "rkd": torch.tensor(bad)})
