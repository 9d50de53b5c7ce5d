"""Detection of waits: work that reads a tensor's value on the host, which stalls a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distill.testing.case import Case, evaluate


@contextmanager
def no_waiting(device: torch.device | str) -> Iterator[None]:
    """Raise an error if anything within waits for the device.

    On CUDA, torch raises a RuntimeError at a synchronization. On another device, where nothing waits, an AssertionError
    is raised at an operation that would on CUDA: a value read on the host, or an output whose shape depends on values.

    Args:
        device: the device that the work runs on.
    """
    if torch.device(device).type != "cuda":
        with _Refusing():  # type: ignore[no-untyped-call]  # torch's
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def nothing_waits_for_the_device(case: Case) -> None:
    """Check that no value is read on the host (`.item()`, `if tensor`, boolean indexing), which stalls a GPU."""
    if case.device.type != "cpu":
        head, sample = case.head(torch.float32), case.sample(dtype=torch.float32)
        with no_waiting(case.device):
            evaluate(head, sample)
        case = replace(case, device=torch.device("cpu"))
    head, sample = case.head(torch.float32), case.sample(dtype=torch.float32)
    with FakeTensorMode() as mode:  # fake tensors have shapes but no values
        state: dict[str, Tensor] = {
            key: mode.from_tensor(value) for key, value in (*head.named_parameters(), *head.named_buffers())
        }
        batch = {key: mode.from_tensor(value) for key, value in sample.batch.items()}
        fake = sample.apply(mode.from_tensor)
        student = fake.student.apply(lambda tensor: tensor.requires_grad_())
        try:
            torch.func.functional_call(head, state, (student, fake.teacher, batch)).backward()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise AssertionError(f"{case.name} reads a tensor's value on the host\n{error}") from error


_READING = frozenset(
    {
        *("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    }
)
"""Operations that read values on the host, or give an output whose shape depends on them."""


class _Refusing(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Refuses operations that read values on the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operation = func._schema.name.partition("::")[2]
        counts = operation == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if operation in _READING or counts or _picks_by_mask(operation, args):
            raise AssertionError(f"{operation} reads a tensor's value on the host")
        return func(*args, **(kwargs or {}))


def _picks_by_mask(operation: str, args: Sequence[Any]) -> bool:
    """Return whether rows are picked by a mask, so that their number depends on values; filling them does not."""
    is_filling = operation.startswith("index_put") and args[2].numel() == 1
    if is_filling or operation not in ("index", "index_put", "index_put_"):
        return False
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
