"""`distill weigh`: the weights it proposes have the share asked for, and it leaves nothing behind."""

import re

import pytest
import yaml
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn.functional import mse_loss

from distill.__main__ import main
from distill.callbacks.weighing import Weighing
from distill.cli.program import run
from distill.cli.weight_advice import scaled_weight
from distill.heads import RKD, Batch, Head
from distill.schedules import Linear, Schedule, Until, Warmup
from tests.program import KD, TEACHER, TINY

RKD_HEAD = ["--model.heads.rkd.head=RKD"]
SHORT = ["--trainer.limit_train_batches=6", "--steps=3", "--warmup=2"]
FREE = [option for option in TINY if "limit_train" not in option]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def weighed(capsys, *args):
    """Return the printed rows by term, and the whole output."""
    assert main(["weigh", *FREE, *args]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.split("cosines")[0].splitlines()]
    return {row[0]: row[1:] for row in rows if row}, printed


class Times(RKD):
    """RKD, times a constant.

    Args:
        factor: the constant.
    """

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, student, teacher, batch):
        return self.factor * super().forward(student, teacher, batch)


def proposed(path):
    return yaml.safe_load(path.read_text())["model"]["heads"]


def test_the_proposed_weights_compose_and_have_the_share(tmp_path, capsys):
    settings = [*TEACHER, *KD, *RKD_HEAD, *SHORT, "--warmup=0", "--steps=1"]
    rows, printed = weighed(capsys, *settings, "--share=0.3", "--output=weights.yaml")
    assert {path.name for path in tmp_path.iterdir()} == {"weights.yaml"}, "nothing else is kept"
    assert rows.keys() >= {"task", "kd", "rkd"}
    assert "A share is a starting point, not an optimum" in printed
    heads = proposed(tmp_path / "weights.yaml")
    assert f"{heads['rkd']['weight']:.3g}" == rows["rkd"][-1]
    again, _ = weighed(capsys, *settings, "--config=weights.yaml")
    for name in ("kd", "rkd"):
        assert float(again[name][-2]) == pytest.approx(0.3, rel=0.01)
        assert float(again[name][-3]) == heads[name]["weight"]


@pytest.mark.slow
def test_a_value_that_is_multiplied_has_its_weight_divided(tmp_path, capsys):
    times = ["--model.heads.rkd.head=tests.cli.test_weigh.Times", "--model.heads.rkd.weight"]
    weighed(capsys, *TEACHER, *times[:1], *SHORT, "--output=once.yaml")
    multiplied = [*times[:1], "--model.heads.rkd.head.factor=1000", f"{times[1]}=0.001"]
    weighed(capsys, *TEACHER, *multiplied, *SHORT, "--output=multiplied.yaml")
    once, thousandth = (proposed(tmp_path / f"{name}.yaml")["rkd"]["weight"] for name in ("once", "multiplied"))
    assert thousandth == pytest.approx(once / 1000, rel=0.01)


class Silent(Head):
    """Has no gradient."""

    needs = frozenset({"logits"})

    def forward(self, student: "Head", teacher: "Head", batch: Batch) -> Tensor:
        return 0.0 * mse_loss(student["logits"], teacher["logits"])


class Wave(Schedule):
    """A schedule that the program does not know."""

    def __call__(self, progress):
        return 2.0


@pytest.mark.slow
def test_terms_that_cannot_be_measured_are_named(tmp_path, capsys):
    heads = [
        *("--model.heads.hint.head=FitNet", "--model.heads.silent.head=tests.cli.test_weigh.Silent"),
        *("--model.heads.first.head=RKD", "--model.heads.first.weight=Until", "--model.heads.first.weight.steps=4"),
        *("--model.heads.late.head=KD", "--model.heads.late.weight=After"),
        *("--model.heads.late.weight.steps=6", "--model.heads.wave.head=KD"),
        "--model.heads.wave.weight=tests.cli.test_weigh.Wave",
    ]
    stages = ["--model.task.weight=After", "--model.task.weight.steps=4", "--trainer.limit_train_batches=8"]
    _, printed = weighed(
        capsys, *TEACHER, *heads, *stages, "--steps=2", "--warmup=0", "--at=embedding", "--output=weights.yaml"
    )
    for note in (
        "task: its weight is 0 in these steps by its schedule (an initialization stage)",
        "hint: not measured, as its gradient does not reach the embedding.",
        "silent: it has no gradient there in these steps, as in an initialization stage",
        "first: never on at the same time as task by their schedules",
        "late: its weight is 0 in these steps by its schedule",
        "wave: its weight is a schedule of another kind, Wave: multiply it by ",
    ):
        assert note in printed
    written = proposed(tmp_path / "weights.yaml")
    assert list(written) == ["hint", "silent", "first", "late", "wave"], "the file replaces the whole mapping"
    assert main(["check", *FREE, *TEACHER, *heads, *stages[:2], "--config=weights.yaml"]) == 0
    assert "Wave" in capsys.readouterr().out


