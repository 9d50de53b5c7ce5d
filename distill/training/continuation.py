"""Training that continues from a checkpoint: its state, with the settings of the configuration."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from distill.errors import UserError

_PLATEAU_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class Continuation:
    """Continuation of a module's training from a checkpoint, if it is given one.

    Attributes:
        settings: a description of the optimizer and its scheduler, which a checkpoint contains, so that a later run
            can tell whether its settings are the same; `None` until they are made.
    """

    def __init__(self) -> None:
        self.settings: dict[str, str] | None = None
        self._checkpoint: dict[str, Any] | None = None

    def load(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Take the checkpoint that Lightning has loaded and is going to restore the training from.

        The settings of the trainer's callbacks are kept.
        """
        self._checkpoint = checkpoint
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
        for callback in callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if state and isinstance(callback, EarlyStopping):
                state["patience"] = callback.patience

    def configure(
        self,
        optimizer: Optimizer,
        scheduler: Mapping[str, Any] | None,
        source: Any,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    ) -> None:
        """Note the settings of a new optimizer, and let the loaded checkpoint follow them if there is one.

        Args:
            optimizer: the optimizer, before its first step.
            scheduler: Lightning's settings of the scheduler, if there is one.
            source: the object that the scheduler was made of, since a scheduler does not show the functions it calls.
            make_optimizer: creates an optimizer of given parameters with the same settings.

        Raises:
            UserError: see `follow_configuration`.
        """
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # as most schedulers do; plateau schedulers do not
        groups = [group | {"params": len(group["params"])} for group in optimizer.param_groups]
        described = _describe({"groups": groups, "scheduler": scheduler, "source": source})
        self.settings = {
            "optimizer": _name(type(optimizer)),
            "interval": "" if scheduler is None else scheduler["interval"],
            "settings": json.dumps(described, sort_keys=True),
        }
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            follow_configuration(checkpoint, optimizer, scheduler, self.settings, make_optimizer)


