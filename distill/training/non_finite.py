"""Detection of non-finite loss terms without synchronizing with the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError


class NonFiniteLossError(UserError):
    """A term of the loss became NaN or infinite."""


class NonFiniteGuard:
    """Checks that the values of all terms are finite in every step.

    On a CPU, a non-finite value raises before the backward pass. On an accelerator, the result of the check is copied
    to the host asynchronously and read once it has arrived, so that no step waits for it. The weights may then have
    taken a few invalid steps, but `flush` is called before anything is saved.
    """

    def __init__(self) -> None:
        self._pending: deque[_Result] = deque()

    def check(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Check the values of a step, and read the results that have arrived.

        Args:
            step: number of the step, for the error message.
            values: value of each term, scalars, by term name.

        Raises:
            NonFiniteLossError: a term was not finite in this or an earlier step.
        """
        if values:  # none while all terms have weight 0
            finite = torch.isfinite(torch.stack([value.detach().float() for value in values.values()]))
            arrived = None
            if finite.device.type == "cuda":
                finite = finite.to("cpu", non_blocking=True)
                arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types there
                arrived.record()
            self._pending.append(_Result(step, list(values), finite, arrived))
        self._read(wait=False)

    def flush(self) -> None:
        """Wait for all pending results.

        Raises:
            NonFiniteLossError: a term was not finite.
        """
        self._read(wait=True)

    def _read(self, wait: bool) -> None:
        while self._pending:
            result = self._pending[0]
            if result.arrived is not None and not result.arrived.query():
                if not wait:
                    return
                result.arrived.synchronize()
            self._pending.popleft()
            bad = [name for name, is_finite in zip(result.names, result.finite.tolist(), strict=True) if not is_finite]
            if bad:
                self._pending.clear()
                raise NonFiniteLossError(
                    f"the loss is not finite at step {result.step}: the term {' and '.join(map(repr, bad))} gave NaN "
                    "or infinity; the last checkpoint is intact, try a smaller learning rate or weight"
                )


@dataclass(frozen=True)
class _Result:
    step: int
    names: list[str]
    finite: Tensor
    arrived: Any  # torch.cuda.Event, or None if the result is already on the host
