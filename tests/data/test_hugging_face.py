"""Data sets of Hugging Face's datasets, in all forms in which they lie on a disk."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before datasets is loaded

import io

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from distill.__main__ import main
from distill.data import HuggingFaceImages, ImageFolder
from distill.errors import UserError
from distill.heads.rkd import RKD
from distill.objective import Term
from tests.program import TINY
from tests.training.test_any_data import fit, module

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Photos of two classes, some turned, gray or transparent."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for split, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(generator.integers(0, 256, (20, 30, 4), dtype=np.uint8))
                if number % 3 == 0:
                    image.save(root / split / name / f"{number}.png")
                else:
                    image.convert("RGB" if number % 3 == 1 else "L").save(
                        root / split / name / f"{number}.jpg", exif=exif
                    )
    return root


SETTINGS = {"image_size": 16, "batch_size": 5, "num_workers": 0}


@pytest.fixture(scope="module")
def loaded(root, cache):
    return datasets.load_dataset(str(root))


def as_bytes(loaded):
    """The same images as plain columns of bytes, without the features of datasets."""
    features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.Value("string")})
    names = loaded["train"].features["label"].names
    return {
        split: datasets.Dataset.from_list(
            [
                {"image": open(row["image"]["path"], "rb").read(), "label": names[row["label"]]}
                for row in part.cast_column("image", datasets.Image(decode=False))
            ],
            features=features,
        )
        for split, part in loaded.items()
    }


def forms(root, loaded, folder):
    """The ways in which the same images are given."""
    loaded.save_to_disk(str(folder / "disk"))
    plain = as_bytes(loaded)
    for split, part in plain.items():
        part.to_parquet(str(folder / "parquet" / f"{split}-00000-of-00001.parquet"))
    return {
        "folder of images": str(root),
        "saved to disk": str(folder / "disk"),
        "folder of parquet files": str(folder / "parquet"),
        "datasets in memory": plain,
        "a DatasetDict": loaded,
    }


def test_all_forms_give_the_batches_that_the_folder_of_images_gives(root, loaded, tmp_path):
    folder = ImageFolder(str(root), **SETTINGS)
    expected = [*folder.train_dataloader(), *folder.val_dataloader(), *folder.test_dataloader()]
    for name, path in forms(root, loaded, tmp_path).items():
        for decoder in ("pil", "torchvision"):
            data = HuggingFaceImages(path, decoder=decoder, **SETTINGS)
            data.setup("fit")
            assert (data.classes, data.num_classes, data.class_counts()) == (["cat", "dog"], 2, [6, 6]), name
            found = [*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
            for batch, other in zip(found, expected, strict=True):
                assert all(torch.equal(batch[key], other[key]) for key in ("image", "label", "index", "draw")), name


class Tuples(LightningDataModule):
    """A user's data module over the same files: it yields `(image, label)` and knows nothing of this project."""

    def __init__(self, loaders):
        super().__init__()
        self.loaders = loaders

    def train_dataloader(self):
        loader = self.loaders("train")
        return DataLoader(loader.dataset, batch_size=5, sampler=loader.sampler, drop_last=True, collate_fn=_tuples)

    def val_dataloader(self):
        loader = self.loaders("val")
        return DataLoader(loader.dataset, batch_size=5, sampler=loader.sampler, collate_fn=_tuples)


def _tuples(samples):
    batch = default_collate(samples)
    return batch["image"], batch["label"]


def test_the_same_images_through_files_datasets_and_a_users_module_give_the_same_losses(root, loaded, tmp_path):
    path = forms(root, loaded, tmp_path)["folder of parquet files"]
    settings = {**SETTINGS, "image_size": 32}
    folder = ImageFolder(str(root), **settings)
    own = Tuples(lambda split: getattr(ImageFolder(str(root), **settings), f"{split}_dataloader")())
    results = []
    for data in (folder, HuggingFaceImages(path, **settings), own):
        model = module(2, {"rkd": Term(RKD(scope="batch"))}, image_shape=(3, 32, 32))
        losses, metrics = fit(model, data, epochs=3)
        assert len(losses.values) == 3 * 2
        results.append((losses.values, metrics))
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_a_single_file_is_read_and_validation_images_are_held_out(loaded, tmp_path):
    file = str(tmp_path / "all.parquet")
    as_bytes(loaded)["train"].to_parquet(file)
    data = HuggingFaceImages(file, val_fraction=0.4, **SETTINGS)
    training, held_out = data.samples("train").source, data.samples("val").source
    assert sorted(training.positions + held_out.positions) == list(range(12))
    assert len(held_out) > 0
    longer = datasets.concatenate_datasets([as_bytes(loaded)["train"], as_bytes(loaded)["validation"]])
    more = HuggingFaceImages(longer, val_fraction=0.4, **SETTINGS).samples("val").source.positions
    assert [position for position in more if position < 12] == held_out.positions


def test_without_a_column_of_labels_there_are_none(loaded):
    data = HuggingFaceImages(loaded, label=None, **SETTINGS)
    data.setup("fit")
    assert (data.num_classes, data.classes, data.class_counts()) == (0, None, [])
    assert next(iter(data.train_dataloader()))["label"].tolist() == [-1] * 5


def of(name="label", values=(0, 1)):
    """A data set of gray images with a further column."""
    images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(len(values))]
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": images}, features=features).add_column(name, list(values))


