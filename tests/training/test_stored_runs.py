"""A run with a stored teacher is the run with the teacher, bit for bit."""

from functools import partial

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn

from distill.callbacks import SuperpixelSegments
from distill.data.longtail import ExponentialTail
from distill.distiller import Distiller
from distill.errors import UserError
from distill.heads import (
    AB,
    AT,
    CRD,
    FSP,
    FT,
    KD,
    NST,
    RKD,
    RRD,
    SP,
    TRG,
    VID,
    FitNet,
    ReviewKD,
    SeRKD,
    shipped,
)
from distill.networks import Timm, TorchModule
from distill.objective import Objective, Term
from distill.schedules import Linear, Progress
from distill.store import StoredTeacher, StoreIndex
from distill.training.stored import attach, require_fixed_draws
from tests.training.stored_runs import (
    Convolutions,
    Pictures,
    differing,
    fit,
    live_and_stored,
    metrics_of,
    module,
    network,
    other_teacher,
    plan,
    store,
    teacher,
    trainer,
)

MAPS = ("low", "high")
MADE = {  # with arguments, where the defaults do not fit the small networks or data
    "CRD": partial(CRD, samples=32, negatives=8),
    "RRD": partial(RRD, size=24, width=16),
    "SeRKD": partial(SeRKD, cell=(1, 1)),
}
COMPARING = {  # two views are compared in test_stored_views
    name: MADE.get(name, make)
    for name, make in shipped().items()
    if make.needs_teacher and name != "FSP" and "view" not in make.batch_needs
}


def all_together():
    return {name: Term(make(), 0.2) for name, make in COMPARING.items()}


def several():
    return {
        "kd": Term(KD(), Linear(1.0, 0.2)),
        "rkd": Term(RKD()),
        "rrd": Term(RRD(size=24, width=16)),
        "serkd": Term(SeRKD(cell=(1, 1))),
        "trg": Term(TRG(tokens_per_image=4, neighbors=4)),
    }


def vits():
    options = {"patch_size": 8, "drop_rate": 0.2, "drop_path_rate": 0.2}
    return {"student": Timm("test_vit", options=options), "teacher": Timm("test_vit2", options={"patch_size": 8})}


