"""Numbers of a configuration that no run can have, whatever class they are for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from distill.errors import UserError

_LEAST = {  # of Lightning's and torch's classes, which accept some of these and then fail late or do nothing
    "trainer.num_nodes": 1,
    "trainer.max_epochs": -1,
    "trainer.min_epochs": 0,
    "trainer.max_steps": -1,
    "trainer.min_steps": 0,
    "trainer.limit_train_batches": 0,
    "trainer.limit_val_batches": 0,
    "trainer.limit_test_batches": 0,
    "trainer.limit_predict_batches": 0,
    "trainer.overfit_batches": 0,
    "trainer.val_check_interval": 0,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.num_sanity_val_steps": -1,
    "trainer.log_every_n_steps": 0,
    "trainer.accumulate_grad_batches": 1,
    "trainer.gradient_clip_val": 0,
    "trainer.reload_dataloaders_every_n_epochs": 0,
    "checkpoint.save_top_k": -1,
    "checkpoint.every_n_train_steps": 1,
    "checkpoint.every_n_epochs": 1,
    "data.init_args.num_workers": 0,
    "data.init_args.batch_size": 1,
    "model.scheduler.init_args.T_0": 1,
    "model.scheduler.init_args.T_max": 1,
    "model.scheduler.init_args.cooldown": 0,
    "model.scheduler.init_args.eta_min": 0,
    "model.scheduler.init_args.patience": 0,
    "model.scheduler.init_args.step_size": 1,
    "model.scheduler.init_args.total_iters": 1,
    "model.scheduler.init_args.total_steps": 1,
    "seed_everything": 0,
}
_LIMITS = {  # lengths of which 0 leaves the command nothing to do
    "fit": ("trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches"),
    "check": ("trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches"),
    "validate": ("trainer.limit_val_batches",),
    "test": ("trainer.limit_test_batches",),
    "predict": ("trainer.limit_predict_batches",),
    "plot": ("trainer.limit_val_batches",),
}
_MOST_SEED = 2**32 - 1


def refuse_numbers(config: Mapping[str, Any], command: str) -> None:
    """Refuse NaN and infinity anywhere, negative lengths and counts, and a run of no steps.

    Args:
        config: the configuration as a tree.
        command: the command that runs with it.

    Raises:
        UserError: a number makes no sense; the message names its key.
    """
    for name, term in ((config.get("model") or {}).get("heads") or {}).items():
        if isinstance(term, Mapping) and "weight" in term and term["weight"] is None:
            raise UserError(f"model.heads.{name}.weight is null: give a number, or 0 to leave the term out")
    empty = _LIMITS.get(command, ())
    for key, value in _numbers(config, ""):
        name = key.replace(".init_args.", ".")
        if not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, given {'NaN' if math.isnan(value) else value}")
        if key in _LEAST and value < _LEAST[key]:
            unlimited = " (-1 means no limit)" if _LEAST[key] == -1 else ""
            raise UserError(f"{name} must be at least {_LEAST[key]}{unlimited}, given {value}")
        if key == "trainer.val_check_interval" and value == 0:
            raise UserError(f"{name} must be above 0, given {value}")
        if key in empty and value == 0:
            raise UserError(f"{name} is 0, so there would be nothing to {_DOES.get(command, 'do')}")
        if key == "seed_everything" and value > _MOST_SEED:
            raise UserError(f"{name} must be at most {_MOST_SEED}, given {value}")
        if key.startswith("trainer.limit_") and isinstance(value, float) and value > 1:
            raise UserError(f"{name} is a share up to 1.0 or a whole number of batches, given {value}")


def _numbers(tree: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(tree, Mapping):
        for name, part in tree.items():
            yield from _numbers(part, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple):
        for i, part in enumerate(tree):
            yield from _numbers(part, f"{key}[{i}]")
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield key, tree


_DOES = {"fit": "train", "check": "train", "validate": "validate", "test": "test", "predict": "predict"}
