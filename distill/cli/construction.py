"""Exceptions that are raised while a configuration becomes objects, as one sentence with the key.

What data, networks, heads, optimizers, schedulers, callbacks, loggers, strategies and the trainer raise while they are
made is most often the user's mistake. The exceptions to that rule stay what they are: no memory, an exit or an
interrupt, and errors such as a missing attribute that a line of this package raises, which are mistakes of ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from distill.cli.reasons import argument_in, frames, is_ours, reason_of
from distill.errors import ConstructionError, UserError
from distill.networks import FrozenTeacher
from distill.objective import key_of, teacher_key
from distill.training.classification import ClassificationModule

_OUR_MISTAKES = (AssertionError, AttributeError, KeyError, IndexError, NameError)
_SECTIONS = ("checkpoint", "ckpt_path", "config", "data", "model", "resume", "seed_everything", "trainer")
_keys: ContextVar[tuple[str, ...]] = ContextVar("keys", default=())


class Escape(BaseException):
    """Carries an exception of a class out of the parser, which would take it for a value of the wrong type."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _AtKey:
    """Contexts of the key under construction, within that of an outer one."""

    @contextmanager
    def __call__(self, key: str) -> Iterator[None]:
        token = _keys.set((*_keys.get(), key))
        try:
            yield
        finally:
            _keys.reset(token)

    def current(self) -> str:
        """Return the dotted key under construction."""
        return ".".join(_keys.get())


at_key = _AtKey()


def construct(key: str, instantiate: Callable[..., Any], cls: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a class; what it raises knows the key and the arguments.

    Args:
        key: dotted key of the class in the configuration.
        instantiate: makes the instance, given the class and its arguments.
        cls: the class.
        args: positional arguments of the class.
        kwargs: keyword arguments of the class.
    """
    try:
        return instantiate(cls, *args, **kwargs)
    except Exception as error:
        if not hasattr(error, "configuration_key"):
            error.configuration_key = f"{key}{argument_in(str(error), kwargs)}"  # type: ignore[attr-defined]
        if _keys.get():  # called by the parser, not later
            raise Escape(error) from error
        raise


@contextmanager
def construction(
    default: str,
    owners: Mapping[str, Any] | None = None,
    until: Callable[[], bool] = lambda: False,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Context that raises what is raised inside as a `UserError`, with the key under construction.

    Args:
        default: the key where no other is known.
        owners: the objects made so far by key; an exception that passes a method of one of them has its key.
        until: returns True once everything is made; from then on, exceptions pass as they are, except those by which
            Lightning says that its user has made a mistake.
        settings: those under the default key.

    Raises:
        UserError: the user's mistake.
    """
    try:
        yield
    except UserError as error:
        key = getattr(error, "configuration_key", None)
        raise (error if key is None or _has_key(str(error)) else error.at(key)) from error.__cause__
    except Exception as error:
        if is_not_the_users(error) or (until() and not isinstance(error, MisconfigurationException)):
            raise
        key = getattr(error, "configuration_key", None) or _owner(error, owners or {})
        key = key or default + (argument_in(str(error), settings) if settings else "")
        raise ConstructionError(f"{key}: {reason_of(error)}") from error


def made_objects(trainer: Trainer, module: LightningModule, data: Any) -> dict[str, Any]:
    """Return the objects made from a configuration by key, the classes of callbacks and loggers behind theirs."""
    objects: dict[str, Any] = {"data": data, "data.longtail": getattr(data, "longtail", None)}
    if isinstance(module, ClassificationModule):
        objects["model.student"] = module.student
        for name, teacher in module.teachers.items():
            objects[teacher_key(name)] = teacher.network if isinstance(teacher, FrozenTeacher) else teacher
        objects |= {f"{key_of(name)}.head": term.head for name, term in module.terms.items()}
    objects |= {"trainer.strategy": trainer.strategy, "trainer.profiler": trainer.profiler}  # type: ignore[attr-defined]
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
    objects |= {f"trainer.callbacks: {type(callback).__name__}": callback for callback in callbacks}
    return objects | {f"trainer.logger: {type(logger).__name__}": logger for logger in trainer.loggers}


def is_not_the_users(error: BaseException) -> bool:
    """Return True for lack of memory, and for errors that only a mistake in this package explains."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if re.search(r"CUDA (error|out of memory)|CUBLAS_STATUS|CUDNN_STATUS|NCCL error", str(error)):
        return True
    return isinstance(error, _OUR_MISTAKES) and is_ours(error)


class Underway(Callback):
    """Notes when everything is made and the first batch is about to be computed."""

    begun = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the beginning, as all the hooks below do."""
        self.begun = True

    on_train_start = on_validation_start = on_test_start = on_predict_start = on_sanity_check_start


def _has_key(message: str) -> bool:
    return re.match(rf"({'|'.join(_SECTIONS)})(\.|:| is )", message) is not None


def _owner(error: BaseException, owners: Mapping[str, Any]) -> str | None:
    """Return the key of the object whose method raised, the innermost one if there are several."""
    keys = {id(owner): key for key, owner in owners.items() if owner is not None}
    found = None
    for frame in frames(error):
        found = keys.get(id(frame.f_locals.get("self")), found)
    return found
