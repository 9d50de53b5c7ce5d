"""`overfit_batches` repeats the first batches, with any number of processes, and also in a resumed run."""

import pytest
import torch
from lightning.pytorch import Callback

from distill.cli.program import run
from distill.data import Digits
from distill.data.samplers import FixedSampler, ResumableLoader, ShuffledSampler
from tests.program import TINY

FIT = [word for word in TINY if "limit_" not in word and "max_epochs" not in word]


class Seen(Callback):
    """Notes the images of all batches, by epoch."""

    epochs: dict[int, list[torch.Tensor]]
    validated: dict[int, list[list[int]]]

    def __init__(self):
        Seen.epochs, Seen.validated = {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        Seen.epochs.setdefault(trainer.current_epoch, []).append(batch["image"])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            Seen.validated.setdefault(trainer.current_epoch, []).append(batch["index"].tolist())


def fit(tmp_path, *args):
    callback = "--trainer.callbacks+=tests.data.test_overfit.Seen"
    run(["fit", *FIT, "--trainer.overfit_batches=3", f"--trainer.default_root_dir={tmp_path / 'run'}", callback, *args])
    return dict(Seen.epochs)


def test_all_epochs_are_the_first_one(tmp_path):
    epochs = fit(tmp_path, "--trainer.max_epochs=3")
    assert [len(batches) for batches in epochs.values()] == [3, 3, 3]
    for batches in epochs.values():
        assert torch.equal(torch.stack(batches), torch.stack(epochs[0])), "also in augmentation"
    usual = iter(Digits(batch_size=16).train_dataloader())
    assert torch.equal(torch.stack([next(usual)["image"] for _ in range(3)]), torch.stack(epochs[0]))
    assert set(map(str, Seen.validated.values())) == {str([list(range(n, n + 16)) for n in (0, 16, 32)])}


@pytest.mark.slow
def test_a_resumed_run_goes_on_where_it_stopped(tmp_path):
    whole = fit(tmp_path / "whole", "--trainer.max_epochs=2")
    fit(tmp_path, "--trainer.max_epochs=2", "--trainer.max_steps=4")
    rest = fit(tmp_path, "--trainer.max_epochs=2", "--resume")
    assert torch.equal(torch.stack(rest[1]), torch.stack(whole[1][1:]))


def test_a_fixed_sampler_deals_the_first_epoch_in_every_epoch_on_any_number_of_ranks():
    def dealt(kind, ranks, rank, epoch, **settings):
        sampler = kind(range(40), ranks, rank, seed=5, **settings)
        sampler.set_epoch(epoch)
        return list(sampler)

    for settings in ({}, {"repetitions": 3}, {"balanced": [0] * 30 + [1] * 10}):
        for ranks in (1, 2):
            for rank in range(ranks):
                first = dealt(ShuffledSampler, ranks, rank, 0, **settings)
                assert [dealt(FixedSampler, ranks, rank, epoch, **settings) for epoch in range(3)] == [first] * 3


def test_a_loader_over_a_fixed_sampler_resumes_within_and_after_an_epoch():
    samples = Digits(augment=False).samples("train")

    def loader(epoch, state):
        loader = ResumableLoader(samples, sampler=FixedSampler(samples, 1, 0, seed=0), batch_size=256, drop_last=True)
        loader.sampler.set_epoch(epoch)
        loader.load_state_dict(state)
        return [batch["index"].tolist() for batch in loader]

    whole = loader(0, {})
    assert loader(2, {"epoch": 2, "batches": 3}) == whole[3:]
    assert loader(3, {"epoch": 2, "batches": 4}) == whole