@pytest.mark.parametrize(
    ("values", "labels", "num_classes", "classes"),
    [
        ([2, 0, None, -1], [2, 0, -1, -1], 3, None),
        (["b", None, "a", ""], [1, -1, 0, -1], 2, ["a", "b"]),
        (["7", "0", "1", "7"], [7, 0, 1, 7], 8, None),
        ([True, False, True, True], [1, 0, 1, 1], 2, None),
    ],
)
def test_labels_are_numbers_or_names_and_may_be_missing(values, labels, num_classes, classes):
    rows = of("kind", values)
    data = HuggingFaceImages({"train": rows, "dev": rows}, label="kind", **SETTINGS)
    assert data.samples("train").source.labels == labels
    assert (data.num_classes, data.classes) == (num_classes, classes)


def test_rows_are_read_in_the_order_that_was_chosen():
    rows = of(values=[0, 1, 2, 3]).shuffle(seed=1).select([3, 1, 0])
    source = HuggingFaceImages({"train": rows, "test": rows}, splits={"train": "train", "val": "test"}).source("train")
    shown = [source[position][0].getpixel((0, 0))[0] for position in range(3)]
    assert shown == source.labels == rows["label"][:]


def test_the_format_and_the_transform_of_a_data_set_do_not_matter(loaded):
    plain = HuggingFaceImages(loaded, **SETTINGS).samples("train")
    for other in (loaded.with_format("torch"), loaded.with_transform(lambda rows: {"image": [0] * len(rows["image"])})):
        found = HuggingFaceImages(other, **SETTINGS).samples("train")
        assert torch.equal(found[(0, 3)]["image"], plain[(0, 3)]["image"])


def image_bytes(format="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, format)
    return stream.getvalue()


def mistakes():
    rows = of(values=[0, 1])
    pair = {"train": rows, "validation": rows}
    empty = rows.select([])
    no_image = datasets.Dataset.from_dict(
        {"image": [None, None], "label": [0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    return {
        r"data.image: 'train' has no column 'img': did you mean 'image'": (pair, {"image": "img"}),
        r"data.image: the column 'label' of 'train' holds int64, not images": (pair, {"image": "label"}),
        r"data.label: 'train' has no column 'labels': did you mean 'label'.*, or null": (pair, {"label": "labels"}),
        r"data.label: the column 'image' of train holds .*, not classes": (pair, {"label": "image"}),
        r"data.label: the column 'label' of train holds double|float64": (
            {"train": of(values=[0.5, 1.0]), "val": rows},
            {},
        ),
        r"data.path: row 0 of 'train' has no image in the column 'image'": ({"train": no_image, "val": rows}, {}),
        r"data.path: 'train' has no row": ({"train": empty, "val": rows}, {}),
        r"data.splits: none of 'train' is taken for validation": (rows, {}),
        r"data.splits: none of 'a', 'b' is taken for training": ({"a": rows, "b": rows}, {}),
        r"data.splits.val cannot be 'validatio'.* did you mean 'validation'": (
            pair,
            {"splits": {"train": "train", "val": "validatio"}},
        ),
        r"data.splits cannot be 'dev'": (pair, {"splits": {"dev": "validation"}}),
        r"data.val_fraction 0.5 would hold out .* 'validation' is the split": (pair, {"val_fraction": 0.5}),
        r"data.val_fraction must be above 0 and below 1, given 1.0": (rows, {"val_fraction": 1.0}),
        r"'train' is a IterableDataset.* stream needs a data module": ({"train": rows.to_iterable_dataset()}, {}),
        r"needs a Dataset or several by split, not list": ([1], {}),
        r"no training image has a label: give data.label=null": (
            {"train": of(values=[-1, -1]), "val": rows},
            {},
        ),
        r"data.path: 'no such thing' cannot be loaded \(": ("no such thing", {}),
    }


def test_what_does_not_fit_is_refused_in_one_sentence():
    for words, (path, settings) in mistakes().items():
        with pytest.raises(UserError, match=words) as caught:
            HuggingFaceImages(path, **settings)
        assert "\n" not in str(caught.value)


def test_a_broken_image_is_refused_by_its_row(loaded):
    content = [image_bytes(), image_bytes("JPEG")[:200], image_bytes()]
    features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": content, "label": [0, 1, 0]}, features=features)
    data = HuggingFaceImages({"train": rows, "validation": rows}, **SETTINGS)
    with pytest.raises(UserError, match=r"data.path: row 1 of 'train' cannot be read \("):
        data.samples("train")[1]


def test_what_is_on_the_disk_is_not_counted_on_the_net(root, loaded, tmp_path, monkeypatch):
    """Without offline mode datasets asks a host about some of its own readers, to count their loads."""
    file = str(tmp_path / "all.parquet")
    as_bytes(loaded)["train"].to_parquet(file)
    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr(datasets.load, "get_session", lambda: asked.append(1))
    datasets.load_dataset("parquet", data_files=file)
    assert asked.pop()
    for path in (file, str(root)):
        HuggingFaceImages(path, splits={"train": "train"}, val_fraction=0.5, **SETTINGS)
    assert not asked
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


def test_workers_read_the_same(loaded):
    alone, helped = (
        HuggingFaceImages(loaded, **{**SETTINGS, "num_workers": workers}).train_dataloader() for workers in (0, 1)
    )
    assert torch.equal(next(iter(alone))["image"], next(iter(helped))["image"])


def test_a_folder_trains_from_the_command_line(root, tmp_path):
    words = ["--data=HuggingFaceImages", f"--data.path={root}", "--data.image_size=32"]
    words += ["--data.num_workers=0", "--data.batch_size=4", "--data.splits={train: train, val: validation}"]
    rest = [word for word in TINY if not word.startswith("--data")]
    assert main(["fit", *words, f"--trainer.default_root_dir={tmp_path / 'run'}", *rest]) == 0
    assert "val/top1" in (tmp_path / "run" / "metrics.csv").read_text()
