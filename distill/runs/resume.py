"""What a resumed run may change in its configuration, and what it may not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

_ABSENT = object()


def _longer(before: Any, now: Any) -> bool:
    """Whether a run's length has not shrunk; `None` and -1 are no limit."""
    return now in (None, -1) or (before not in (None, -1) and now >= before)


def _doing(callbacks: Any) -> list[Any]:
    """The callbacks that may change the result."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    return [callback for callback in listed if callback["class_path"].rsplit(".", 1)[-1] not in _LOOKING_ON]


_LOOKING_ON = (
    "DeviceStatsMonitor",
    "HeadPictures",
    "LearningRateMonitor",
    "RichModelSummary",
    "RichProgressBar",
    "TQDMProgressBar",
)
_FREE = (  # nothing of these reaches the weights; the module itself holds the teacher to the one of before
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
    "trainer.callbacks": lambda before, now: _doing(before) == _doing(now),
    "trainer.max_epochs": _longer,
    "trainer.max_steps": _longer,
}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations and changes the result, as "KEY is X, was Y".

    A longer run is no change, nor is what only says where the run is, what it shows and what it runs on.

    Args:
        before: the configuration of a run, as a tree.
        now: that with which it is to be resumed.
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        f"{key.replace('.init_args.', '.')} is {_shown(new.get(key, _ABSENT))}, was {_shown(old.get(key, _ABSENT))}"
        for key in {**old, **new}
        if not _is_free(key, old.get(key, _ABSENT), new.get(key, _ABSENT))
    ]


def _is_free(key: str, before: Any, now: Any) -> bool:
    if before == now or any(key == free or key.startswith(f"{free}.") for free in _FREE):
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
