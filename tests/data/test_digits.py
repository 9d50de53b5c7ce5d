import pytest
import torch

from distill.data import Digits, Mixing
from distill.data.mixing import mix
from distill.data.samplers import EvaluationSampler
from distill.errors import UserError


def labels_of(samples):
    return torch.tensor([samples[position]["label"] for position in range(len(samples))])


def test_the_split_is_fixed_and_its_parts_are_disjoint():
    digits = Digits(augment=False)
    images = {split: digits.samples(split) for split in ("train", "val", "test")}
    assert {split: len(samples) for split, samples in images.items()} == {"train": 1078, "val": 270, "test": 449}
    seen = {
        split: {samples[position]["image"].numpy().tobytes() for position in range(len(samples))}
        for split, samples in images.items()
    }
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["val"]
    assert torch.equal(digits.samples("test")[7]["image"], Digits().samples("test")[7]["image"])


def test_the_split_is_stratified():
    counts = labels_of(Digits(augment=False).samples("test")).bincount(minlength=10)
    assert counts.min() >= 43
    assert counts.max() <= 46


def test_images_are_in_zero_to_one_with_three_equal_channels():
    image = Digits(image_size=24).samples("val")[0]["image"]
    assert image.shape == (3, 24, 24)
    assert image.min() >= 0
    assert image.max() <= 1
    assert torch.equal(image[0], image[2])


def test_only_the_asked_number_of_labels_a_class_is_kept():
    labels = labels_of(Digits(labels_per_class=5, augment=False).samples("train"))
    assert len(labels) == 1078
    assert (labels == -1).sum() == 1078 - 50
    assert labels[labels >= 0].bincount().tolist() == [5] * 10


def test_labeled_only_leaves_the_rest_out():
    labels = labels_of(Digits(labels_per_class=5, labeled_only=True, augment=False).samples("train"))
    assert labels.bincount().tolist() == [5] * 10


@pytest.mark.parametrize(("ranks", "expected"), [(1, 449), (2, 449), (4, 449)])
def test_each_test_image_counts_once_on_any_number_of_ranks(ranks, expected):
    samples = Digits().samples("test")
    dealt = [[samples[p]["index"] for p in EvaluationSampler(samples, ranks, rank)] for rank in range(ranks)]
    assert len({len(part) for part in dealt}) == 1, "the ranks have unequal numbers of batches"
    counted = sorted(index for part in dealt for index in part if index >= 0)
    assert counted == list(range(expected))


def test_more_than_there_is_in_a_batch_is_refused():
    with pytest.raises(UserError, match=r"data.batch_size is 2000, more than the 1078 training images"):
        Digits(batch_size=2000).setup("fit")


def test_mixing_blends_labels_as_it_blends_images():
    label = torch.arange(8)
    image = torch.nn.functional.one_hot(label, 8).float()[:, :, None, None].expand(8, 8, 16, 16)
    for mixing in (Mixing(mixup=1.0), Mixing(cutmix=1.0)):
        mixed = mix({"image": image, "label": label}, 8, mixing, seed=0)
        assert torch.allclose(mixed["image"].mean(dim=(2, 3)), mixed["label"], atol=1e-5)
        assert torch.allclose(mixed["label"].sum(1), torch.ones(8))
        assert (mixed["label"] > 0).sum(1).tolist() == [2] * 8, "each image is mixed with another"


def test_an_unlabeled_image_adds_no_label_mass():
    mixed = mix({"image": torch.rand(4, 3, 8, 8), "label": torch.full((4,), -1)}, 10, Mixing(mixup=1.0), 0)
    assert mixed["label"].abs().sum() == 0


def first_batch(data):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    return next(iter(loader))


def test_an_object_that_serves_two_runs_has_the_images_of_a_new_one(monkeypatch):
    used = Digits(batch_size=8)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    used.setup("fit")
    first_batch(used)
    used.load_state_dict({**used.state_dict(), "epoch": 0, "batches": 3})  # of a resumed run
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    used.setup("fit")
    again, fresh = first_batch(used), first_batch(Digits(batch_size=8))
    assert torch.equal(again["index"], fresh["index"])
    assert torch.equal(again["image"], fresh["image"])
