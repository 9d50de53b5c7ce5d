"""A run that does not fit its store is refused in one sentence before step 0, and nothing is written or lost."""

import shutil
from functools import partial

import pytest
import torch

from distill.callbacks import SuperpixelSegments
from distill.data import Mixing
from distill.data.longtail import ExponentialTail
from distill.errors import UserError
from distill.heads import KD, RKD, RRD, SeRKD
from distill.networks import Ensemble, TorchModule
from distill.objective import Term
from distill.store import StoredTeacher, StoreIndex
from distill.superpixels import fast_slic
from distill.training import store_plan
from tests.own_data import OwnData
from tests.store.sample_stores import files_of_at_most
from tests.training.stored_runs import Convolutions, Curves, Pictures, fit, module, network, plan, store, teacher


def heads():
    return {"rkd": Term(RKD()), "rrd": Term(RRD(size=24, width=16))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    store(folder, module(heads), Pictures())
    return folder


@pytest.fixture
def own(folder, tmp_path):
    """A copy of the store that a test may damage."""
    return shutil.copytree(folder, tmp_path / "own")


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(folder, data, chosen=heads, callbacks=(), stored=None, **settings):
    """The sentence that refuses a run, before any step; the store stays as it is."""
    before = files(folder)
    source = StoredTeacher(str(folder)) if stored is None else stored
    steps = Curves()
    with pytest.raises(UserError) as error:
        fit(module(chosen, **{"teacher": source, **settings}), data, [*callbacks, steps])
    assert steps.rows == []
    assert files(folder) == before
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


class Renamed(Pictures):
    """The same images under another class."""


class OtherLabels(Pictures):
    def samples(self, split):
        samples = super().samples(split)
        samples.source.labels = samples.source.labels[::-1]
        return samples


class OtherPixel(Pictures):
    """One value of one image differs, which sixteen samples of few images show."""

    def samples(self, split):
        samples = super().samples(split)
        samples.source.images = (samples.source.images.int() ^ 1).byte()
        return samples


class OtherTransform(Pictures):
    """Augments more."""

    def __init__(self, strength=0.5, **settings):
        super().__init__(**settings)
        self.strength = strength

    def samples(self, split):
        samples = super().samples(split)
        inner = samples.transform
        samples.transform = lambda image: (inner(image) * self.strength).contiguous()
        return samples


IMAGES = "model.teacher: the store '{folder}' is of other images: "


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (partial(Pictures, seed=7), "data.seed is 0 in the store, but 7 here (data.seed gives the images a seed"),
        (
            partial(Pictures, batch_size=4),
            "data.batch_size is 8 in the store, but 4 here (any_batch_size: true accepts",
        ),
        (
            partial(Pictures, draws=3),
            "data.draws is 2 in the store, but 3 here (`distill store` with data.draws 3 adds",
        ),
        (partial(Pictures, images=31), "data.images is 32 in the store, but 31 here"),
        (partial(Pictures, images=40), "data.images is 32 in the store, but 40 here"),
        (partial(Pictures, seed_of_images=1), "data.seed_of_images is 0 in the store, but 1 here"),
        (partial(Pictures, longtail=ExponentialTail(0.5)), "data.longtail is None in the store, but {'class"),
        (Renamed, "data.class is 'Pictures' in the store, but 'Renamed' here"),
        (OtherTransform, "data.class is 'Pictures' in the store, but 'OtherTransform' here"),
    ],
    ids=["seed", "batch size", "draws", "fewer", "more", "other images", "long tail", "class", "transform"],
)
def test_other_images_are_refused(folder, data, says):
    assert refusal(folder, data()).startswith(IMAGES.format(folder=folder) + says)


@pytest.mark.parametrize(("other", "says"), [(OtherLabels, "train.labels is"), (OtherPixel, "train.samples is")])
def test_other_labels_and_pixels_of_the_same_settings_are_refused(folder, other, says):
    other = type("Pictures", (other,), {})
    assert refusal(folder, other()).startswith(IMAGES.format(folder=folder) + says)


def test_another_transform_of_the_same_class_is_refused(tmp_path):
    store(tmp_path, module(heads), OtherTransform(), splits=["train"])
    assert "data.strength is 0.5 in the store, but 0.25 here" in refusal(tmp_path, OtherTransform(strength=0.25))


def test_every_difference_is_named(folder):
    said = refusal(folder, Pictures(batch_size=4, seed=7, draws=5))
    for difference in ("data.seed is 0", "data.batch_size is 8", "data.draws is 2"):
        assert difference in said


def test_images_of_another_size_are_refused(folder):
    said = refusal(folder, Pictures(side=24), image_shape=(3, 24, 24))
    assert "data.side is 32 in the store, but 24 here" in said


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (partial(Pictures, draws=None), "data.draws is null, which makes new versions of the images in every epoch"),
        (partial(Pictures, mixing=Mixing(mixup=0.2)), "data.mixing mixes images by batch, so that no stored row would"),
        (OwnData, "a stored teacher needs images that are augmented by a key: a data module of distill, not OwnData"),
    ],
    ids=str,
)
def test_images_without_a_key_are_refused(folder, data, says):
    assert refusal(folder, data()).startswith(f"model.teacher: {says}")


