"""Mixing of the batches of ranks: the pairs, shares and boxes of one process."""

from itertools import product

import pytest
import torch
from torch.utils.data import Dataset

from distill.data import Digits
from distill.data.mixing import Mixing, mix
from distill.data.samplers import ResumableLoader, ShuffledSampler
from distill.distributed import own_rows
from tests.golden import Q
from tests.two_ranks import RankPool

KINDS = [Mixing(mixup=1.0), Mixing(cutmix=1.0)]
SEEDS = range(8)


def batch_of(size):
    segments = torch.arange(size * 36).view(size, 6, 6)
    return {"image": Q([size, 3, 6, 6], 1), "label": torch.arange(size) % 5 - 1, "segments": segments}


def mixed_on_each(size, mixing):
    """All batches of `SEEDS`, of which each rank mixes its own rows."""
    whole = batch_of(size)
    return [mix({name: own_rows(value) for name, value in whole.items()}, 4, mixing, seed) for seed in SEEDS]


@pytest.mark.parametrize("mixing", KINDS, ids=["mixup", "cutmix"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_even_batches_are_mixed_without_the_other_ranks_as_one_process_mixes_the_whole(ranks, mixing):
    whole = batch_of(6 * ranks)
    for seed in SEEDS:
        expected = mix(whole, 4, mixing, seed)
        for rank in range(ranks):
            own = mix({name: value[rank::ranks] for name, value in whole.items()}, 4, mixing, seed)
            assert own.keys() == expected.keys()
            assert all(torch.equal(own[name], value[rank::ranks]) for name, value in expected.items())


@pytest.mark.slow
def test_two_ranks_mix_batches_of_any_size_as_one_process():
    pool = RankPool(timeout=240.0)  # its first call loads Lightning
    try:
        for size, mixing in product((16, 6, 2), KINDS):  # of 3 images each, and of 1, partners are on the other rank
            assert_dealt(mixed_on_each(size, mixing), pool.run(mixed_on_each, size, mixing))
    finally:
        pool.close()


def assert_dealt(expected, ranks):
    for number, whole in enumerate(expected):
        assert all(part[number].keys() == whole.keys() for part in ranks)
        for name, value in whole.items():
            dealt = torch.stack([part[number][name] for part in ranks], dim=1).flatten(0, 1)
            assert torch.equal(dealt, value), name


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_partners_are_half_a_batch_apart(size):
    batch = {"image": torch.eye(size)[:, :, None, None].expand(-1, -1, 4, 4), "label": torch.arange(size)}
    label = mix(batch, size, Mixing(mixup=1.0), seed=3)["label"]
    share = label.diagonal()
    if size == 1:
        assert share == 1
        return
    for row in range(size):
        partner = (row - size // 2) % size
        assert label[row, partner].item() == pytest.approx(1 - share[row].item())
        assert label[row].sum().item() == pytest.approx(1)


def test_a_pasted_box_brings_its_segments_and_its_share_of_the_label():
    batch = batch_of(6) | {"label": torch.arange(6)}
    for seed in SEEDS:
        mixed = mix(batch, 6, Mixing(cutmix=1.0), seed)
        for row in range(6):
            partner = (row - 3) % 6
            pasted = mixed["segments"][row] % 2 == 1
            source = torch.where(pasted, batch["segments"][partner], batch["segments"][row])
            assert torch.equal(mixed["segments"][row] // 2, source)
            expected = torch.where(pasted, batch["image"][partner], batch["image"][row])
            assert torch.equal(mixed["image"][row], expected)
            assert mixed["label"][row, partner].item() == pytest.approx(pasted.double().mean().item())


class Numbers(Dataset):
    """Data without images."""

    def __len__(self):
        return 40

    def __getitem__(self, key):
        return {"index": key[1]}


def seeds_of(loader, *epochs):
    seen = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        seen.append([batch["mixing_seed"] for batch in loader])
    return seen


def test_the_seed_of_a_batch_is_the_same_on_all_ranks_and_new_in_every_batch_and_run_seed():
    def seeds(ranks, rank, seed=0):
        sampler = ShuffledSampler(Numbers(), ranks, rank, seed=seed)
        loader = ResumableLoader(Numbers(), mixed=True, sampler=sampler, drop_last=True, batch_size=8 // ranks)
        return seeds_of(loader, 0, 1)

    alone = seeds(1, 0)
    assert seeds(2, 0) == seeds(2, 1) == alone
    assert len({*alone[0], *alone[1], *seeds(1, 0, seed=1)[0]}) == len(alone[0]) * 3


def test_a_loader_resumed_within_an_epoch_goes_on_with_its_seeds():
    def loader():
        sampler = ShuffledSampler(Numbers(), 1, 0, seed=0)
        return ResumableLoader(Numbers(), mixed=True, sampler=sampler, batch_size=8)

    whole, stopped, resumed = loader(), loader(), loader()
    expected = seeds_of(whole, 2)[0]
    stopped.sampler.set_epoch(2)
    batches = iter(stopped)
    assert next(batches)["mixing_seed"] == expected[0]
    resumed.load_state_dict(stopped.state_dict())
    assert seeds_of(resumed, 2)[0] == expected[1:]


def test_only_batches_to_be_mixed_carry_a_seed():
    plain, mixed = Digits(batch_size=4), Digits(batch_size=4, mixing=Mixing(mixup=1.0))
    assert "mixing_seed" not in next(iter(plain.train_dataloader()))
    batch = next(iter(mixed.train_dataloader()))
    expected = mix(batch, 10, mixed.mixing, batch["mixing_seed"])
    batch = mixed.on_after_batch_transfer(batch, 0)
    assert "mixing_seed" not in batch
    assert torch.equal(batch["image"], expected["image"])
