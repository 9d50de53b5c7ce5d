"""The superpixel callback through the real command line."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from distill.__main__ import main
from distill.callbacks import SuperpixelSegments
from distill.cli.program import run
from distill.data import Digits
from distill.heads import Head
from distill.networks import TorchModule
from distill.objective import Term
from distill.superpixels import slic
from distill.training.distillation import DistillationModule
from tests.program import TINY

NETWORKS = [
    *TINY,
    "--model.student.name=test_vit",
    "--model.student.options={patch_size: 8}",
    "--model.teacher=Timm",
    "--model.teacher.name=test_vit",
    "--model.teacher.options={patch_size: 4}",
]
SEGMENTS = [
    "--model.heads.serkd.head=SeRKD",
    "--model.heads.serkd.head.superpixels=segments",
    "--model.heads.serkd.head.count=9",
]
CALLBACK = ["--trainer.callbacks=SuperpixelSegments", "--trainer.callbacks.segments=9"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Reader(Head):
    """Keeps the batches that it receives."""

    batch_needs = frozenset({"segments"})
    needs = frozenset({"logits"})

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, torch.Tensor]] = []

    def forward(self, student, teacher, batch):
        if self.training:  # and not in a validation
            self.batches.append(batch)
        return student["logits"].sum() * 0.0


def test_segments_are_computed_from_the_mixed_image():
    mixing = ["--data.mixing.cutmix=1.0", "--data.mixing.mixup=0.5"]
    cli = run(["fit", *NETWORKS, "--model.heads.a.head=tests.callbacks.test_superpixels.Reader", *CALLBACK, *mixing])
    batches = cli.model.terms["a"].head.batches
    assert len(batches) == 2
    for batch in batches:
        assert batch["label"].ndim == 2, "the batch was mixed"
        assert batch["segments"].dtype == torch.int64
        assert torch.equal(batch["segments"], slic(batch["image"], 9))


def test_cutmix_pastes_the_segments_of_workers_together_with_the_pixels():
    cli = run(
        [
            *("fit", *NETWORKS, "--model.heads.a.head=tests.callbacks.test_superpixels.Reader", *CALLBACK),
            *("--trainer.callbacks.in_workers=true", "--data.mixing.cutmix=1.0", "--data.num_workers=1"),
        ]
    )
    train = cli.datamodule.samples("train")
    for batch in cli.model.terms["a"].head.batches:
        labels = batch["segments"]
        assert labels.dtype == torch.int64
        images = torch.stack([train[(0, int(index))]["image"] for index in batch["index"]])
        segments = slic(images, 9)
        is_pasted = labels % 2 == 1
        half = len(images) // 2
        partner_segments = segments.roll(half, 0)
        assert torch.equal(labels // 2, torch.where(is_pasted, partner_segments, segments))
        assert torch.equal(batch["image"], torch.where(is_pasted.unsqueeze(1), images.roll(half, 0), images)), (
            "segments move with the pixels"
        )
        assert is_pasted.any(), "a box was pasted"


class Stop(Callback):
    """Fails in the first step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise ArithmeticError


def segments_seen(data, *callbacks):
    """Train for a step on a data module and return the number of segments in its batch, if any."""
    reader = Reader()
    module = DistillationModule(
        student=TorchModule(nn.Sequential(nn.Flatten(), nn.Linear(192, 10))),
        teacher=TorchModule(nn.Sequential(nn.Flatten(), nn.Linear(192, 10))),
        heads={"a": Term(reader)} if callbacks else {},
        optimizer=partial(torch.optim.SGD, lr=0.1),
        data=data,
    )
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(int(batch["segments"].max()) + 1 if "segments" in batch else None)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[*callbacks, Look()],
        max_steps=1,
        limit_val_batches=0,
        enable_model_summary=False,
        **quiet,
    )
    trainer.fit(module, data)
    return seen[0]