SETTINGS = {
    **{name: ({"x": make}, {}) for name, make in COMPARING.items()},
    "FSP": ({"x": partial(FSP, of=MAPS)}, {"networks": lambda: {"student": network(1, dropout=0.3, stride=1)}}),
    **{
        f"{make.__name__} of maps": ({"x": partial(make, of=MAPS)}, {})
        for make in (AB, AT, FT, NST, VID, FitNet, ReviewKD)
    },
    "SP of the tokens of each image": ({"x": partial(SP, of="tokens", scope="image")}, {}),
    "RKD of a map": ({"x": partial(RKD, of="low")}, {}),
    "RRD orthogonal": ({"x": partial(RRD, size=24, width=8, teacher_projection="orthogonal", start="noise")}, {}),
    "RRD identity": ({"x": partial(RRD, size=24, teacher_projection="identity", enqueue="after")}, {}),
    "TRG on another grid": ({"x": partial(TRG, of="low", grid=(3, 5))}, {}),
    "SeRKD of a map with tokens": ({"x": partial(SeRKD, of="low", features=0.5)}, {}),
    "SeRKD of a convolved map": ({"x": partial(SeRKD, of="low", tokenizer="convolution", features=0.5)}, {}),
    "SeRKD of maxima": ({"x": partial(SeRKD, of="low", tokenizer="max", neighborhood="all")}, {}),
    "SeRKD with segments of fast-slic": (
        {"x": partial(SeRKD, "segments", count=16)},
        {"callbacks": lambda: [SuperpixelSegments(16, backend="fast_slic")]},
    ),
    "SeRKD with segments of torch and tokens": (
        {"x": partial(SeRKD, "segments", count=16, features=0.5)},
        {"callbacks": lambda: [SuperpixelSegments(16, backend="torch", connected=True)]},
    ),
    "SeRKD with segments of the workers": (
        {"x": partial(SeRKD, "segments", count=16, of="low")},
        {
            "callbacks": lambda: [SuperpixelSegments(16, in_workers=True)],
            "data": lambda: Pictures(num_workers=2),
        },
    ),
    "two terms of one quantity": ({"first": RKD, "second": partial(SP)}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_head_trains_alike_with_the_teacher_and_with_what_is_stored_of_it(name, tmp_path):
    heads, settings = SETTINGS[name]
    live, stored = live_and_stored(tmp_path, lambda: {term: Term(make()) for term, make in heads.items()}, **settings)
    assert differing(live, stored) == []


@pytest.mark.parametrize("heads", [several, pytest.param(all_together, marks=pytest.mark.slow)])
def test_all_terms_together_train_alike(heads, tmp_path):
    live, stored = live_and_stored(tmp_path, heads)
    assert differing(live, stored) == []
    assert stored.metrics == pytest.approx(live.metrics, abs=1e-5)
    assert {"val/agreement", "val/neighbor_agreement", "val/distillation"} <= stored.metrics.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        partial(Pictures, num_workers=2),
        partial(Pictures, draws=3, repetitions=2),
        partial(Pictures, class_balanced=True),
        partial(Pictures, images=29, drop_last=False),
        partial(Pictures, images=40, longtail=ExponentialTail(0.5)),
        partial(Pictures, seed=5),
        partial(Pictures, draws=1),
        partial(Pictures, images=24, batch_size=24),
    ],
    ids=lambda data: ",".join(data.keywords),
)
def test_all_ways_of_drawing_images_train_alike(data, tmp_path):
    live, stored = live_and_stored(tmp_path, several, data)
    assert differing(live, stored) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_summaries_in_half_precision_train_alike(dtype, tmp_path):
    heads = lambda: {  # noqa: E731
        "rkd": Term(RKD(), summary_dtype=dtype),
        "rrd": Term(RRD(size=24, width=16), summary_dtype=dtype),
        "serkd": Term(SeRKD(of="low", features=1.0), summary_dtype=dtype),
        "kd": Term(KD()),
    }
    live, stored = live_and_stored(tmp_path, heads)
    assert differing(live, stored) == []
    index = StoreIndex.read(tmp_path)
    halves = {name for name, quantity in index.quantities.items() if quantity.dtype == getattr(torch, dtype)}
    assert f"embedding.{dtype}" in halves
    assert len(halves) == 4
    assert "logits" in index.quantities
    assert differing(
        fit(module(lambda: {"rkd": Term(RKD(), summary_dtype=dtype)}), Pictures()),
        fit(module(lambda: {"rkd": Term(RKD())}), Pictures()),
    )


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [5, 7, 13])
def test_attention_and_odd_batches_train_alike(batch_size, tmp_path):
    live, stored = live_and_stored(tmp_path, several, partial(Pictures, batch_size=batch_size), networks=vits)
    assert stored.metrics == pytest.approx(live.metrics, abs=1e-4)
    for name, value in live.state.items():
        torch.testing.assert_close(stored.state[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_attention_trains_alike(tmp_path):
    live, stored = live_and_stored(tmp_path, several, networks=vits)
    assert differing(live, stored) == []


class ByPlace(nn.Module):
    """A network whose last digits depend on an image's place in the batch."""

    def __init__(self):
        super().__init__()
        self.inner = Convolutions()
        self.classifier = self.inner.classifier

    def forward(self, image):
        return self.inner(image) + 1e-6 * torch.arange(len(image)).unsqueeze(1)


def test_a_network_that_rounds_by_the_place_in_the_batch_is_told_of(tmp_path, recwarn):
    torch.manual_seed(2)
    inexact = ByPlace()
    networks = lambda: {"teacher": TorchModule(inexact, embedding="inner.dropout")}  # noqa: E731
    kd = lambda: {"kd": Term(KD())}  # noqa: E731
    store(tmp_path / "inexact", module(kd, **networks()), Pictures(), splits=["train"])
    said = [str(warning.message) for warning in recwarn if "place in the batch" in str(warning.message)]
    assert len(said) == 1
    assert "of an image depends on its place in the batch of 8, by up to " in said[0]
    store(tmp_path / "exact", module(kd), Pictures(), splits=["train"])
    assert sum("place in the batch" in str(warning.message) for warning in recwarn) == 1


@pytest.mark.slow
def test_of_several_teachers_one_may_be_stored(tmp_path):
    heads = lambda: {  # noqa: E731
        "kd": Term(KD(), teacher="first"),
        "rkd": Term(RKD(), teacher="second"),
        "rrd": Term(RRD(size=24, width=16), teacher="second"),
    }
    networks = lambda: {"first": teacher(), "second": other_teacher()}  # noqa: E731
    live = fit(module(heads, teachers=networks()), Pictures())
    for name in ("first", "second"):
        store(tmp_path / name, module(heads, teachers=networks()), Pictures(), of=name)
    for stored in (["first"], ["second"], ["first", "second"]):
        teachers = networks() | {name: StoredTeacher(str(tmp_path / name)) for name in stored}
        run = fit(module(heads, teachers=teachers), Pictures())
        assert differing(live, run) == []
        assert run.metrics == pytest.approx(live.metrics, abs=1e-5)


def contents(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.mark.slow
def test_a_head_and_draws_are_added_and_nothing_else_is_computed(tmp_path):
    few = lambda: {"rkd": Term(RKD())}  # noqa: E731
    more = lambda: {**few(), "rrd": Term(RRD(size=24, width=16)), "kd": Term(KD())}  # noqa: E731
    store(tmp_path / "store", module(few), Pictures(images=24))
    first = contents(tmp_path / "store")
    added = store(tmp_path / "store", module(more), Pictures(images=24))
    second = contents(tmp_path / "store")
    assert {quantity.name for quantity in added.quantities["train"]} == {"embedding", "logits"} | {
        name for name in StoreIndex.read(tmp_path / "store").quantities if name.startswith("RRD")
    }
    assert first.items() <= second.items()
    assert len(second) > len(first)
    nothing = store(tmp_path / "store", module(few), Pictures(images=24))
    assert nothing.bytes == 0
    assert contents(tmp_path / "store") == second

    drawn = store(tmp_path / "store", module(more), Pictures(images=24, draws=4))
    third = contents(tmp_path / "store")
    assert drawn.bytes == 2 * 24 * sum(quantity.bytes for quantity in drawn.quantities["train"])
    assert second.items() <= third.items()
    store(tmp_path / "whole", module(more), Pictures(images=24, draws=4))
    whole = contents(tmp_path / "whole")
    assert {path: content for path, (_, content) in third.items()} == {path: c for path, (_, c) in whole.items()}
    live = fit(module(more), Pictures(images=24, draws=4), max_epochs=5)
    stored = StoredTeacher(str(tmp_path / "store"))
    assert differing(live, fit(module(more, teacher=stored), Pictures(images=24, draws=4), max_epochs=5)) == []
    fewer = fit(module(few, teacher=StoredTeacher(str(tmp_path / "store"))), Pictures(images=24))
    assert differing(fit(module(few), Pictures(images=24)), fewer) == []


@pytest.mark.slow
def test_two_shares_of_a_store_make_the_whole(tmp_path):
    store(tmp_path / "whole", module(several), Pictures())
    for share in ((1, 3), (0, 3), (2, 3)):
        store(tmp_path / "shares", module(several), Pictures(), share=share)
    whole, shares = contents(tmp_path / "whole"), contents(tmp_path / "shares")
    assert {path: content for path, (_, content) in whole.items()} == {path: c for path, (_, c) in shares.items()}


@pytest.mark.slow
def test_validation_and_test_agree_with_the_live_ones(tmp_path):
    store(tmp_path, module(several), Pictures(), splits=["train", "val", "test"])
    figures = {}
    for name, teachers in (("live", {}), ("stored", {"teacher": StoredTeacher(str(tmp_path))})):
        model, data = module(several, **teachers), Pictures()
        seed_everything(0, verbose=False)
        run = trainer()
        run.fit(model, data)
        figures[name] = metrics_of(run)
        for task in (run.validate, run.test):
            task(model, Pictures(), verbose=False)
            figures[name] |= metrics_of(run)
    assert figures["stored"] == pytest.approx(figures["live"], abs=1e-5)
    assert {"val/agreement", "val/neighbor_agreement", "test/agreement", "test/neighbor_agreement"} <= figures[
        "stored"
    ].keys()


def test_without_validation_images_in_the_store_their_metrics_are_left_out(tmp_path):
    rkd = lambda: {"rkd": Term(RKD(scope="batch"))}  # noqa: E731
    store(tmp_path, module(rkd), Pictures(), splits=["train"])
    live = fit(module(rkd), Pictures())
    stored = fit(module(rkd, teacher=StoredTeacher(str(tmp_path))), Pictures())
    assert all(torch.equal(value, stored.state[name]) for name, value in live.state.items())
    left_out = {"val/agreement", "val/kl_to_teacher", "val/neighbor_agreement", "val/distillation"}
    assert {name for name in stored.metrics if name.startswith("val/")} == {
        name for name in live.metrics if name.startswith("val/")
    } - left_out


@pytest.mark.slow
def test_batches_of_another_size_agree_to_rounding(tmp_path):
    store(tmp_path, module(several), Pictures(batch_size=16))
    live = fit(module(several), Pictures())
    stored = fit(module(several, teacher=StoredTeacher(str(tmp_path), any_batch_size=True)), Pictures())
    for name, value in live.state.items():
        torch.testing.assert_close(stored.state[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_loop_of_ones_own_reads_a_store(tmp_path):
    store(tmp_path, module(several), Pictures())
    losses = []
    for source in (teacher(), StoredTeacher(str(tmp_path))):
        seed_everything(0, verbose=False)
        data = Pictures()
        data.setup("fit")
        model = module(several, teacher=source)  # which builds the networks
        torch.manual_seed(0)
        distiller = Distiller(
            model.student,
            dict(model.teachers),
            Objective(several(), model.student.spec, {"teacher": model.teachers["teacher"].spec}),
        )
        attach(distiller, data)
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05)
        found = []
        loader = data.train_dataloader()
        for step, batch in enumerate(loader):
            loss = distiller(batch, Progress(step, steps=len(loader))).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


class Inverted(Pictures):
    """Images that a hook of their data module changes."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "image": 1 - batch["image"]}


def test_images_that_transfer_hooks_of_a_user_change_are_refused(tmp_path):
    kd = lambda: {"kd": Term(KD())}  # noqa: E731
    with pytest.raises(UserError, match="that Inverted changes in transfer hooks of its own"):
        require_fixed_draws(Inverted())
    store(tmp_path, module(kd), Pictures())
    with pytest.raises(UserError, match="that Inverted changes in transfer hooks of its own"):
        fit(module(kd, teacher=StoredTeacher(str(tmp_path))), Inverted())


def test_a_store_of_a_network_made_otherwise_is_not_taken_for_this_one(tmp_path):
    kd = lambda: {"kd": Term(KD())}  # noqa: E731

    def recipe(**settings):
        return {"class_path": "Timm", "init_args": {"name": "resnet10t", **settings}}

    store(tmp_path, module(kd), Pictures(), network=recipe(options={}, weights="a.ckpt"))
    moved, _ = plan(tmp_path, module(kd), Pictures(), network=recipe(options={}, weights="b.ckpt", taps=["layer2"]))
    assert not moved.bytes
    with pytest.raises(UserError, match=r"is a store of something else: network.class_path is"):
        plan(tmp_path, module(kd), Pictures(), network={"class_path": "my_networks.WithoutArguments"})
    other = recipe(options={"global_pool": "max"})
    with pytest.raises(UserError, match=r"is a store of something else: network.init_args.options.global_pool is"):
        plan(tmp_path, module(kd), Pictures(), network=other)