@pytest.mark.slow
def test_a_memory_is_filled_before_it_is_measured(capsys):
    heads = ["--model.heads.rrd.head=RRD", "--model.heads.rrd.head.size=128"]
    rows, printed = weighed(capsys, *TEACHER, *heads, "--steps=2", "--warmup=1", "--trainer.limit_train_batches=20")
    assert "2 steps from step 8" in printed, "128 rows in batches of 16, of which nine tenths are enough"
    assert float(rows["rrd"][1]) > 0


@pytest.mark.slow
def test_a_memory_that_the_run_does_not_fill_is_named(capsys):
    rows, printed = weighed(capsys, *TEACHER, *KD, "--model.heads.rrd.head=RRD", *SHORT)
    assert "rrd: not measured, as its memory was filled to 0% when the run ended." in printed
    assert "3 steps from step 3" in printed, "the last steps of the run"
    assert float(rows["kd"][1]) > 0


@pytest.mark.slow
def test_without_a_task_the_largest_term_is_the_reference(capsys):
    rows, printed = weighed(
        capsys, *TEACHER, *KD, *RKD_HEAD, *SHORT, "--model.task.weight=0", "--model.heads.kd.weight=1000"
    )
    assert len(rows["kd"]) == len(rows["rkd"]) - 2, "neither quartiles nor a new weight"
    assert "kd: the reference, as there is no task and its weighted gradient is the largest." in printed


class Watch(Callback):
    """Counts the batches that it sees, and notes the trainer's loggers and callbacks."""

    batches = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        Watch.batches += 1
        Watch.others = [type(callback).__name__ for callback in trainer.callbacks]
        trainer.logger.log_metrics({"x": 1.0}, step=0)


@pytest.mark.slow
def test_own_callbacks_and_segments_keep_working_and_nothing_is_written(tmp_path, capsys):
    own = [
        *("--trainer.callbacks=SuperpixelSegments", "--trainer.callbacks.segments=9"),
        *("--trainer.callbacks+=tests.cli.test_weigh.Watch", "--trainer.callbacks+=LearningRateMonitor"),
        *("--trainer.callbacks+=GradientShares", "--trainer.callbacks.every=1", "--trainer.callbacks+=HeadPictures"),
        *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/top1", "--trainer.logger=CSVLogger"),
        *("--trainer.logger.save_dir=logs", "--model.student.name=test_vit", "--model.student.options={patch_size: 8}"),
    ]
    serkd = [
        *("--model.heads.serkd.head=SeRKD", "--model.heads.serkd.head.superpixels=segments"),
        *("--model.heads.serkd.head.count=9", "--model.teacher=Timm", "--model.teacher.name=test_vit"),
        "--model.teacher.options={patch_size: 4}",
    ]
    rows, _ = weighed(capsys, *own, *serkd, *SHORT)
    assert float(rows["serkd"][1]) > 0
    assert Watch.batches == 5
    assert "GradientShares" not in Watch.others
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_checkpoint_is_the_start(tmp_path, capsys):
    fit = ["fit", *TINY, *TEACHER, *KD, "--trainer.default_root_dir=run", "--model.optimizer.lr=1"]
    run(fit)
    start = [*TEACHER, *KD, *RKD_HEAD, "--steps=1", "--warmup=0", "--ckpt_path=run/checkpoints/last.ckpt"]
    rows, _ = weighed(capsys, *start)
    untrained, _ = weighed(capsys, *start[:-1])
    assert rows["kd"][0] != untrained["kd"][0]
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