def test_segments_of_one_run_do_not_reach_the_next_on_the_same_data():
    def fields(image):
        return {"mean": image.mean()}

    data = Digits(image_size=8, batch_size=8)
    assert segments_seen(data, SuperpixelSegments(36, in_workers=True)) > 9
    assert segments_seen(data, SuperpixelSegments(9)) <= 9
    assert segments_seen(data, SuperpixelSegments(4, in_workers=True)) <= 4
    assert segments_seen(data) is None
    with pytest.raises(ArithmeticError):
        segments_seen(data, SuperpixelSegments(36, in_workers=True), Stop())
    assert segments_seen(data) is None
    data.extra_fields = fields
    assert segments_seen(data, SuperpixelSegments(9)) <= 9
    assert data.extra_fields is fields, "what a user has set stays"


def test_images_blended_by_mixup_are_segmented_again():
    cli = run(
        [
            *("fit", *NETWORKS, "--model.heads.a.head=tests.callbacks.test_superpixels.Reader", *CALLBACK),
            *("--trainer.callbacks.in_workers=true", "--data.mixing.mixup=1.0"),
        ]
    )
    for batch in cli.model.terms["a"].head.batches:
        assert torch.equal(batch["segments"], slic(batch["image"], 9))


def test_workers_compute_the_same_segments_as_the_callback():
    settings = ["fit", *NETWORKS, *SEGMENTS, *CALLBACK]
    by_callback = run([*settings, "--trainer.default_root_dir=here"])
    by_workers = run([*settings, "--trainer.default_root_dir=there", "--trainer.callbacks.in_workers=true"])
    metrics, worker_metrics = by_callback.trainer.callback_metrics, by_workers.trainer.callback_metrics
    assert torch.equal(metrics["train/serkd"], worker_metrics["train/serkd"])
    assert "train/superpixels_ms" not in by_workers.trainer.callback_metrics


def test_it_does_nothing_if_no_head_reads_segments():
    class Recorder(Callback):
        has_segments = False

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            Recorder.has_segments = "segments" in batch

    cli = run(["fit", *NETWORKS, "--model.heads.kd.head=KD", *CALLBACK, "--trainer.default_root_dir=a"])
    cli.trainer.callbacks.append(Recorder())
    cli.trainer.fit_loop.max_epochs = 2
    cli.trainer.fit(cli.model, cli.datamodule)
    assert not Recorder.has_segments
    assert "train/superpixels_ms" not in cli.trainer.callback_metrics


def test_serkd_trains_on_segments_and_logs_their_time():
    cli = run(["fit", *NETWORKS, *SEGMENTS, *CALLBACK])
    assert cli.trainer.callback_metrics["train/superpixels_ms"] > 0
    assert torch.isfinite(cli.trainer.callback_metrics["train/serkd"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (SEGMENTS, "model.heads.serkd.head: SeRKD needs segments: add the callback SuperpixelSegments"),
        (
            [*SEGMENTS, "--trainer.callbacks=SuperpixelSegments", "--trainer.callbacks.segments=16"],
            "SuperpixelSegments makes 16 segments, but model.heads.serkd.head.count is 9",
        ),
        (
            [
                *SEGMENTS,
                "--model.heads.serkd.head.count=5000",
                "--trainer.callbacks=SuperpixelSegments",
                "--trainer.callbacks.segments=5000",
            ],
            "SuperpixelSegments: segments must be from 1 to 1024 for images of 32 x 32 pixels, given 5000",
        ),
        ([*SEGMENTS, "--trainer.callbacks=SuperpixelSegments", "--trainer.callbacks.segments=0"], "given 0"),
        (
            [*SEGMENTS, *CALLBACK, "--trainer.callbacks.in_workers=true", "--data.mixing.cutmix=1.0"],
            "makes 9 segments, twice as many after CutMix, but model.heads.serkd.head.count is 9: set it to 18",
        ),
    ],
    ids=["no callback", "more than the head accepts", "more than pixels", "none", "pasted segments"],
)
def test_invalid_settings_are_rejected_before_step_0(args, message, tmp_path, capsys):
    assert main(["fit", *NETWORKS, *args]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
