import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.functional import to_pil_image

from distill.data import CIFAR100, Digits, ExponentialTail, ImageData, ImageDataset, ImageFolder, ListedTail, StepTail
from distill.errors import UserError
from tests.data.test_cifar import write_cifar100


class Labels:
    """A source of empty images that tells its labels."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.zeros(1, 1, 1), self.labels[index]


@pytest.mark.parametrize(("imbalance", "total"), [(0.1, 19573), (0.02, 12608), (0.01, 10847)])
def test_cifar100s_long_tails_have_the_known_numbers_of_images(imbalance, total):
    counts = ExponentialTail(imbalance).counts([500] * 100)
    assert (counts[0], sum(counts), counts[-1]) == (500, total, round(500 * imbalance))


@given(st.lists(st.integers(30, 200), min_size=2, max_size=12), st.floats(0.05, 1))
def test_a_tail_falls_takes_what_there_is_and_ends_at_the_imbalance(available, imbalance):
    counts = ExponentialTail(imbalance).counts(available)
    assert counts == sorted(counts, reverse=True)
    assert all(0 < kept <= there for kept, there in zip(counts, available, strict=True))
    assert counts[-1] == pytest.approx(imbalance * counts[0], abs=1)


def test_without_imbalance_classes_are_as_large_as_the_smallest():
    assert ExponentialTail(1.0).counts([9, 7, 8]) == [7, 7, 7]


def test_a_step_makes_the_last_classes_rare():
    assert StepTail(0.1).counts([50] * 6) == [50, 50, 50, 5, 5, 5]
    assert StepTail(0.1, rare=0.2).counts([50] * 5) == [50, 50, 50, 50, 5]


@given(st.lists(st.integers(-1, 2), min_size=30, max_size=60))
def test_the_first_images_of_each_class_are_kept_in_order_and_unlabeled_ones_are_not(labels):
    source = Labels([0] * 4 + [1] * 4 + [2] * 4 + labels)
    tail = ExponentialTail(0.25)
    positions = tail.positions(source, 3)
    assert positions == sorted(set(positions))
    available = [source.labels.count(label) for label in range(3)]
    for label, count in enumerate(tail.counts(available)):
        own = [position for position, known in enumerate(source.labels) if known == label]
        assert [position for position in positions if source.labels[position] == label] == own[:count]
    assert -1 not in {source.labels[position] for position in positions}


def test_only_the_training_images_are_fewer_and_they_are_the_same_in_every_run():
    plain, tailed = Digits(augment=False), Digits(augment=False, longtail=ExponentialTail(0.02))
    loaders = [tailed.train_dataloader(), tailed.val_dataloader(), tailed.test_dataloader()]
    assert [len(loader.dataset) for loader in loaders] == [293, 270, 449]
    assert tailed.class_counts() == [106, 68, 44, 28, 18, 12, 7, 5, 3, 2]
    source, again = (
        loaders[0].dataset.source,
        Digits(longtail=ExponentialTail(0.02)).train_dataloader().dataset.source,
    )
    everything = plain.samples("train").source
    assert source.positions == again.positions
    assert [everything.labels[position] for position in source.positions] == source.labels
    assert torch.tensor(source.labels).bincount().tolist() == tailed.class_counts()
    for place in (0, 100, 292):
        image, label = source[place]
        assert torch.equal(image, everything[source.positions[place]][0]), "images and labels stay together"
        assert label == source.labels[place] == loaders[0].dataset[place]["label"]


def test_counts_are_of_labeled_images():
    assert Digits(labels_per_class=5).class_counts() == [5] * 10
    assert sum(Digits().class_counts()) == 1078


def test_cifar_can_be_long_tailed(tmp_path):
    data = CIFAR100(str(write_cifar100(tmp_path, train=400)), verify=False, longtail=StepTail(0.25))
    assert data.class_counts() == [4] * 50 + [1] * 50


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for name in ("n01", "n02"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                to_pil_image(torch.zeros(3, 8, 8)).save(tmp_path / split / name / f"{name}_{number}.JPEG")
    return tmp_path


def listed(folder, *lines):
    (folder / "list.txt").write_text("\n".join(lines))
    return ImageFolder(str(folder), num_workers=0, longtail=ListedTail(str(folder / "list.txt")))


def test_a_list_picks_files(folder):
    lines = ["train/n02/n02_3.JPEG 1", "train/n01/n01_2.JPEG 0", "train/n01/n01_0.JPEG 0", ""]
    data = listed(folder, *lines)
    assert data.class_counts() == [2, 1]
    source = data.train_dataloader().dataset.source
    names = [source.source.paths[position].rsplit("/", 1)[1] for position in source.positions]
    assert names == ["n01_0.JPEG", "n01_2.JPEG", "n02_3.JPEG"], "in the order of the folder"
    assert len(data.val_dataloader().dataset) == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["train/n01/n01_9.JPEG 0"], "lists n01/n01_9.JPEG with label 0, which is missing"),
        (["train/n01/n01_1.JPEG 1"], "lists n01/n01_1.JPEG with label 1, which has label 0 by its folder"),
        (["train/n01/n01_1.JPEG 7"], "with label 7, which has label 0 by its folder"),
        (["train/n01/n01_1.JPEG 0"], "leaves class 1, of 4 images, without a training image"),
        (["train/n01/n01_1.JPEG"], "line 1 of .* is not 'path label'"),
        ([], "leaves class 0, of 4 images, without a training image"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(folder, lines, message):
    with pytest.raises(UserError, match=message):
        listed(folder, *lines).setup("fit")


def test_a_list_is_for_folders_and_must_be_there(folder):
    with pytest.raises(UserError, match="data.longtail.file: 'nowhere.txt' does not exist"):
        ListedTail("nowhere.txt")
    (folder / "list.txt").write_text("")
    with pytest.raises(UserError, match="ListedTail selects image files, so it needs a data set of image files"):
        Digits(longtail=ListedTail(str(folder / "list.txt"))).setup("fit")


@pytest.mark.parametrize("tail", [ExponentialTail, StepTail])
@pytest.mark.parametrize("imbalance", [0.0, -0.5, 1.5, float("nan")])
def test_an_imbalance_outside_its_range_is_refused(tail, imbalance):
    with pytest.raises(UserError, match="imbalance must be (above 0|between 0 and 1), given"):
        tail(imbalance)


def test_other_arguments_outside_their_range_are_refused():
    with pytest.raises(UserError, match="rare must be between 0 and 1, given 2"):
        StepTail(rare=2)
    with pytest.raises(UserError, match="few must be at most many, 10, given 20"):
        ExponentialTail(many=10)
    with pytest.raises(UserError, match="data.labels_per_class 5 and data.longtail both set"):
        Digits(labels_per_class=5, longtail=ExponentialTail())


def test_a_class_left_without_an_image_is_refused():
    with pytest.raises(UserError, match=r"leaves class 7, of 107 images, without a training image \(3 of 10 classes\)"):
        Digits(longtail=ExponentialTail(0.001)).setup("fit")
    with pytest.raises(UserError, match="leaves class 1, of 0 images, without a training image"):
        ExponentialTail().positions(Labels([0, 2, 0]), 3)


def test_groups_are_by_the_thresholds():
    groups = ExponentialTail(many=100, few=20).groups([101, 100, 20, 19, 500])
    assert groups == {"many": [0, 4], "medium": [1, 2], "few": [3]}


class Untold(ImageData):
    num_classes = 2
    image_shape = (1, 1, 1)

    def samples(self, split):
        return ImageDataset([(torch.zeros(1, 1, 1), 0)] * 8, lambda image: image)


def test_a_source_that_does_not_tell_its_labels_is_refused_where_they_are_needed():
    Untold(batch_size=4).setup("fit")
    for needs in ({"longtail": ExponentialTail()}, {"class_balanced": True}):
        with pytest.raises(UserError, match="list has neither 'labels' nor 'targets'"):
            Untold(batch_size=4, **needs).setup("fit")


def test_class_balanced_batches_hold_every_class_equally_often():
    data = Digits(longtail=ExponentialTail(0.02), class_balanced=True, batch_size=40)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 7, "the epoch keeps its length"
    for batch in batches:
        assert batch["label"].bincount(minlength=10).tolist() == [4] * 10
    images = torch.cat([batch["image"][batch["label"] == 9] for batch in batches])
    assert len({image.numpy().tobytes() for image in images}) == len(images), "each repetition is augmented anew"


def test_class_balanced_sampling_needs_a_labeled_image_of_every_class():
    data = Untold(batch_size=4, class_balanced=True)
    data.samples = lambda split: ImageDataset(Labels([0] * 8), lambda image: image)
    with pytest.raises(UserError, match="data.class_balanced draws from every class, but class 1 has no labeled"):
        data.setup("fit")
    with pytest.raises(UserError, match="data.class_balanced repeats the images of rare classes by itself"):
        Digits(class_balanced=True, repetitions=3)
