"""The `distill weigh` command: each term's gradient relative to the task's, and the weight that gives it a share."""

from __future__ import annotations

from math import isfinite
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelSummary, ProgressBar, Timer
from lightning.pytorch.loggers.logger import DummyLogger
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table

from distill.callbacks import GradientShares, HeadPictures, KNNProbe, Results, WandbReport
from distill.callbacks.gradient_meter import At
from distill.callbacks.weighing import Weighing
from distill.cli.folders import refuse_output, writing
from distill.cli.rehearsal import BeforeFirstStep, rehearse_scheduler
from distill.cli.saved_configuration import SaveConfiguration
from distill.cli.weight_advice import Advice, advise
from distill.errors import require_above, require_at_least
from distill.files import write_atomic
from distill.runs.checkpoints import read_checkpoint
from distill.training.classification import ClassificationModule

_LEFT_OUT = (
    *(Checkpoint, EarlyStopping, ModelSummary, ProgressBar, Timer),
    *(BeforeFirstStep, GradientShares, HeadPictures, KNNProbe, Results, SaveConfiguration, WandbReport),
)
"""Callbacks that write, show, stop or await something; all others, such as one that adds to the batch, stay."""


_WIDEST = 8
"""Number of terms up to which the cosines of all pairs fit into a table."""


def weigh(
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule | None,
    steps: int,
    warmup: int,
    share: float,
    at: At,
    ckpt_path: str | None,
    output: str | None,
) -> None:
    """Train for a while, measure the gradients of all terms, and print the weight at which each has a share.

    Raises:
        UserError: an argument out of its range, a run that is too short, or terms that cannot be compared.
    """
    require_above(0, share=share)
    require_at_least(1, steps=steps)
    require_at_least(0, warmup=warmup)
    if output is not None:
        refuse_output(output)
    assert isinstance(module, ClassificationModule)
    if ckpt_path is not None:
        _load(trainer, module, ckpt_path)
    weighing = _without_traces(trainer, steps, warmup, at)
    trainer.fit(module, datamodule=data)
    if not trainer.is_global_zero:
        return
    advice = advise(weighing, module.distiller.objective, trainer, share)
    console = Console()
    _say(console, advice.title)
    _say(console, f"ratio: |g| / |g of {advice.reference}|; share: the same of the weighted gradients; all are medians")
    console.print(_table(advice))
    if 2 < len(advice.cosines) <= _WIDEST:
        console.print(_cosines(advice))
    elif len(advice.cosines) > _WIDEST:
        _say(console, f"cosines beyond 0.5: {_close_pairs(advice) or 'none'}")
    for note in [*advice.notes, CAUTION]:
        _say(console, note)
    if output is not None:
        with writing(output):
            write_atomic(output, _configuration(advice).encode())
        _say(console, f"{output}: add it to the configuration, --config ... --config {output}")


def _load(trainer: Trainer, module: ClassificationModule, path: str) -> None:
    """Load the student, and of the heads' tensors those that fit."""
    checkpoint = dict(read_checkpoint(path))
    module.trainer = trainer
    module.on_load_checkpoint(checkpoint)  # outside of training, it leaves out what does not fit
    module.load_state_dict(checkpoint["state_dict"])


def _without_traces(trainer: Any, steps: int, warmup: int, at: At) -> Weighing:
    """Let the trainer measure and stop, and neither write, validate, nor show anything else."""
    shown = any(isinstance(callback, ProgressBar) for callback in trainer.callbacks)
    weighing = Weighing(steps, warmup, at, show_progress=shown)
    kept: list[Callback] = [callback for callback in trainer.callbacks if not isinstance(callback, _LEFT_OUT)]
    trainer.callbacks = [*kept, _WithoutPlateaus(), weighing]
    trainer.loggers = [DummyLogger()]
    trainer.limit_val_batches = trainer.num_sanity_val_steps = 0
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
    return weighing


class _WithoutPlateaus(Callback):
    """Leaves out a scheduler that waits for a metric, which a validation or a whole epoch would give."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the scheduler unless it is left out."""
        strategy = trainer.strategy
        strategy.lr_scheduler_configs = [each for each in strategy.lr_scheduler_configs if not each.reduce_on_plateau]
        if strategy.lr_scheduler_configs and isinstance(pl_module, ClassificationModule):
            rehearse_scheduler(trainer, pl_module)


def _close_pairs(advice: Advice) -> str:
    names = list(advice.cosines)
    pairs = [(name, partner) for number, name in enumerate(names) for partner in names[number + 1 :]]
    return ", ".join(
        f"{name} {partner} {cosine:.2f}"
        for name, partner in pairs
        if abs(cosine := advice.cosines[name][partner]) > 0.5
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _table(advice: Advice) -> Table:
    table = Table(box=SIMPLE_HEAVY, pad_edge=False)
    table.add_column("term", min_width=min(12, max(len(term.name) for term in advice.terms)), overflow="fold")
    last = f"for share {advice.share:g}"
    for name in ("value", "ratio", "quartiles", "cosine", "weight", "share", last):
        table.add_column(name, justify="right", no_wrap=name != last)
    for term in advice.terms:
        first, middle, third = term.ratios
        is_reference = term.name == advice.reference
        table.add_row(
            term.name,
            _number(term.value),
            _number(middle),
            f"{_number(first)}-{_number(third)}" if isfinite(middle) and not is_reference else "",
            f"{term.cosine:.2f}" if isfinite(term.cosine) else "",
            _number(term.weight),
            _number(term.share),
            "" if term.advised is None else _number(term.advised),
        )
    return table


def _cosines(advice: Advice) -> Table:
    table = Table(box=SIMPLE_HEAVY, pad_edge=False)
    names = list(advice.cosines)
    table.add_column("cosines")
    for name in names:
        table.add_column(name, justify="right")
    for name in names:
        row = advice.cosines[name]
        table.add_row(name, *("" if partner == name else f"{row[partner]:.2f}" for partner in names))
    return table


def _configuration(advice: Advice) -> str:
    """Return the weights as a configuration that composes with the one they were computed from."""
    comment = (
        f"# Weights at which each term's gradient has {advice.share:g} of that of {advice.reference}. {advice.title}.\n"
        "# Add it after the configuration that it was computed from: --config X --config this.yaml\n"
    )
    weights: str = yaml.safe_dump({"model": {"heads": dict(advice.heads)}}, sort_keys=False)
    return comment + weights


def _number(value: float) -> str:
    if not isfinite(value):
        return ""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


CAUTION = (
    "A share is a starting point, not an optimum: it says how hard a term pulls at the student in these steps, not "
    "whether that helps. The ratios change during training, each weight is computed for its term alone, and no "
    "accuracy was looked at."
)
