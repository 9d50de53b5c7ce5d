"""A run on two views with a stored teacher is the run with the teacher, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
from lightning.pytorch import seed_everything

from distill.callbacks import SuperpixelSegments
from distill.data import RandAugment
from distill.errors import UserError
from distill.heads import CRLD, KD, MLKD, RKD, RRD, TRG, SeRKD
from distill.objective import Term
from distill.store import StoredTeacher, StoreIndex
from tests.training.stored_runs import Pictures, differing, fit, live_and_stored, module, store

VIEWS = ["weak", "strong"]
two_views = partial(Pictures, train_views=VIEWS)


def terms() -> Mapping[str, Term]:
    return {
        "kd": Term(KD(), views=[0, 1], teacher_views=[1, 0]),
        "crld": Term(CRLD()),
        "mlkd": Term(MLKD(), 0.1),
        "rkd": Term(RKD(), 0.1),
        "rrd": Term(RRD(size=24, width=16), 0.1, views=[1]),
        "trg": Term(TRG(tokens_per_image=4, neighbors=4), 0.1),
        "serkd": Term(SeRKD("segments", count=4), 0.1),
    }


def simple() -> Mapping[str, Term]:
    return {"crld": Term(CRLD()), "rrd": Term(RRD(size=24, width=16), 0.1)}


def test_a_run_with_a_stored_teacher_is_the_live_run_bit_for_bit(tmp_path: Path) -> None:
    live, stored = live_and_stored(tmp_path / "store", simple, two_views, max_epochs=2)
    assert differing(live, stored) == []
    assert StoreIndex.read(tmp_path / "store").splits["train"].draws == 4, "two draws in two views"
    assert StoreIndex.read(tmp_path / "store").splits["val"].draws == 1


@pytest.mark.slow
def test_so_it_is_with_every_kind_of_head_on_three_views_and_segments(tmp_path: Path) -> None:
    data = partial(Pictures, train_views=[*VIEWS, RandAugment(1, 5)], num_workers=2)

    def heads() -> Mapping[str, Term]:
        return {**terms(), "crld": Term(CRLD(), views=[0, 2])}

    callbacks = lambda: [SuperpixelSegments(segments=4)]  # noqa: E731
    live, stored = live_and_stored(tmp_path / "store", heads, data, callbacks=callbacks)
    assert differing(live, stored) == []


@pytest.mark.slow
def test_draws_are_added_to_a_store_of_views_and_do_not_move(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store(folder, module(simple), two_views(draws=1))
    store(folder, module(simple), two_views(draws=2))
    teacher = StoredTeacher(str(folder))
    live, stored = fit(module(simple), two_views()), fit(module(simple, teacher=teacher), two_views())
    assert differing(live, stored) == []


def test_a_store_of_other_views_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "store"

    def kd() -> Mapping[str, Term]:
        return {"kd": Term(KD())}

    store(folder, module(kd), two_views(images=8))
    for views, sentence in (
        (None, r"data.train_views is \['weak', 'strong'\] in the store, but missing here"),
        (["weak", "weak"], r"data.train_views"),
        (["weak", RandAugment(3)], r"data.train_views"),
    ):
        seed_everything(0, verbose=False)
        with pytest.raises(UserError, match=sentence):
            fit(module(kd, teacher=StoredTeacher(str(folder))), Pictures(images=8, train_views=views))
    with pytest.raises(UserError, match="data.draws is 2 in the store, but 3 here"):
        fit(module(kd, teacher=StoredTeacher(str(folder))), two_views(images=8, draws=3))
