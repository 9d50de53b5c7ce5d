import pytest
import torch

from distill.data import Digits
from distill.data.samplers import ResumableLoader, ShuffledSampler
from distill.errors import UserError


def epochs(loader, *numbers):
    seen = []
    for number in numbers:
        loader.sampler.set_epoch(number)
        seen.append([batch["index"].tolist() for batch in loader])
    return seen


def test_the_order_changes_with_the_epoch_and_is_the_same_in_every_run():
    first, second = (epochs(Digits(batch_size=32).train_dataloader(), 0, 1) for _ in range(2))
    assert first == second
    assert first[0] != first[1]


def test_the_global_batches_hold_the_same_samples_on_any_number_of_ranks():
    samples = range(103)
    alone = [index for _, index in ShuffledSampler(samples, 1, 0, seed=5)]
    ranks = [[index for _, index in ShuffledSampler(samples, 2, rank, seed=5)] for rank in range(2)]
    for start in range(0, 51, 4):
        together = {index for part in ranks for index in part[start : start + 4]}
        assert together == set(alone[2 * start : min(2 * start + 8, 102)])


def test_an_image_is_augmented_alike_whatever_was_drawn_before_it():
    samples = Digits().samples("train")
    first = samples[(3, 17)]["image"]
    torch.manual_seed(123)
    _ = samples[(3, 18)], torch.rand(5)
    assert torch.equal(samples[(3, 17)]["image"], first)
    assert not torch.equal(samples[(4, 17)]["image"], first), "the next epoch augments it anew"


def test_augmentation_draws_nothing_from_the_global_stream():
    before = torch.get_rng_state()
    next(iter(Digits(batch_size=4).train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_change_nothing():
    alone, helped = (Digits(batch_size=64, num_workers=workers).train_dataloader() for workers in (0, 2))
    assert torch.equal(next(iter(alone))["image"], next(iter(helped))["image"])


def test_a_resumed_loader_goes_on_in_the_middle_of_the_epoch():
    whole = epochs(Digits(batch_size=64).train_dataloader(), 4, 5)
    loader = Digits(batch_size=64).train_dataloader()
    assert isinstance(loader, ResumableLoader)
    loader.sampler.set_epoch(4)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.state_dict()
    resumed = Digits(batch_size=64).train_dataloader()
    resumed.load_state_dict(state)
    assert epochs(resumed, 4, 5) == [whole[0][5:], whole[1]]


def test_a_loader_resumed_at_the_end_of_an_epoch_begins_the_next():
    whole = epochs(Digits(batch_size=64).train_dataloader(), 1)
    loader = Digits(batch_size=64).train_dataloader()
    epochs(loader, 0)
    resumed = Digits(batch_size=64).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert epochs(resumed, 1) == whole


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_repetitions_of_a_sample_follow_each_other_and_are_augmented_anew(ranks):
    samplers = [ShuffledSampler(range(103), ranks, rank, seed=5, repetitions=3) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(2)
    dealt = [list(sampler) for sampler in samplers]
    assert [len(part) for part in dealt] == [103 // ranks] * ranks, "the epoch keeps its length"
    together = [place for step in zip(*dealt, strict=True) for place in step]
    alone = ShuffledSampler(range(103), 1, 0, seed=5, repetitions=3)
    alone.set_epoch(2)
    assert together == list(alone)[: len(together)], "on any number of ranks"
    for first in range(0, len(together) - 2, 3):
        draws, indices = zip(*together[first : first + 3], strict=True)
        assert len(set(indices)) == 1
        assert draws == (6, 7, 8), "the third epoch's"


def test_no_two_epochs_share_a_draw():
    sampler = ShuffledSampler(range(30), 1, 0, seed=0, repetitions=2)
    places = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        places += list(sampler)
    assert len(set(places)) == len(places)


LABELS = [0] * 60 + [1] * 25 + [-1] * 10 + [2] * 8


def balanced(ranks=1, rank=0, epoch=0):
    sampler = ShuffledSampler(range(len(LABELS)), ranks, rank, seed=5, balanced=LABELS)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_balanced_draws_are_the_same_on_any_number_of_ranks(ranks):
    dealt = [balanced(ranks, rank, epoch=2) for rank in range(ranks)]
    assert [len(part) for part in dealt] == [len(LABELS) // ranks] * ranks
    together = [place for step in zip(*dealt, strict=True) for place in step]
    assert together == balanced(epoch=2)[: len(together)]


def test_balanced_draws_hold_every_class_equally_often_and_within_a_class_every_sample():
    labels = [LABELS[index] for _, index in balanced()]
    for first in range(0, len(labels) - 2, 3):
        assert sorted(labels[first : first + 3]) == [0, 1, 2], "one round after the other"
    for label in range(3):
        own = [index for _, index in balanced() if LABELS[index] == label]
        times = [own.count(index) for index in range(len(LABELS)) if LABELS[index] == label]
        assert max(times) - min(times) <= 1


def test_no_two_balanced_places_of_a_run_are_equal():
    places = [place for epoch in range(5) for place in balanced(epoch=epoch)]
    assert len(set(places)) == len(places)
    assert {index for _, index in places if LABELS[index] == 0} == set(range(60)), "epochs draw different samples"
    assert balanced(epoch=1) == balanced(epoch=1)
    assert balanced(epoch=1) != balanced(epoch=2)


@pytest.mark.parametrize("settings", [{}, {"repetitions": 3}, {"balanced": LABELS}])
@pytest.mark.parametrize("draws", [1, 3, 7])
def test_fixed_draws_are_the_usual_ones_modulo_their_number(draws, settings):
    if settings.get("repetitions", 1) > draws:
        pytest.skip("refused by the data module")
    for ranks in (1, 2):
        for rank in range(ranks):
            usual, fixed = (
                ShuffledSampler(range(len(LABELS)), ranks, rank, seed=5, draws=number, **settings)
                for number in (None, draws)
            )
            for epoch in range(6):
                usual.set_epoch(epoch)
                fixed.set_epoch(epoch)
                expected = [(draw % draws, index) for draw, index in usual]
                assert list(fixed) == expected
                fixed.start = 5
                assert list(fixed) == expected[5:], "resumed in the epoch"


def test_a_training_image_has_as_many_versions_as_draws():
    data = Digits(batch_size=1078, draws=2)
    versions = [{} for _ in range(3)]
    for epoch, seen in enumerate(versions):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        batch = next(iter(loader))
        assert set(batch["draw"].tolist()) == {epoch % 2}
        seen.update(zip(batch["index"].tolist(), batch["image"], strict=True))
    assert all(torch.equal(versions[0][index], versions[2][index]) for index in range(1078))
    assert not any(torch.equal(versions[0][index], versions[1][index]) for index in range(0, 1078, 50))


def test_more_repetitions_than_draws_are_refused():
    assert Digits(repetitions=3, draws=3).draws == 3
    with pytest.raises(UserError, match="data.repetitions is 4, more than the 3 data.draws.*: give 3 or less"):
        Digits(repetitions=4, draws=3)
    with pytest.raises(UserError, match="data.draws must be at least 1, given 0"):
        Digits(draws=0)
