"""Loading weights from the files of many training programs."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from distill.errors import UserError, did_you_mean
from distill.networks.conversions import State, conversions
from distill.networks.weights_file import keeps_order, read_weights_file, some
from distill.networks.weights_order import match_in_order

_AVERAGED = {
    "state_dict_ema": ("state_dict", "model"),
    "model_ema": ("state_dict", "model"),
    "state_dict": ("current_model_state",),
}
"""Keys of averaged weights, and those of the weights that the same program stores beside them: timm's and Lightning's.

As in timm, the averaged ones are taken.
"""

_COUNTERS = (".total_ops", ".total_params")
"""Ends of the names under which the profiler thop counts operations in every layer."""

_WRAPPER = "module"
"""Part of a prefix that DDP and averaging insert; it says nothing about which network is meant."""


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights, and which of the networks in it is meant.

    Args:
        file: with the weights.
        prefix: the key or the beginning of the names of the network's tensors, such as `teacher` or
            `model.module.teacher`, as far as it tells the network from the others; `""` for tensors at the top.
        match: `name`, or `order` for a file of the same network under names of another program: its tensors are taken
            in the order in which the file has them, and their shapes must be those of the network's in its order. Two
            layers of equal shape in another order go unnoticed, so check the result.
    """

    file: str | Path
    prefix: str | None = None
    match: Literal["name", "order"] = "name"

    def __str__(self) -> str:
        return str(self.file)


def load_weights(
    model: nn.Module, weights: str | Path | WeightsFile, drop_classifier: bool = False, classifier: Sequence[str] = ()
) -> None:
    """Load the weights of a file into `model`, all of them or none.

    Reads safetensors and torch files (with `weights_only`), whole training checkpoints in which the tensors lie under
    any keys, and names with any prefix: `module.` of DDP, `student.model.` of this project. Tensors outside the prefix
    (heads) are ignored. If names or shapes do not match, the model's `convert_checkpoint(state)` is tried if it has
    one, and the checkpoint filters that timm defines in the modules of the model's class and of its bases.

    Args:
        model: receives the weights.
        weights: the file; where several networks in it fit, with the prefix of one.
        drop_classifier: skip the classifier's tensors; the model keeps its classifier.
        classifier: names of the model's classifier layers.

    Raises:
        UserError: the file is missing or cannot be read, its tensors do not match or are not finite, or several
            networks in it fit; nothing is loaded.
    """
    source = weights if isinstance(weights, WeightsFile) else WeightsFile(weights)
    tensors = _Tensors(read_weights_file(source.file))
    file = f"weights file {str(source)!r}"
    current = model.state_dict()
    if source.match == "order":
        if not keeps_order(source.file):
            raise UserError(f"{file} cannot be matched by order: safetensors keeps no order of its tensors")
        if source.prefix is not None:
            tensors = _Tensors(tensors.below(f"{source.prefix}." if source.prefix else ""))
        state = match_in_order(model, tensors.tensors, file, drop_classifier, classifier)
        _require_finite(state, current, file)
        model.load_state_dict({**current, **state})
        return
    layers = tuple(f"{layer}." for layer in classifier)
    expected = {key: tensor for key, tensor in current.items() if not (drop_classifier and key.startswith(layers))}
    fitting: dict[str, State] = {}
    mismatches: list[_Mismatch] = []
    for prefix in _prefixes(tensors, expected, source.prefix):
        for state in _candidates(tensors.below(prefix), model, prefix, fitting):
            if drop_classifier:
                state = {key: tensor for key, tensor in state.items() if not key.startswith(layers)}
            state = {key: state[key] for key in state if key in current or not key.endswith(_COUNTERS)}
            mismatch = _Mismatch.of(state, expected, layers)
            if mismatch is None:
                fitting[prefix] = state
                break
            mismatches.append(mismatch)
    if not fitting:
        closest = max(mismatches, key=lambda mismatch: (mismatch.only_classifier, mismatch.matching, -mismatch.wrong))
        raise UserError(f"{file} {closest.describe(type(model).__name__)}{_keys(tensors, closest)}")
    prefix = _only(fitting, source.prefix, file, type(model).__name__)
    state = fitting[prefix]
    _require_finite(state, current, file)
    if any(name.endswith(_COUNTERS) for name in tensors.below(prefix).keys() - current.keys()):
        warnings.warn(f"{file} holds a profiler's counters (total_ops, total_params), which are ignored", stacklevel=2)
    model.load_state_dict({**current, **state})