MISTAKES = {
    "one term": ([*SHORT], "gradients of several terms are compared, but 'task' is the only term"),
    "a share of 0": ([*TEACHER, *KD, "--share=0"], "share must be above 0, given 0"),
    "a negative share": ([*TEACHER, *KD, "--share=-1"], "share must be above 0, given -1"),
    "no steps": ([*TEACHER, *KD, "--steps=0"], "steps must be at least 1, given 0"),
    "a short run": (
        [*TEACHER, *KD, "--trainer.limit_train_batches=9"],
        "steps: the run has 9 optimizer steps, fewer than the 20 of the warm-up and the 50 to measure",
    ),
    "a file that exists": ([*TEACHER, *KD, "--output=here.yaml"], "output: 'here.yaml' already exists"),
    "no checkpoint": ([*TEACHER, *KD, "--ckpt_path=none.ckpt"], "ckpt_path: there is no file 'none.ckpt'"),
    "no shared layer": ([*TEACHER, *KD, "--trainer.callbacks=FrozenBackbone"], "its terms share no layer"),
    "a gradient that is not finite": (
        [*TEACHER, *RKD_HEAD, *SHORT, "--trainer.callbacks=tests.callbacks.test_gradient_shares.Poison"],
        "the gradient of the term 'rkd' is not finite at step 0",
    ),
    "no labels": (
        [*TEACHER, *KD, *SHORT, "--model.task.head=tests.cli.test_weigh.Unlabeled"],
        "the gradient of 'task' was 0 in all 3 measured steps",
    ),
}


class Unlabeled(Head):
    """A loss on labels that finds none."""

    needs = frozenset({"logits"})
    needs_teacher = False

    def forward(self, student: "Head", teacher: "Head", batch: Batch) -> Tensor:
        return 0.0 * student["logits"].sum()


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_in_one_sentence(mistake, tmp_path, capsys):
    (tmp_path / "here.yaml").write_text("mine")
    args, message = MISTAKES[mistake]
    assert main(["weigh", *FREE, *args]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "interval", [[], pytest.param(["--model.scheduler_interval=step"], marks=pytest.mark.slow)], ids=["epoch", "step"]
)
def test_a_scheduler_that_waits_for_a_metric_does_not_matter(interval, tmp_path, capsys):
    plateau = ["--model.scheduler=ReduceLROnPlateau", "--model.scheduler.monitor=val/top1", *interval]
    probe = ["--trainer.callbacks=KNNProbe", "--trainer.callbacks.neighbors=2000"]
    epochs = ["--trainer.max_epochs=3", "--trainer.limit_train_batches=2", "--steps=3", "--warmup=2"]
    rows, _ = weighed(capsys, *TEACHER, *KD, *epochs, *plateau, *probe)
    assert float(rows["kd"][1]) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_scheduler_that_would_make_the_rate_negative_is_refused(capsys):
    falling = ["--model.scheduler=ExponentialLR", "--model.scheduler.gamma=-1"]
    assert main(["weigh", *FREE, *TEACHER, *KD, *SHORT, *falling]) == 2
    assert "ExponentialLR would make the learning rate -0.01" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("afile/w.yaml", "output: 'afile' is a file: give a folder"),
        ("afile/deep/w.yaml", "output: 'afile/deep' cannot be made, since 'afile' is a file: give a folder"),
        (f"{'w' * 300}.yaml", "cannot be used: File name too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_first_step(output, sentence, tmp_path, capsys):
    (tmp_path / "afile").write_text("mine")
    assert main(["weigh", *FREE, *TEACHER, *KD, *SHORT, f"--output={output}"]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not printed.out
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_schedule_is_scaled_as_a_whole():
    scaled = scaled_weight(Warmup(value=Linear(2.0, 1.0, steps=5), epochs=3), 3.0)
    assert scaled["class_path"] == "distill.schedules.Warmup"
    assert scaled["init_args"]["epochs"] == 3
    assert scaled["init_args"]["start"] == 0.0, "a factor"
    inner = scaled["init_args"]["value"]
    assert inner == {
        "class_path": "distill.schedules.Linear",
        "init_args": {"start": 6.0, "end": 3.0, "steps": 5, "after": 0},
    }
    assert scaled_weight(Until(value=50.0, epochs=30), 0.1)["init_args"] == {"value": 5.0, "epochs": 30}
    assert scaled_weight(Wave(), 2.0) is None
    assert scaled_weight(0.5, 1 / 3) == 0.167


@pytest.mark.slow
def test_a_step_count_is_not_shown_without_a_progress_bar(capsys):
    assert Weighing(show_progress=False)._bar is None
    weighed(capsys, *TEACHER, *KD, *SHORT)
    assert not re.search(r"warm-up|measuring", capsys.readouterr().err)
