"""Loading weights from files of many makes."""

from __future__ import annotations

import argparse
import inspect
import pickle
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError

State = dict[str, Tensor]

_WRAPPINGS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where training programs put the weights among other things; averaged weights first, as timm reads them."""


def load_weights(
    model: nn.Module, path: str | Path, drop_classifier: bool = False, classifier: Sequence[str] = ()
) -> None:
    """Load the weights in a file into `model`, all of them or none.

    Reads safetensors and torch files (with `weights_only`), whole training checkpoints, and names with any prefix:
    `module.` of DDP, `student.model.` of this project. Tensors outside the prefix (heads) are ignored. If names or
    shapes are not the model's, the conversions in the modules that define its class and the bases of it are tried
    (functions with `filter` in their names, as timm has them).

    Args:
        model: gets the weights.
        path: of the file.
        drop_classifier: leave out the classifier's tensors; the model keeps its own.
        classifier: names of the model's classifier layers.

    Raises:
        UserError: the file is missing or cannot be read, or its tensors are not the model's; nothing is loaded.
    """
    given = _read(Path(path))
    own = model.state_dict()
    layers = tuple(f"{layer}." for layer in classifier)
    wanted = {key: tensor for key, tensor in own.items() if not (drop_classifier and key.startswith(layers))}
    misfits = []
    for state in _versions(given, model, own):
        if drop_classifier:
            state = {key: tensor for key, tensor in state.items() if not key.startswith(layers)}
        misfit = _Misfit.of(state, wanted, layers)
        if misfit is None:
            model.load_state_dict({**own, **state})
            return
        misfits.append(misfit)
    nearest = max(misfits, key=lambda misfit: (misfit.only_classifier, misfit.found))
    raise UserError(f"weights file {str(path)!r} {nearest.told_of(type(model).__name__)}")


@dataclass
class _Misfit:
    """Where the tensors of a file are not those that are wanted."""

    found: int
    missing: list[str]
    foreign: list[str]
    shapes: dict[str, tuple[torch.Size, torch.Size]]
    only_classifier: bool

    @classmethod
    def of(cls, state: State, wanted: State, classifier: tuple[str, ...]) -> _Misfit | None:
        missing = [key for key in wanted.keys() - state.keys() if not key.endswith(".num_batches_tracked")]  # old files
        foreign = list(state.keys() - wanted.keys())
        common = [key for key in wanted if key in state]
        shapes = {key: (state[key].shape, wanted[key].shape) for key in common if state[key].shape != wanted[key].shape}
        wrong = [*missing, *foreign, *shapes]
        if not wrong:
            return None
        only_classifier = bool(common) and all(key.startswith(classifier) for key in wrong)
        return cls(len(common) - len(shapes), sorted(missing), sorted(foreign), shapes, only_classifier)

    def told_of(self, network: str) -> str:
        """The end of a sentence that began with the file."""
        counts = [(there[0], here[0]) for there, here in self.shapes.values() if there[0] != here[0]]
        if self.only_classifier and counts:
            there, here = counts[0]
            return f"has {there} classes, but the network has {here}: set drop_classifier: true to leave them out"
        if self.only_classifier and not self.foreign and not self.shapes:
            return f"has no classifier ({_some(self.missing)}): set drop_classifier: true to keep the network's own"
        if not self.found and not self.shapes:
            return f"holds no weights of {network}: none of its tensors ({_some(self.foreign)}) has a name that fits"
        parts = []
        if self.missing:
            parts.append(f"it lacks {len(self.missing)} ({_some(self.missing)})")
        if self.foreign:
            parts.append(f"it has {len(self.foreign)} others ({_some(self.foreign)})")
        for key, shapes in list(self.shapes.items())[:2]:
            parts.append(f"{key!r} is {list(shapes[0])}, not {list(shapes[1])}")
        return f"fits {network} only in part: of the tensors {'; '.join(parts)}"


def _versions(given: State, model: nn.Module, own: State) -> Iterator[State]:
    """The tensors under the network's names: as they are, then converted by what the network's modules offer."""
    plain = _without_prefix(given, own)
    yield plain
    modules = [sys.modules[kind.__module__] for kind in reversed(type(model).__mro__)]  # its own class's last
    offered = {
        name: function for module in modules for name, function in inspect.getmembers(module, inspect.isfunction)
    }
    for name, function in offered.items():
        if "filter" not in name:
            continue
        takes_model = len(inspect.signature(function).parameters) > 1
        try:
            converted: Any = function(dict(plain), model) if takes_model else function(dict(plain))
        except Exception:  # it was written for another kind of file
            continue
        if isinstance(converted, Mapping):
            yield _only_tensors(converted)


def _without_prefix(given: State, own: State) -> State:
    """`given` below the prefix under which most of the network's names are found."""
    prefixes = Counter(
        key[:start]
        for key in given
        for start in [0, *(place + 1 for place, letter in enumerate(key) if letter == ".")]
        if key[start:] in own
    )
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    return {key.removeprefix(prefix): tensor for key, tensor in given.items() if key.startswith(prefix)}


def _read(path: Path) -> State:
    if not path.is_file():
        raise UserError(f"weights file {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's trainer keeps its arguments so
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own ways to fail
        raise UserError(f"weights file {str(path)!r} cannot be read: {_reason(path, error)}") from error
    for wrapping in _WRAPPINGS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapping), Mapping):
            found = found[wrapping]
            break
    tensors = _only_tensors(found) if isinstance(found, Mapping) else {}
    if not tensors:
        raise UserError(f"weights file {str(path)!r} holds no tensors by name")
    return {key.replace("_orig_mod.", ""): tensor for key, tensor in tensors.items()}  # torch.compile's


def _reason(path: Path, error: Exception) -> str:
    unsafe: list[str] = []
    if isinstance(error, pickle.UnpicklingError):
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:
            unsafe = []
    if unsafe:
        return f"besides tensors it holds {_some(unsafe)}, which are not loaded for safety"
    return f"it is truncated or no file of weights ({type(error).__name__})"


def _only_tensors(found: Mapping[Any, Any]) -> State:
    return {str(key): value for key, value in found.items() if isinstance(value, Tensor)}


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