def test_more_repetitions_than_draws_are_refused():
    with pytest.raises(UserError, match="data.repetitions is 3, more than the 2 data.draws"):
        Pictures(repetitions=3)


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        (lambda: {"kd": Term(KD())}, "model.heads.kd: the store '{folder}' does not have 'logits' of the training"),
        (
            lambda: {"rkd": Term(RKD(), summary_dtype="float16")},
            "model.heads.rkd: the store '{folder}' does not have 'embedding' in float16 of the training images",
        ),
        (
            lambda: {"rrd": Term(RRD(size=24, width=8))},
            "model.heads.rrd: the store '{folder}' does not have what RRD compares with at these settings of the",
        ),
    ],
    ids=["KD", "half", "RRD"],
)
def test_what_is_not_stored_is_named_with_the_command_that_adds_it(folder, chosen, wanted):
    said = refusal(folder, Pictures(), chosen)
    assert said.startswith(wanted.format(folder=folder))
    assert f"add it by `distill store --config ... --output {folder}` with a configuration that has this term" in said


def test_other_segments_are_refused(tmp_path):
    segmented = lambda: {"serkd": Term(SeRKD("segments", count=16))}  # noqa: E731
    made = lambda count: [SuperpixelSegments(count, backend="torch")]  # noqa: E731
    store(tmp_path, module(segmented), Pictures(), callbacks=made(16), splits=["train"])
    assert "segments.segments is 16 in the store, but 9 here" in refusal(tmp_path, Pictures(), segmented, made(9))


@pytest.mark.skipif(not fast_slic.is_installed(), reason="needs fast-slic, which is built where a compiler is")
def test_segments_of_another_backend_are_refused_whichever_of_them_auto_was(tmp_path):
    segmented = lambda: {"serkd": Term(SeRKD("segments", count=16))}  # noqa: E731
    made = lambda backend: [SuperpixelSegments(16, backend=backend)]  # noqa: E731
    store(tmp_path, module(segmented), Pictures(), callbacks=made("auto"), splits=["train"])
    said = refusal(tmp_path, Pictures(), segmented, made("torch"))
    assert "segments.backend is 'fast_slic' in the store, but 'torch' here" in said
    stored = module(segmented, teacher=StoredTeacher(str(tmp_path)))
    assert fit(stored, Pictures(), made("fast_slic"), max_epochs=1, limit_val_batches=0).curves


def test_a_store_of_before_backends_were_recorded_is_taken_for_any_of_them(tmp_path, monkeypatch):
    segmented = lambda: {"serkd": Term(SeRKD("segments", count=16))}  # noqa: E731
    made = lambda: [SuperpixelSegments(16, backend="torch")]  # noqa: E731
    now = store_plan.segment_settings
    monkeypatch.setattr(store_plan, "segment_settings", lambda trainer: {**now(trainer), "backend": "auto"})
    store(tmp_path, module(segmented), Pictures(), callbacks=made(), splits=["train"])
    stored = module(segmented, teacher=StoredTeacher(str(tmp_path)))
    assert fit(stored, Pictures(), made(), max_epochs=1, limit_val_batches=0).curves


@pytest.mark.parametrize(("damage", "says"), [("cut", "is cut short or damaged"), ("remove", "is missing")])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_that_is_not_whole_is_refused(own, damage, says, split):
    path = own / split / "embedding/00000.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    said = refusal(own, Pictures())
    assert said.startswith(f"model.teacher: store '{own}' lacks 1 of the ")
    assert f"'{split}/embedding/00000.safetensors' {says}; `distill store` with the same arguments writes what" in said
    store(own, module(heads), Pictures())
    assert fit(module(heads, teacher=StoredTeacher(str(own))), Pictures(), max_steps=1).curves


@pytest.mark.parametrize("name", ["RRD", "classifier"])
def test_a_lost_projection_or_classifier_is_refused_and_written_anew(own, name):
    (state,) = (own / "state").glob(f"{name}*")
    content = state.read_bytes()
    for damage in (state.unlink, lambda: state.write_bytes(content[:-1])):
        damage()
        assert refusal(own, Pictures()).endswith("; `distill store` writes it anew")
        store(own, module(heads), Pictures())
        assert state.read_bytes() == content


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path, Pictures(), stored=StoredTeacher(str(tmp_path / "none")))
    assert "has no index.json" in refusal(tmp_path, Pictures())
    (tmp_path / "index.json").write_text("{")
    assert "has a damaged index.json" in refusal(tmp_path, Pictures())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"compile": "teacher"}, "model.compile is 'teacher', but the teacher is stored, so that no network runs"),
        ({"teacher_dtype": "bfloat16"}, "model.teacher_dtype is 'bfloat16', but a stored teacher has the dtype of its"),
        (
            {"teacher_dtype": {"teacher": "bfloat16"}},
            "model.teacher_dtype: there is no network 'teacher': a stored teacher has the dtype with which it was",
        ),
    ],
    ids=str,
)
def test_options_of_a_network_are_refused_of_a_stored_teacher(folder, settings, says):
    assert refusal(folder, Pictures(), **settings).startswith(says)


