"""Finds the term whose value is no longer finite, without making the device wait."""

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
    """Watches the values of the terms, step by step.

    On a CPU a bad value raises at once, before its gradient is taken. On an accelerator the verdict is copied to the
    host behind the step's other work and read when it has arrived, so that no step waits for it; the weights
    may then have taken a few bad steps, but `flush` is asked before anything is saved.
    """

    def __init__(self) -> None:
        self._pending: deque[_Verdict] = deque()

    def check(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Note the values of `step`, by the names of their terms (scalars), and read the verdicts that are in.

        Raises:
            NonFiniteLossError: a term was not finite, in this step or an earlier one.
        """
        finite = torch.isfinite(torch.stack([value.detach().float() for value in values.values()]))
        arrived = None
        if finite.device.type == "cuda":
            finite = finite.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types there
            arrived.record()
        self._pending.append(_Verdict(step, list(values), finite, arrived))
        self._read(wait=False)

    def flush(self) -> None:
        """Read every verdict that is still under way.

        Raises:
            NonFiniteLossError: a term was not finite.
        """
        self._read(wait=True)

    def _read(self, wait: bool) -> None:
        while self._pending:
            verdict = self._pending[0]
            if verdict.arrived is not None and not verdict.arrived.query():
                if not wait:
                    return
                verdict.arrived.synchronize()
            self._pending.popleft()
            bad = [name for name, fine in zip(verdict.names, verdict.finite.tolist(), strict=True) if not fine]
            if bad:
                self._pending.clear()
                raise NonFiniteLossError(
                    f"the loss is not finite at step {verdict.step}: the term {' and '.join(map(repr, bad))} gave NaN "
                    "or infinity; the last checkpoint is whole, try a smaller learning rate or weight"
                )


@dataclass(frozen=True)
class _Verdict:
    step: int
    names: list[str]
    finite: Tensor
    arrived: Any  # torch.cuda.Event, or None where the verdict is on the host already
