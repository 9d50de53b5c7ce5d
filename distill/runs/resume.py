"""Rules for the configuration changes that a resumed run allows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_ABSENT = object()


def _is_not_shorter(before: Any, now: Any) -> bool:
    """Return True if a run's length has not become shorter; `None` and -1 mean no limit."""
    return now in (None, -1) or (before not in (None, -1) and now >= before)


def _influential(callbacks: Any) -> list[Any]:
    """Return the callbacks that may influence training."""
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    return [callback for callback in callbacks if not _is_observer(callback)]


def _is_observer(callback: Mapping[str, Any]) -> bool:
    name = callback["class_path"].rsplit(".", 1)[-1]
    if name == "GradientShares":  # with a balance, it sets weights
        return not (callback.get("init_args") or {}).get("balance")
    return name in _OBSERVERS


_OBSERVERS = (  # callbacks that do not influence training
    "DeviceStatsMonitor",
    "HeadPictures",
    "LearningRateMonitor",
    "RichModelSummary",
    "RichProgressBar",
    "TQDMProgressBar",
)
_ALLOWED = (  # keys that do not influence training; the module itself compares the teacher's weights
    "ckpt_path",
    "resume",
    "weights_only",
    "checkpoint",
    "data.init_args.num_workers",
    "model.teacher.init_args.weights",
    "trainer.accelerator",
    "trainer.barebones",
    "trainer.default_root_dir",
    "trainer.enable_checkpointing",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.max_time",
    "trainer.num_sanity_val_steps",
    "trainer.profiler",
    "trainer.strategy",
)
_RULES: dict[str, Callable[[Any, Any], bool]] = {
    "trainer.callbacks": lambda before, now: _influential(before) == _influential(now),
    "trainer.max_epochs": _is_not_shorter,
    "trainer.max_steps": _is_not_shorter,
}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the differences between two configurations that influence training, as "KEY is X, was Y".

    Ignored are a longer run and settings of only the folder, the output or the hardware.

    Args:
        before: the configuration of the run, as a tree.
        now: the configuration to resume it with.
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        f"{key.replace('.init_args.', '.')} is {_shown(new.get(key, _ABSENT))}, was {_shown(old.get(key, _ABSENT))}"
        for key in {**old, **new}
        if not _is_allowed(key, old.get(key, _ABSENT), new.get(key, _ABSENT))
    ]


def _is_allowed(key: str, before: Any, now: Any) -> bool:
    if before == now or any(key == allowed or key.startswith(f"{allowed}.") for allowed in _ALLOWED):
        return True
    if re.fullmatch(r"model\.teachers\.[^.]+\.init_args\.weights(\..*)?", key):  # as for model.teacher
        return True
    return key in _RULES and _ABSENT not in (before, now) and _RULES[key](before, now)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    elif tree != {}:
        yield prefix, tree


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)