def test_an_ensemble_of_a_stored_teacher_is_refused(folder):
    teachers = {"one": StoredTeacher(str(folder)), "two": teacher(), "both": Ensemble(of=["one", "two"])}
    chosen = lambda: {"rkd": Term(RKD(), teacher="both")}  # noqa: E731
    with pytest.raises(UserError, match="model.teachers.both: 'one' is stored: store the ensemble instead"):
        module(chosen, teachers=teachers)


@pytest.mark.slow
def test_a_store_of_an_ensemble_trains_as_the_ensemble(tmp_path):
    members = lambda: {"one": teacher(), "two": network(5), "both": Ensemble(of=["one", "two"])}  # noqa: E731
    chosen = lambda: {"rkd": Term(RKD(), teacher="both"), "kd": Term(KD(), teacher="both")}  # noqa: E731
    store(tmp_path, module(chosen, teachers=members()), Pictures(), of="both", splits=["train"])
    live = fit(module(chosen, teachers=members()), Pictures())
    stored = fit(module(chosen, teachers={"both": StoredTeacher(str(tmp_path))}), Pictures())
    assert all(torch.equal(value, stored.state[name]) for name, value in live.state.items())


def test_a_store_of_an_ensemble_is_not_completed_with_members_that_see_other_images(tmp_path):
    def planned(mean):
        torch.manual_seed(1)
        members = {"one": teacher(), "two": TorchModule(Convolutions(), mean=mean), "both": Ensemble(of=["one", "two"])}
        return module(lambda: {"rkd": Term(RKD(), teacher="both")}, teachers=members)

    store(tmp_path, planned(0.0), Pictures(), of="both", splits=["val"])
    with pytest.raises(
        UserError, match=r"something else: teacher\.members\.two\.mean is \[0\.0, 0\.0, 0\.0\] in the store"
    ):
        plan(tmp_path, planned(0.5), Pictures(), of="both")


@pytest.mark.parametrize(
    ("settings", "data", "says"),
    [
        ({"teacher": lambda: network(9)}, Pictures, "is a store of something else: teacher.fingerprint is "),
        ({}, partial(Pictures, seed=3), "is a store of something else: data.seed is 0 in the store, but 3 here"),
        ({}, partial(Pictures, batch_size=4), "is a store of something else: data.batch_size is 8 in the store"),
        ({}, partial(Pictures, images=31), "images is 32 in the store, but 31 here"),
    ],
    ids=["teacher", "seed", "batch size", "images"],
)
def test_a_store_is_not_completed_with_anything_else(folder, settings, data, says):
    before = files(folder)
    with pytest.raises(UserError) as error:
        store(folder, module(heads, **{name: make() for name, make in settings.items()}), data())
    assert str(error.value).startswith("output: ")
    assert says in str(error.value)
    assert files(folder) == before


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_what_was_written(tmp_path):
    more = lambda: {**heads(), "serkd": Term(SeRKD(of="low", stride=1, features=1.0))}  # noqa: E731
    with files_of_at_most(8 * 1024), pytest.raises(UserError, match=r"all files written before are intact"):
        store(tmp_path / "full", module(more), Pictures())
    first = files(tmp_path / "full")
    assert len(first) > 2
    store(tmp_path / "full", module(more), Pictures())
    assert first.items() <= files(tmp_path / "full").items()
    store(tmp_path / "whole", module(more), Pictures())
    names = lambda folder: {path.relative_to(folder): content for path, content in files(folder).items()}  # noqa: E731
    assert names(tmp_path / "full") == names(tmp_path / "whole")


def test_changed_labels_do_not_complete_a_store(folder):
    before = files(folder)
    with pytest.raises(UserError, match="output: .* is a store of other images of 'train'"):
        store(folder, module(heads), type("Pictures", (OtherLabels,), {})())
    assert files(folder) == before


@pytest.mark.slow
def test_fewer_draws_than_stored_are_enough(folder):
    assert StoreIndex.read(folder).splits["train"].draws == 2
    live = fit(module(heads), Pictures(draws=1))
    stored = fit(module(heads, teacher=StoredTeacher(str(folder))), Pictures(draws=1))
    assert all(torch.equal(value, stored.state[name]) for name, value in live.state.items())
    planned, _ = plan(folder, module(heads), Pictures(draws=1))
    assert planned.bytes == 0
