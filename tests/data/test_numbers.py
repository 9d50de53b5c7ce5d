"""Numbers of the data that make no sense are refused before step 0, by their key."""

import math

import pytest

from distill.data import CIFAR100, Digits, ImageFolder, Mixing, StepTail, TimmAugmentation
from distill.errors import UserError
from tests.data.test_cifar import write_cifar100

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: Digits(batch_size=0), "data.batch_size must be at least 1, given 0"),
        (lambda root: Digits(batch_size=-4), "data.batch_size must be at least 1, given -4"),
        (lambda root: Digits(num_workers=-1), "data.num_workers must be at least 0, given -1"),
        (lambda root: Digits(repetitions=0), "data.repetitions must be at least 1, given 0"),
        (lambda root: Digits(image_size=0), "data.image_size must be at least 1, given 0"),
        (lambda root: ImageFolder(str(root), image_size=-8), "data.image_size must be at least 1, given -8"),
        (lambda root: Digits(labels_per_class=0), "data.labels_per_class must be at least 1, given 0"),
        (
            lambda root: Digits(labels_per_class=105).setup("fit"),
            "data.labels_per_class is 105, more than the 104 training images of class 8: give 104 or less",
        ),
        (
            lambda root: CIFAR100(str(write_cifar100(root)), verify=False, held_out=200).setup("fit"),
            "data.held_out is 200, 2 of each class, which leaves none of 2 to train with: give 100 or less",
        ),
        (lambda root: Mixing(mixup=NAN), "data.mixing.mixup must be at least 0, given nan"),
        (lambda root: Mixing(cutmix=INF), "data.mixing.cutmix must be finite, given inf"),
        (lambda root: TimmAugmentation(color_jitter=-0.1), "color_jitter must be at least 0, given -0.1"),
        (lambda root: TimmAugmentation(color_jitter=INF), "color_jitter must be finite, given inf"),
        (lambda root: TimmAugmentation(erasing=NAN), "erasing must be between 0 and 1, given nan"),
        (lambda root: StepTail(many=-1, few=-2), "many must be at least 0, given -1"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(make, message, tmp_path):
    with pytest.raises(UserError) as caught:
        make(tmp_path)
    assert str(caught.value).startswith(message)


def test_all_labels_there_are_may_be_kept():
    assert Digits(labels_per_class=104).class_counts() == [104] * 10


@pytest.mark.parametrize(("ranks", "fitting"), [(1, 1078), (4, 269)])
def test_a_batch_may_hold_all_images_of_a_process(ranks, fitting, monkeypatch):
    monkeypatch.setattr(Digits, "_ranks", lambda data: (ranks, 0))
    Digits(batch_size=fitting).setup("fit")
    assert len(Digits(batch_size=fitting).train_dataloader()) == 1
    with pytest.raises(
        UserError, match=rf"{fitting} training images( of each of 4 processes)?: give {fitting} or less"
    ):
        Digits(batch_size=fitting + 1).setup("fit")
