"""Requests: what terms of a loss read of a stored teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from torch import Tensor

from distill.store.quantities import canonical

FEATURES = ("logits", "embedding", "tokens")
"""Names of a teacher's own features; all others are maps, or quantities that a head computes."""


@dataclass(frozen=True)
class Request:
    """The summary that a term compares with: features of the teacher as they are, or quantities that its head computes.

    Equal requests are answered by the same rows, so that terms share them.

    Args:
        features: names of the teacher's own features; empty if the head computes the summary.
        head: name of the class that computes it.
        settings: what the computation depends on, as JSON values.
        dtype: the type of the stored numbers: `float32` (float64 stays), `bfloat16` or `float16`.
        on_segments: whether the summary depends on the segments of the batch.
    """

    features: tuple[str, ...] = ()
    head: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    dtype: str = "float32"
    on_segments: bool = False

    @property
    def prefix(self) -> str:
        """The beginning of the names of computed quantities; empty for the teacher's own features."""
        if self.features:
            return ""
        return f"{self.head}.{sha256(canonical([self.settings, self.dtype]).encode()).hexdigest()[:6]}"

    def name(self, part: str) -> str:
        """Return the name of the quantity that stores a part of the summary."""
        if not self.features:
            return f"{self.prefix}.{part}"
        return part if self.dtype == "float32" else f"{part}.{self.dtype}"

    def parts(self, names: Sequence[str]) -> dict[str, str]:
        """Return the parts of the summary and the quantities that store them, as far as these are among `names`."""
        if self.features:
            return {part: self.name(part) for part in self.features if self.name(part) in names}
        start = f"{self.prefix}."
        return {name.removeprefix(start): name for name in names if name.startswith(start)}

    def asks_for(self, name: str) -> bool:
        """Return True if a quantity of this name stores a part of the summary."""
        return bool(self.parts([name]))

    def is_met_by(self, names: Sequence[str]) -> bool:
        """Return True if quantities of these names hold the whole summary."""
        found = self.parts(names)
        return len(found) == len(self.features) if self.features else bool(found)

    def key(self, segments: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the key of its quantities.

        Args:
            segments: the settings of the segments in the batches.
        """
        if self.features:
            return {}
        read = {"segments": segments} if self.on_segments else {}
        return {"head": self.head, "settings": self.settings, **read}


def summary_arguments(rows: Mapping[str, Tensor], grid: tuple[int, int] | None) -> dict[str, Any]:
    """Return the arguments of a `Features` made of tensors by name."""
    named = {name: tensor for name, tensor in rows.items() if name in FEATURES}
    maps = {name: tensor for name, tensor in rows.items() if name not in FEATURES}
    return {**named, "maps": maps, "grid": grid if "tokens" in named else None}