def follow_configuration(
    checkpoint: dict[str, Any],
    optimizer: Optimizer,
    scheduler: Mapping[str, Any] | None,
    settings: Mapping[str, str],
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
) -> None:
    """Change a loaded checkpoint so that training continues with the settings of the configuration.

    The checkpoint keeps the optimizer's state, such as moments, and the position of the scheduler. If the settings are
    those of the checkpoint, nothing changes. Otherwise the settings of the parameter groups become those of the new
    optimizer, and the scheduler is stepped from the beginning to the checkpoint's position, which gives every scheduler
    the rate that it has there under the new settings. `ReduceLROnPlateau` keeps the reductions made so far.

    Args:
        checkpoint: the checkpoint, before Lightning restores the optimizer.
        optimizer: the new optimizer.
        scheduler: Lightning's settings of the new scheduler, if there is one.
        settings: the description of the two.
        make_optimizer: creates an optimizer of given parameters with the same settings.

    Raises:
        UserError: the checkpoint has no optimizer, one of another class or with other parameters, or the scheduler
            cannot be at the checkpoint's position.
    """
    if "optimizer_states" not in checkpoint:
        raise UserError("ckpt_path: the checkpoint has only weights: load them with model.student.weights")
    saved = checkpoint["distill"].get("optimizer", {})
    if saved == settings:
        return
    state = checkpoint["optimizer_states"][0]
    _require_same_parameters(saved.get("optimizer"), state["param_groups"], optimizer)
    changes = _changes(state["param_groups"], optimizer)
    checkpoint["lr_schedulers"] = [
        _advanced(config, optimizer, checkpoint) for config in ([] if scheduler is None else [scheduler])
    ]
    state["param_groups"] = [
        _merged(old, new, optimizer) for old, new in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    _complete_state(state, optimizer, make_optimizer)
    rank_zero_info(
        "ckpt_path: weights, the optimizer's state and the position of the scheduler are the checkpoint's; the other "
        f"settings are the configuration's{': ' if changes else ''}{', '.join(changes)}"
    )


def _require_same_parameters(name: str | None, saved: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> None:
    remedy = "give the same, or start from the weights alone with model.student.weights"
    if name is not None and name != _name(type(optimizer)):
        raise UserError(
            f"model.optimizer: the checkpoint was trained with {name}, given {_name(type(optimizer))}: {remedy}"
        )
    before, now = ([len(group["params"]) for group in groups] for groups in (saved, optimizer.param_groups))
    if before != now:
        raise UserError(
            f"model.optimizer: the checkpoint's groups have {_listed(before)} parameters, and those of the "
            f"configuration {_listed(now)} (see model.weight_decay_on, and callbacks that freeze layers): {remedy}"
        )


def _changes(saved: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> list[str]:
    """List the settings that differ, as "lr 0.1 (was 0.01)"; those moved by a scheduler are compared at its start."""
    found: dict[str, None] = {}
    for old, new in zip(saved, optimizer.param_groups, strict=True):
        for name in sorted(_arguments(optimizer) & new.keys() - {"params"}):
            key = "initial_lr" if name == "lr" and "initial_lr" in old else name
            if key in old and old[key] != new[key]:
                found[f"{name} {new[key]} (was {old[key]})"] = None
    return list(found)


def _merged(saved: Mapping[str, Any], new: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return a group with the new settings, and with the counters that some optimizers keep in a group."""
    counters = set(optimizer.defaults) - _arguments(optimizer)
    return {**saved, **{name: value for name, value in new.items() if name not in counters}, "params": saved["params"]}


def _advanced(config: Mapping[str, Any], optimizer: Optimizer, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a new scheduler at the checkpoint's position; the groups' rates become those there."""
    scheduler = config["scheduler"]
    if isinstance(scheduler, ReduceLROnPlateau):
        return _reduced(scheduler, optimizer, checkpoint)
    position = _position(checkpoint, config["interval"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects a step of the optimizer before each
            for _ in range(position):
                scheduler.step()
    except ValueError as error:
        raise UserError(
            f"model.scheduler: {type(scheduler).__name__} cannot continue after {position} {config['interval']}s, "
            f"where the checkpoint is ({error})"
        ) from error
    return dict(scheduler.state_dict())


def _reduced(scheduler: ReduceLROnPlateau, optimizer: Optimizer, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a plateau scheduler that keeps the reductions and the best value of the checkpoint's."""
    state: dict[str, Any] = scheduler.state_dict()
    saved: Mapping[str, Any] = next(iter(checkpoint.get("lr_schedulers", [])), {})
    if not all(name in saved for name in _PLATEAU_STATE):
        return state
    for group, old, least in zip(
        optimizer.param_groups, checkpoint["optimizer_states"][0]["param_groups"], scheduler.min_lrs, strict=True
    ):
        share = old["lr"] / old["initial_lr"] if old.get("initial_lr") else 1.0
        group["lr"] = max(group["lr"] * share, min(least, group["lr"]))
    rates = {"_last_lr": [group["lr"] for group in optimizer.param_groups]}
    if (saved.get("monitor"), saved["mode"]) != (state.get("monitor"), state["mode"]):
        return state | rates  # the best value so far was one of another metric
    return state | rates | {name: saved[name] for name in _PLATEAU_STATE}


def _position(checkpoint: Mapping[str, Any], interval: str) -> int:
    """Return the number of steps or epochs after which the checkpoint was saved.

    The scheduler's own count comes first, since Lightning takes an epoch in which training ended for a complete one.
    """
    saved: Any = next(iter(checkpoint.get("lr_schedulers", [])), {})
    if checkpoint["distill"].get("optimizer", {}).get("interval") == interval:
        while "last_epoch" not in saved and saved.get("_schedulers"):  # of a chain
            saved = saved["_schedulers"][0]
        if "last_epoch" in saved:
            return int(saved["last_epoch"])
    if interval == "step":
        return int(checkpoint["global_step"])
    loops = checkpoint["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]["current"]
    is_in_last_batch = loops["epoch_loop.batch_progress"]["is_last_batch"] and epochs["started"] > epochs["processed"]
    return int(epochs["processed"]) + int(is_in_last_batch)


def _complete_state(
    state: Mapping[str, Any], optimizer: Optimizer, make: Callable[[list[nn.Parameter]], Optimizer]
) -> None:
    """Add the tensors that the new settings need and the saved ones did not, such as those of `amsgrad`, as zeros."""
    trial = nn.Parameter(torch.zeros(2, 2))
    trial.grad = torch.zeros_like(trial)
    stepped = make([trial])
    stepped.step()
    needed = [name for name, value in stepped.state[trial].items() if isinstance(value, Tensor) and value.ndim]
    for old, new in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for index, parameter in zip(old["params"], new["params"], strict=True):
            if saved := state["state"].get(index):
                missing = [name for name in needed if name not in saved]
                saved |= {name: torch.zeros_like(parameter, device="cpu") for name in missing}


def _arguments(optimizer: Optimizer) -> set[str]:
    """Return the names of an optimizer's settings: the arguments of its class and of the classes above it."""
    owners = (owner for owner in type(optimizer).__mro__ if issubclass(owner, Optimizer))
    return {name for owner in owners for name in signature(owner).parameters}


def _describe(value: Any, depth: int = 8) -> Any:
    """Return a value as a tree of plain values, the same in every process: no addresses, and no optimizers."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, type) or depth == 0:
        return _name(value if isinstance(value, type) else type(value))
    if isinstance(value, Mapping):
        return {str(key): _describe(item, depth - 1) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, Sequence):
        return [_describe(item, depth - 1) for item in value]
    if isinstance(value, Optimizer | nn.Module | Trainer):
        return _name(type(value))
    if callable(value) and hasattr(value, "__qualname__"):
        return _name(value)
    return {"class": _name(type(value)), **{key: _describe(item, depth - 1) for key, item in _attributes(value)}}


def _attributes(value: Any) -> list[tuple[str, Any]]:
    named = [(name, getattr(value, name)) for name in ("func", "args", "keywords") if hasattr(value, name)]  # a partial
    return [*vars(value).items(), *named] if hasattr(value, "__dict__") else named


def _name(item: Any) -> str:
    return f"{item.__module__}.{item.__qualname__}"


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))
