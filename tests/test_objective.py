"""The objective in any loop: what a LightningModule trains, a plain loop trains with the same losses."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from distill.callbacks import SuperpixelSegments
from distill.data import Digits
from distill.distiller import Distiller
from distill.errors import UserError
from distill.features import Features, FeatureSpec, Summary
from distill.heads import KD, RKD, RRD, TRG, CrossEntropy, Head, RunInfo, SeRKD
from distill.networks import FrozenTeacher, Timm
from distill.objective import Objective, Term
from distill.schedules import After, Linear, Progress, Schedule, Until
from distill.superpixels import add_segments
from distill.training.distillation import DistillationModule

SPEC = FeatureSpec(logits=(5,), embedding=(6,))
IMAGE = (3, 32, 32)
EPOCHS, STEPS = 2, 10


def networks():
    torch.manual_seed(0)
    student = Timm("test_vit", options={"patch_size": 8})
    teacher = Timm("test_vit", options={"patch_size": 4})
    return student, teacher


def terms():
    return {
        "rkd": Term(RKD(), weight=Linear(0.0, 2.0)),
        "rrd": Term(RRD(size=40, width=16)),
        "trg": Term(TRG(tokens_per_image=4, neighbors=3)),
        "serkd": Term(SeRKD(superpixels="segments", count=9)),
    }


def data():
    return Digits(batch_size=8, labels_per_class=5)


class Watch(Callback):
    """Keeps the loss of every step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def losses_under_lightning(folder):
    student, teacher = networks()
    module = DistillationModule(
        student=student,
        teacher=teacher,
        heads=terms(),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        num_classes=10,
        image_shape=IMAGE,
    )
    watch = Watch()
    Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        limit_train_batches=STEPS,
        limit_val_batches=0,
        callbacks=[watch, SuperpixelSegments(segments=9)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(module, data())
    return watch.losses, module.distiller.state_dict()


def losses_in_a_plain_loop():
    student, teacher = networks()
    for network in (student, teacher):
        network.build(num_classes=10, image_shape=IMAGE)
    teacher = FrozenTeacher(teacher)
    objective = Objective({"task": Term(CrossEntropy()), **terms()}, student.spec, teacher.spec)
    distiller = Distiller(student, teacher, objective)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
    digits = data()
    digits.setup("fit")
    loader = digits.train_dataloader()
    total = EPOCHS * STEPS
    objective.prepare(
        RunInfo(Progress(0, 0.0, total, EPOCHS), batch_size=8, provides=RunInfo().provides | {"segments"})
    )
    losses = []
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)
        for _, batch in zip(range(STEPS), loader, strict=False):
            step = len(losses)
            progress = Progress(step, step / STEPS, total, EPOCHS)
            loss = distiller(add_segments(batch, segments=9), progress).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, distiller.state_dict()


def test_a_plain_loop_has_the_losses_and_the_weights_of_the_lightning_run_bit_for_bit(tmp_path):
    expected, module_state = losses_under_lightning(tmp_path)
    losses, state = losses_in_a_plain_loop()
    assert len(losses) == EPOCHS * STEPS
    assert losses == expected
    assert state.keys() == module_state.keys()
    assert all(torch.equal(tensor, module_state[name]) for name, tensor in state.items())


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Features(logits=torch.randn(4, 5, generator=generator), embedding=torch.randn(4, 6, generator=generator))


BATCH = {"image": torch.zeros(4, 3, 8, 8), "label": torch.tensor([0, 1, -1, 2]), "index": torch.arange(4)}


def test_the_total_is_the_sum_of_the_weighted_values():
    objective = Objective({"task": Term(CrossEntropy(), 0.5), "kd": Term(KD(), Linear(1.0, 3.0))}, SPEC, SPEC)
    losses = objective(features(), features(1), BATCH, Progress(step=5, steps=10))
    assert losses.weights == {"task": 0.5, "kd": 2.0}
    assert torch.equal(losses.total, torch.stack([0.5 * losses.values["task"], 2.0 * losses.values["kd"]]).sum())


def test_factors_multiply_the_weights_and_are_in_the_state():
    objective = Objective({"kd": Term(KD(), 2.0), "rkd": Term(RKD())}, SPEC, SPEC)
    objective.set_factors({"kd": 0.25})
    restored = Objective({"kd": Term(KD(), 2.0), "rkd": Term(RKD())}, SPEC, SPEC)
    restored.load_state_dict(objective.state_dict())
    for each in (objective, restored):
        assert each(features(), features(1), BATCH, Progress()).weights == {"kd": 0.5, "rkd": 1.0}


def test_terms_of_weight_0_and_removed_terms_are_left_out():
    objective = Objective({"kd": Term(KD(), 0.0), "trg": None, "rkd": Term(RKD())}, SPEC, SPEC)
    assert list(objective.terms) == list(objective.heads) == ["rkd"]


