"""Whatever a loader yields becomes the batch dict, or is refused in one sentence."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.data import as_batch
from distill.errors import UserError

IMAGE = torch.rand(4, 3, 8, 8)
LABEL = torch.tensor([0, 2, -1, 1])
INDEX = torch.tensor([7, 5, 6, 4])
SOFT = torch.rand(4, 5)

Pair = namedtuple("Pair", ["image", "label"])
Plain = namedtuple("Plain", ["x", "y"])


@dataclass
class Record:
    image: torch.Tensor
    label: torch.Tensor


@pytest.mark.parametrize(
    "raw",
    [
        {"image": IMAGE, "label": LABEL},
        {"pixel_values": IMAGE, "labels": LABEL},
        UserDict(pixel_values=IMAGE, labels=LABEL),
        (IMAGE, LABEL),
        [IMAGE, LABEL],
        Pair(IMAGE, LABEL),
        Plain(IMAGE, LABEL),
        Record(IMAGE, LABEL),
        (IMAGE, LABEL.int()),
        (IMAGE, LABEL.tolist()),
        (IMAGE, LABEL.numpy()),
        (IMAGE, LABEL.unsqueeze(1)),
    ],
    ids=lambda raw: type(raw).__name__,
)
def test_images_with_labels_become_one_dict_however_they_come(raw):
    batch = as_batch(raw)
    assert set(batch) == {"image", "label"}
    assert batch["image"] is IMAGE
    assert batch["label"].dtype == torch.int64
    assert torch.equal(batch["label"], LABEL)


@pytest.mark.parametrize(
    "raw", [IMAGE, (IMAGE,), [IMAGE], {"image": IMAGE}, (IMAGE, None), {"image": IMAGE, "label": None}]
)
def test_missing_entries_stay_missing(raw):
    assert set(as_batch(raw)) == {"image"}


def test_an_index_is_the_third_of_a_tuple():
    batch = as_batch((IMAGE, LABEL, INDEX.int()))
    assert torch.equal(batch["index"], INDEX)
    assert batch["index"].dtype == torch.int64


def test_soft_labels_and_further_entries_are_kept_as_they_are():
    raw = {"image": IMAGE, "label": SOFT, "segments": LABEL, "path": ["a", "b", "c", "d"], "mixing_seed": 3}
    batch = as_batch(raw)
    assert batch == raw
    assert batch is not raw, "a loader's own dict is not changed"


@pytest.mark.parametrize(
    ("raw", "names", "keys"),
    [
        ({"x": IMAGE, "y": LABEL}, {"image": "x", "label": "y"}, {"image", "label"}),
        ({"left": IMAGE, "right": IMAGE, "id": INDEX}, {"image": "right", "index": "id"}, {"image", "index", "left"}),
        ((INDEX, IMAGE, LABEL), {"index": 0, "image": 1, "label": 2}, {"image", "label", "index"}),
        ((IMAGE, LABEL, ["a", "b", "c", "d"]), {"image": 0, "label": 1}, {"image", "label"}),
        ((IMAGE, IMAGE), {"image": 1}, {"image"}),
        (Plain(LABEL, IMAGE), {"image": "y", "label": "x"}, {"image", "label"}),
        (Plain(LABEL, IMAGE), {"image": -1, "label": 0}, {"image", "label"}),
    ],
)
def test_entries_with_other_names_or_places_are_found_under_them(raw, names, keys):
    batch = as_batch(raw, names)
    assert set(batch) == keys
    assert torch.equal(batch["image"], IMAGE)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ((IMAGE, IMAGE), "give several views of the images in one image, view after view"),
        ((IMAGE, IMAGE, LABEL), "several views"),
        (([IMAGE, IMAGE], LABEL), "several views"),
        ({"image": [IMAGE, IMAGE]}, "several views"),
        ({"a": IMAGE, "b": IMAGE}, "no images in a dict of a: float32 [4, 3, 8, 8], b: float32 [4, 3, 8, 8]: name"),
        ((255 * IMAGE).byte(), "image must be float in [0, 1], given uint8 [4, 3, 8, 8]: scale them"),
        ({"image": IMAGE[0]}, "image must be a tensor [B, C, H, W], given a tensor float32 [3, 8, 8]"),
        (IMAGE[0], "no images in a tensor float32 [3, 8, 8]"),
        ({"image": IMAGE.unsqueeze(1)}, "given a tensor float32 [4, 1, 3, 8, 8]"),
        ((LABEL, IMAGE), "neither (image), (image, label) nor (image, label, index): name the places in model.batch"),
        ((IMAGE, LABEL, INDEX, INDEX), "model.batch, such as {image: 0}"),
        (
            (IMAGE, ["a", "b", "c", "d"]),
            "label must be numbers, one for each image, given a list of str, str, str, str",
        ),
        ((IMAGE, LABEL, ["a", "b", "c", "d"]), "index must be numbers"),
        ((IMAGE, LABEL, SOFT), "index must be each image's place in the data set, integers [B], given float32 [4, 5]"),
        (
            (IMAGE, LABEL.float()),
            "label must be classes, integers [B], or soft labels, floats [B, K], given float32 [4]",
        ),
        ((IMAGE, LABEL.expand(2, 4).T), "given int64 [4, 2]"),
        ((IMAGE, LABEL[:3]), "label has the shape [3], but image [4, 3, 8, 8]: give one for each image"),
        ((), "no images in a tuple of nothing"),
        ("images", "no images in a str"),
        ([numpy.zeros(3)], "no images in a list of ndarray"),
        ({}, "no images in a dict of nothing"),
    ],
)
def test_what_is_no_batch_of_images_is_refused_with_what_came(raw, sentence):
    with pytest.raises(UserError) as error:
        as_batch(raw)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "names", "sentence"),
    [
        ({"x": IMAGE}, {"image": "z"}, "model.batch: image is to be 'z', but the data yield a dict of x"),
        ((IMAGE,), {"image": "z"}, "model.batch: image is to be 'z', but the data yield a tuple of float32"),
        ((IMAGE,), {"image": 1}, "give a place from 0 to 0"),
    ],
)
def test_a_name_that_the_data_do_not_have_is_refused(raw, names, sentence):
    with pytest.raises(UserError, match="model.batch") as error:
        as_batch(raw, names)
    assert sentence in str(error.value)


LEAVES = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.text(max_size=3),
    st.lists(st.integers(0, 5), max_size=4),
    st.lists(st.integers(1, 4), max_size=5).map(lambda shape: torch.zeros(shape)),
    st.lists(st.integers(1, 4), max_size=5).map(lambda shape: torch.zeros(shape, dtype=torch.uint8)),
)


@given(
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
            st.dictionaries(st.sampled_from(["image", "label", "index", "labels", "pixel_values", "x"]), inner),
        ),
        max_leaves=8,
    )
)
def test_anything_becomes_a_valid_batch_or_one_sentence(raw):
    refusal = ""
    try:
        batch = as_batch(raw)
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        return
    assert batch["image"].ndim == 4
    assert batch["image"].is_floating_point()
    for key in ("label", "index"):
        assert key not in batch or len(batch[key]) == len(batch["image"])
