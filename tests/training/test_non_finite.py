import pytest
import torch

from distill.testing import no_waiting
from distill.training.non_finite import NonFiniteGuard, NonFiniteLossError


def test_finite_values_pass_without_a_wait(device):
    guard = NonFiniteGuard()
    values = {"kd": torch.tensor(1.0, device=device), "rkd": torch.tensor(0.0, device=device)}
    with no_waiting(device):
        guard.check(0, values)
    guard.flush()


def test_a_step_in_which_all_terms_have_weight_0_passes():
    guard = NonFiniteGuard()
    guard.check(0, {})
    guard.flush()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_term_and_the_step_are_named(bad, device):
    guard = NonFiniteGuard()
    values = {"kd": torch.tensor(1.0, device=device), "rkd": torch.tensor(bad, device=device)}
    with pytest.raises(NonFiniteLossError, match="at step 7: the term 'rkd' gave NaN"):
        check_and_flush(guard, values)


def check_and_flush(guard, values):
    guard.check(7, values)
    guard.flush()