def test_the_total_is_finite_in_half_precision_while_a_term_is_skipped():
    objective = Objective({"task": Term(CrossEntropy()), "rkd": Term(RKD(), After(epochs=5))}, SPEC, SPEC)
    embedding = torch.full_like(features()["embedding"], 60000.0, dtype=torch.float16).requires_grad_()
    student = replace(features(), embedding=embedding)
    losses = objective(student, features(1), BATCH, Progress())
    losses.total.backward()
    assert losses.values.keys() == {"task"}
    assert losses.total.item() == pytest.approx(losses.values["task"].item())
    assert not embedding.grad.any()


def test_summaries_by_term_give_the_losses_of_the_features_they_were_made_of():
    objective = Objective({"kd": Term(KD()), "rkd": Term(RKD())}, SPEC, SPEC)
    summaries = objective.summarize(features(1), BATCH, Progress())
    assert {name: type(summary) for name, summary in summaries.items()} == {"kd": Summary, "rkd": Summary}
    assert summaries["kd"].embedding is None
    live, stored = (objective(features(), teacher, BATCH, Progress()) for teacher in (features(1), summaries))
    assert torch.equal(live.total, stored.total)


def test_each_term_reads_the_teacher_it_names():
    terms = {"a": Term(KD(), teacher="large"), "b": Term(RKD(), teacher="old"), "task": Term(CrossEntropy())}
    objective = Objective(terms, SPEC, {"large": SPEC, "old": SPEC})
    assert objective.active(Progress()) == {"large": ["a"], "old": ["b"]}
    losses = objective(features(), {"large": features(1), "old": features(2)}, BATCH, Progress())
    alone = Objective({"a": Term(KD())}, SPEC, SPEC)(features(), features(1), BATCH, Progress())
    assert torch.equal(losses.values["a"], alone.values["a"])


class Cautious(Head):
    """Refuses short runs."""

    def prepare(self, run):
        raise UserError("size must be at least 9, given 3")

    def forward(self, student, teacher, batch):
        return student["logits"].sum()


class Vanishing(Schedule):
    """A number until step 3, then none."""

    def __call__(self, progress):
        return 1.0 if progress.step < 3 else math.nan


def test_a_negative_weight_is_legal():
    losses = Objective({"kd": Term(KD(), -0.5)}, SPEC, SPEC)(features(), features(1), BATCH, Progress())
    assert losses.total == -0.5 * losses.values["kd"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective({"kd": Term(KD(), 0.0)}, SPEC, SPEC), "no term of the loss has a weight"),
        (lambda: Objective({"lr": Term(KD())}, SPEC, SPEC), "model.heads: a term cannot be called 'lr'"),
        (lambda: Objective({"kd": Term(KD())}, SPEC), "model.heads.kd.head: KD compares with a teacher"),
        (
            lambda: Objective({"kd": Term(KD())}, SPEC, {"a": SPEC, "b": SPEC}),
            "model.heads.kd.head: there are several teachers, a, b: name one",
        ),
        (
            lambda: Objective({"kd": Term(KD(), teacher="c")}, SPEC, {"a": SPEC}),
            "model.heads.kd.head: there is no teacher 'c': known is 'a'",
        ),
        (
            lambda: Objective({"kd": Term(KD())}, SPEC, FeatureSpec(embedding=(6,))),
            "model.heads.kd.head: KD needs 'logits' of the teacher",
        ),
        (
            lambda: Objective({"mine": Term(Cautious())}, SPEC, SPEC).prepare(RunInfo()),
            "model.heads.mine.head: size must be at least 9, given 3",
        ),
        (
            lambda: Objective({"kd": Term(KD(), Until())}, SPEC, SPEC).prepare(RunInfo()),
            "model.heads.kd.weight: Until over a run without an end needs steps or epochs",
        ),
        (
            lambda: Objective({"kd": Term(KD(temperature=Linear(4.0, 1.0)))}, SPEC, SPEC).prepare(RunInfo()),
            "model.heads.kd.head.temperature: Linear over a run without an end",
        ),
        (
            lambda: Objective({"kd": Term(KD(), Vanishing())}, SPEC, SPEC).prepare(
                RunInfo(Progress(steps=5, epochs=1))
            ),
            "model.heads.kd.weight: Vanishing gives nan at step 3, but every value must be finite",
        ),
        (
            lambda: Objective({"kd": Term(KD(), math.nan)}, SPEC, SPEC),
            "model.heads.kd.weight must be finite, given nan",
        ),
        (lambda: Objective({"task": Term(KD(), math.inf)}, SPEC, SPEC), "model.task.weight must be finite, given inf"),
        (
            lambda: Objective(
                {"a": Term(SeRKD(superpixels="segments"))},
                FeatureSpec(tokens=(16, 6), grid=(4, 4)),
                FeatureSpec(tokens=(16, 6), grid=(4, 4)),
            ).prepare(RunInfo()),
            "model.heads.a.head: SeRKD needs segments: add the callback SuperpixelSegments",
        ),
    ],
)
def test_a_mistake_is_told_before_step_0_with_the_key_of_the_term(make, message):
    with pytest.raises(UserError, match=message.replace("'", "['\"]")):
        make()