class _Tensors:
    """The tensors of a file, grouped by the beginnings of their names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.names = sorted(tensors)
        self.counts = Counter(
            name[:start]
            for name in self.names
            for start in (0, *(position + 1 for position, letter in enumerate(name) if letter == "."))
        )

    def below(self, prefix: str) -> State:
        """Return the tensors whose names begin with `prefix`, without it."""
        first = bisect_left(self.names, prefix)
        names = self.names[first : first + self.counts[prefix]]
        return {name[len(prefix) :]: self.tensors[name] for name in names}


def _prefixes(tensors: _Tensors, expected: State, given: str | None) -> list[str]:
    """Return the prefixes below which there may be as many tensors as expected, the largest groups first.

    Raises:
        UserError: no name has the given prefix.
    """
    least = sum(not key.endswith(".num_batches_tracked") for key in expected) / 4  # a conversion may split or join
    known = tensors.counts
    if given is not None:
        known = Counter({prefix: count for prefix, count in known.items() if _is_meant(prefix, given)})
        if not known:
            parts = {part for prefix, count in tensors.counts.items() if count >= least for part in _parts(prefix)}
            raise UserError(
                f"weights.prefix: no tensor's name begins with {given!r}: {did_you_mean(given, parts - {''})}"
            )
    enough = [prefix for prefix, count in known.items() if count >= least]
    return sorted(enough or known, key=lambda prefix: (-known[prefix], len(prefix)))


def _is_meant(prefix: str, given: str) -> bool:
    """Return whether the parts of a given prefix occur one after the other in `prefix`."""
    parts, wanted = (_parts(name) for name in (prefix, given))
    if not wanted:
        return not parts
    return any(parts[start : start + len(wanted)] == wanted for start in range(len(parts)))


def _parts(prefix: str) -> list[str]:
    return [part for part in prefix.split(".") if part and part != _WRAPPER]


def _only(fitting: Mapping[str, State], given: str | None, file: str, network: str) -> str:
    """Return the prefix of the only state that fits, of the one that was meant exactly, or of the averaged one.

    Raises:
        UserError: different states fit.
    """
    distinct: list[str] = []
    for prefix, state in fitting.items():
        if not any(_equal(state, fitting[known]) for known in distinct):
            distinct.append(prefix)
    if given is not None and len(distinct) > 1:
        distinct = [prefix for prefix in distinct if _parts(prefix) == _parts(given)] or distinct
    if len(distinct) == 1:
        return distinct[0]
    keys = {_parts(prefix)[0]: prefix for prefix in distinct if _parts(prefix)}
    if len({tuple(_parts(prefix)[1:]) for prefix in distinct}) == 1 and len(keys) == len(distinct):
        for averaged, others in _AVERAGED.items():
            if averaged in keys and keys.keys() <= {averaged, *others}:
                plain = [key for key in keys if key != averaged]
                warnings.warn(
                    f"{file} holds averaged weights under {averaged!r}, which are taken, and others under "
                    f"{some(plain)}: weights: {{file: ..., prefix: {plain[0]}}} takes those",
                    stacklevel=3,
                )
                return keys[averaged]
    shown = [prefix.rstrip(".") for prefix in distinct]
    raise UserError(
        f"{file} holds {len(distinct)} networks that fit {network}, under {some(shown, 4)}: choose one with "
        f"weights: {{file: ..., prefix: {_shortest(distinct)}}}"
    )


def _shortest(prefixes: Sequence[str]) -> str:
    """Return the shortest prefix that chooses one of several."""
    for prefix in prefixes:
        for part in reversed(_parts(prefix)):
            if sum(_is_meant(candidate, part) for candidate in prefixes) == 1:
                return part
    return prefixes[-1].rstrip(".") or "''"


def _equal(state: State, second: State) -> bool:
    return state.keys() == second.keys() and all(
        tensor is second[key] or (tensor.dtype == second[key].dtype and torch.equal(tensor, second[key]))
        for key, tensor in state.items()
    )


def _require_finite(state: State, current: State, file: str) -> None:
    """Refuse NaN and infinity where the new model has none (a mask may be meant to hold them)."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        wrong = ~(tensor.float() if tensor.element_size() == 1 else tensor).isfinite()
        if wrong.any() and (wrong & current[name].to(wrong.device).isfinite()).any():
            value = "NaN" if tensor.isnan().any() else "infinity"
            raise UserError(f"{file} holds {value} in {name!r} ({int(wrong.sum())} of {wrong.numel()} values)")


def _keys(tensors: _Tensors, closest: _Mismatch) -> str:
    """Return what the file holds, if nothing in it fits."""
    tops = sorted({name.partition(".")[0] for name in tensors.names if "." in name})
    if closest.matching or closest.shapes or not tops:
        return ""
    return f"; its tensors lie under {some(tops, 6)}"


@dataclass
class _Mismatch:
    """The differences between the tensors of a file and those that the model expects."""

    matching: int
    wrong: int
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
        return cls(len(common) - len(shapes), len(wrong), sorted(missing), sorted(unexpected), shapes, only_classifier)

    def describe(self, network: str) -> str:
        """Return the end of a sentence that begins with the file."""
        counts = [(stored[0], current[0]) for stored, current in self.shapes.values() if stored[0] != current[0]]
        if self.only_classifier and counts:
            stored, current = counts[0]
            remedy = "set drop_classifier: true to leave its classifier out"
            return f"has {stored} classes, but the network has {current}: {remedy}"
        if self.only_classifier and not self.unexpected and not self.shapes:
            return f"has no classifier ({some(self.missing)}): set drop_classifier: true to keep the network's own"
        if not self.matching and not self.shapes:
            return f"has no weights of {network}: none of its tensors ({some(self.unexpected)}) has a matching name"
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} are missing ({some(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} are unexpected ({some(self.unexpected)})")
        for key, shapes in list(self.shapes.items())[:2]:
            parts.append(f"{key!r} is {list(shapes[0])}, not {list(shapes[1])}")
        return f"fits {network} only in part: of the tensors {'; '.join(parts)}"


def _candidates(plain: State, model: nn.Module, prefix: str, fitting: Mapping[str, State]) -> Iterator[State]:
    """Yield the tensors below a prefix, then as each available conversion renames them."""
    yield plain
    if any(prefix.startswith(found) or found.startswith(prefix) for found in fitting):
        return  # parts of a network that fits, or several together
    for convert in conversions(model):
        try:
            converted = convert(dict(plain))
        except Exception:  # written for another kind of file
            continue
        if isinstance(converted, Mapping):
            yield {str(key): value for key, value in converted.items() if isinstance(value, Tensor)}
