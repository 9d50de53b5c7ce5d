"""Loading weights from the files of many training programs."""

from __future__ import annotations

import argparse
import inspect
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError

State = dict[str, Tensor]

_NESTED_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which training checkpoints store the weights; averaged weights come first, as in timm."""

_TIMM_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
"""Names of the functions in timm's model files that convert other programs' checkpoints."""


def load_weights(
    model: nn.Module, path: str | Path, drop_classifier: bool = False, classifier: Sequence[str] = ()
) -> None:
    """Load the weights of a file into `model`, all of them or none.

    Reads safetensors and torch files (with `weights_only`), whole training checkpoints, and names with any prefix:
    `module.` of DDP, `student.model.` of this project. Tensors outside the prefix (heads) are ignored. If names or
    shapes do not match, the model's `convert_checkpoint(state)` is tried if it has one, and the checkpoint filters
    that timm defines in the modules of the model's class and of its bases.

    Args:
        model: receives the weights.
        path: of the file.
        drop_classifier: skip the classifier's tensors; the model keeps its classifier.
        classifier: names of the model's classifier layers.

    Raises:
        UserError: the file is missing or cannot be read, or its tensors do not match; nothing is loaded.
    """
    stored = _read(Path(path))
    current = model.state_dict()
    layers = tuple(f"{layer}." for layer in classifier)
    expected = {key: tensor for key, tensor in current.items() if not (drop_classifier and key.startswith(layers))}
    mismatches = []
    for state in _candidates(stored, model, current):
        if drop_classifier:
            state = {key: tensor for key, tensor in state.items() if not key.startswith(layers)}
        mismatch = _Mismatch.of(state, expected, layers)
        if mismatch is None:
            model.load_state_dict({**current, **state})
            return
        mismatches.append(mismatch)
    closest = max(mismatches, key=lambda mismatch: (mismatch.only_classifier, mismatch.matching))
    raise UserError(f"weights file {str(path)!r} {closest.describe(type(model).__name__)}")


@dataclass
class _Mismatch:
    """The differences between the tensors of a file and those that the model expects."""

    matching: int
    missing: list[str]
    unexpected: list[str]
    shapes: dict[str, tuple[torch.Size, torch.Size]]
    only_classifier: bool

    @classmethod
    def of(cls, state: State, expected: State, classifier: tuple[str, ...]) -> _Mismatch | None:
        absent = expected.keys() - state.keys()
        missing = [key for key in absent if not key.endswith(".num_batches_tracked")]  # old files lack these
        unexpected = list(state.keys() - expected.keys())
        common = [key for key in expected if key in state]
        pairs = {key: (state[key].shape, expected[key].shape) for key in common}
        shapes = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        wrong = [*missing, *unexpected, *shapes]
        if not wrong:
            return None
        only_classifier = bool(common) and all(key.startswith(classifier) for key in wrong)
        return cls(len(common) - len(shapes), sorted(missing), sorted(unexpected), shapes, only_classifier)

    def describe(self, network: str) -> str:
        """Return the end of a sentence that begins with the file."""
        counts = [(stored[0], current[0]) for stored, current in self.shapes.values() if stored[0] != current[0]]
        if self.only_classifier and counts:
            stored, current = counts[0]
            return f"has {stored} classes, but the network has {current}: set drop_classifier: true to leave them out"
        if self.only_classifier and not self.unexpected and not self.shapes:
            return f"has no classifier ({_some(self.missing)}): set drop_classifier: true to keep the network's own"
        if not self.matching and not self.shapes:
            return f"has no weights of {network}: none of its tensors ({_some(self.unexpected)}) has a matching name"
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} are missing ({_some(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} are unexpected ({_some(self.unexpected)})")
        for key, shapes in list(self.shapes.items())[:2]:
            parts.append(f"{key!r} is {list(shapes[0])}, not {list(shapes[1])}")
        return f"fits {network} only in part: of the tensors {'; '.join(parts)}"


def _candidates(stored: State, model: nn.Module, current: State) -> Iterator[State]:
    """Yield the stored tensors without their prefix, then as each available conversion renames them."""
    plain = _without_prefix(stored, current)
    yield plain
    for convert in _conversions(model):
        try:
            converted = convert(dict(plain))
        except Exception:  # written for another kind of file
            continue
        if isinstance(converted, Mapping):
            yield _only_tensors(converted)


def _conversions(model: nn.Module) -> Iterator[Callable[[State], Any]]:
    """Yield the model's `convert_checkpoint` and timm's filters; those of the class come before its bases'."""
    if callable(convert := getattr(model, "convert_checkpoint", None)):
        yield convert
    modules = [sys.modules[kind.__module__] for kind in type(model).__mro__]
    for name in _TIMM_FILTERS:
        function = next((found for module in modules if (found := getattr(module, name, None)) is not None), None)
        if function is None:
            continue
        takes_model = len(inspect.signature(function).parameters) > 1
        yield partial(_call_with_model, function, model) if takes_model else function


def _call_with_model(function: Callable[[State, nn.Module], Any], model: nn.Module, state: State) -> Any:
    return function(state, model)


def _without_prefix(stored: State, current: State) -> State:
    """Return the tensors below the prefix under which most names of `current` are found, without that prefix."""
    prefixes = Counter(
        key[:start]
        for key in stored
        for start in [0, *(position + 1 for position, letter in enumerate(key) if letter == ".")]
        if key[start:] in current
    )
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    return {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}


def _read(path: Path) -> State:
    if not path.is_file():
        raise UserError(f"weights file {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # of timm's trainer
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format fails in its own way
        raise UserError(f"weights file {str(path)!r} cannot be read: {_reason(path, error)}") from error
    for nested in _NESTED_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(nested), Mapping):
            content = content[nested]
            break
    tensors = _only_tensors(content) if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"weights file {str(path)!r} contains no named tensors")
    return {key.replace("_orig_mod.", ""): tensor for key, tensor in tensors.items()}  # from torch.compile


def _reason(path: Path, error: Exception) -> str:
    unsafe: list[str] = []
    if isinstance(error, pickle.UnpicklingError):
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:
            unsafe = []
    if unsafe:
        return f"besides tensors it contains {_some(unsafe)}, which are not loaded for safety"
    return f"it is truncated or not a file of weights ({type(error).__name__})"


def _only_tensors(content: Mapping[Any, Any]) -> State:
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
