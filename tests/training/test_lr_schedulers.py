import pytest
import torch
from timm.scheduler import CosineLRScheduler

from distill.training.lr_schedulers import TimmScheduler


def optimizer():
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 0.1}, {"params": [torch.zeros(1)], "lr": 0.2}])


def test_it_equals_timms_own_scheduler_in_every_epoch():
    actual, expected = optimizer(), optimizer()
    scheduler = TimmScheduler(actual, "cosine", num_epochs=10, warmup_epochs=3, warmup_lr=1e-3, min_lr=1e-4)
    reference = CosineLRScheduler(expected, t_initial=10, lr_min=1e-4, warmup_t=3, warmup_lr_init=1e-3)
    for epoch in range(10):
        reference.step(epoch)
        assert [group["lr"] for group in actual.param_groups] == [group["lr"] for group in expected.param_groups]
        actual.step()
        scheduler.step()


@pytest.mark.parametrize("sched", ["cosine", "tanh", "step", "multistep", "poly"])
def test_it_resumes_from_a_saved_state(sched):
    first = optimizer()
    scheduler = TimmScheduler(first, sched, num_epochs=8, warmup_epochs=2, decay_epochs=3, decay_milestones=[3, 6])
    for _ in range(4):
        first.step()
        scheduler.step()
    state, weights = scheduler.state_dict(), first.state_dict()
    second = optimizer()
    resumed = TimmScheduler(second, sched, num_epochs=8, warmup_epochs=2, decay_epochs=3, decay_milestones=[3, 6])
    second.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(3):
        for stepped in (first, scheduler, second, resumed):
            stepped.step()
        assert [group["lr"] for group in first.param_groups] == [group["lr"] for group in second.param_groups]
