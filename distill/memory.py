"""Memory of heads across batches: a queue of the latest embeddings, and banks of samples and of classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import UserError, require_at_least, require_between

Storage = Literal["float32", "bfloat16"]
"""Storage types of a memory; computations are done in the type of the queries."""


class EmbeddingQueue(nn.Module):
    """A ring buffer of the latest embeddings; the oldest are overwritten first.

    Any number of rows can be enqueued at once, even more than fit. All state is in buffers and hence in checkpoints; no
    value is read on the host, and no graph is kept.

    Under data parallelism, enqueue the *gathered* batch: every rank then has the same rows, which are also those of one
    process.

    Args:
        size: K, the number of rows.
        width: d, the width of an embedding.
        dtype: storage type.

    Attributes:
        rows: `[K, d]`; only the first `filled` rows hold embeddings.
        count: int64 scalar, the number of rows ever enqueued.

    Raises:
        UserError: a size or width below 1.
    """

    rows: Tensor
    count: Tensor

    def __init__(self, size: int = 16384, width: int = 128, dtype: Storage = "float32") -> None:
        super().__init__()
        require_at_least(1, size=size, width=width)
        self.register_buffer("rows", torch.zeros(size, width, dtype=getattr(torch, dtype)))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def filled(self) -> Tensor:
        """The number of rows that hold an embedding, an int64 scalar."""
        return self.count.clamp_max(len(self.rows))

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor) -> None:
        """Enqueue embeddings `[B, d]` in their order."""
        size = len(self.rows)
        kept = embeddings[-size:]
        first = self.count + (len(embeddings) - len(kept))
        rows = (first + torch.arange(len(kept), device=kept.device)) % size
        self.rows.index_copy_(0, rows, kept.to(self.rows.dtype))
        self.count += len(embeddings)

    def latest(self) -> Tensor:
        """Return the filled rows, oldest first, `[filled, d]`; reads the count on the host."""
        count, size = int(self.count), len(self.rows)
        return self.rows[:count] if count <= size else self.rows.roll(-(count % size), 0)


class SampleBank(nn.Module):
    """Two networks' embeddings of every sample of a data set, as moving averages, and its class.

    It takes `samples` x `width` x 2 numbers. Rows begin as random vectors; each update moves them towards the new
    embedding and normalizes them.

    Args:
        samples: n, the number of samples.
        width: d, the width of an embedding.
        momentum: the weight of the old embedding in an update.
        device: `cpu` keeps the embeddings in the host's memory wherever the module is moved; by default they move.

    Attributes:
        student: `[n, d]`.
        teacher: `[n, d]`.
        label: int64 `[n]`, -1 for a sample without a class, -2 for one that has not occurred yet.

    Raises:
        UserError: fewer than two samples, a width below 1, or a momentum outside [0, 1].
    """

    student: Tensor
    teacher: Tensor
    label: Tensor

    def __init__(
        self, samples: int = 50_000, width: int = 128, momentum: float = 0.5, device: Literal["cpu"] | None = None
    ) -> None:
        super().__init__()
        require_at_least(2, samples=samples)
        require_at_least(1, width=width)
        require_between(0, 1, momentum=momentum)
        self.momentum, self.device = momentum, device
        bound = math.sqrt(3 / width)  # so that the mean square of a vector's length is 1
        for side in _SIDES:
            self.register_buffer(side, torch.empty(samples, width).uniform_(-bound, bound))
        self.register_buffer("label", torch.full((samples,), -2))

    @property
    def filled(self) -> Tensor:
        """The number of samples that have occurred, an int64 scalar."""
        return (self.label > -2).sum()

    def places(self, index: Tensor) -> Tensor:
        """Return an index of rows where the embeddings are; if that is the host, this waits for the device."""
        return index.to(self.student.device)

    def rows(self, side: Literal["student", "teacher"], places: Tensor, device: torch.device) -> Tensor:
        """Return the embeddings of one network at `places`, an int64 tensor of any shape: `[..., d]` on `device`.

        From the host to a GPU only these rows travel, through pinned memory and beside the device's other work.
        """
        bank: Tensor = getattr(self, side)
        if bank.device == device:
            return bank[places]
        taken = torch.empty(*places.shape, bank.shape[1], dtype=bank.dtype, pin_memory=device.type == "cuda")
        torch.index_select(bank, 0, places.flatten(), out=taken.view(-1, bank.shape[1]))
        return taken.to(device, non_blocking=True)

    @torch.no_grad()
    def update(self, index: Tensor, student: Tensor, teacher: Tensor, label: Tensor) -> None:
        """Move the rows `index` `[B]` towards embeddings `[B, d]` and store the labels `[B]`.

        If a sample occurs several times, its last occurrence counts.
        """
        order = index.argsort(stable=True)
        ends = torch.searchsorted(index[order], index, right=True) - 1
        last = order[ends]  # repeated rows write equal values
        places = self.places(index)
        for side, fresh in zip(_SIDES, (student, teacher), strict=True):
            bank: Tensor = getattr(self, side)
            moved = torch.lerp(fresh[last].to(bank.dtype), self.rows(side, places, fresh.device), self.momentum)
            bank.index_copy_(0, places, F.normalize(moved, dim=1).to(bank.device))
        self.label.index_copy_(0, index, label[last])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SampleBank:
        kept = {} if self.device is None else {side: self._buffers.pop(side) for side in _SIDES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's has no types
        for side, bank in kept.items():
            assert bank is not None
            self._buffers[side] = bank.to(fn(bank[:0]).dtype)  # the type may change, the place does not
        self._buffers["label"] = self._buffers.pop("label")  # the last, as before
        return self


_SIDES: tuple[Literal["student", "teacher"], ...] = ("student", "teacher")


class ClassBank(nn.Module):
    """The first embeddings of each class, in the order in which they came.

    Once a class has all its rows, they stay. All state is in buffers, and no value is read on the host. Under data
    parallelism, enter the *gathered* batch.

    Args:
        classes: K, the number of classes.
        samples: n, the rows of each class.
        width: d, the width of an embedding.

    Attributes:
        flat: `[K n + 1, d]`, the rows class by class; the last takes what is not stored, and stays 0.
        count: int64 `[K]`, the embeddings of each class that ever came.

    Raises:
        UserError: a number below 1.
    """

    flat: Tensor
    count: Tensor

    def __init__(self, classes: int, samples: int = 64, width: int = 128) -> None:
        super().__init__()
        require_at_least(1, classes=classes, samples=samples, width=width)
        self.samples = samples
        self.register_buffer("flat", torch.zeros(classes * samples + 1, width))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))

    @property
    def rows(self) -> Tensor:
        """The embeddings, `[K, n, d]`."""
        return self.flat[:-1].view(len(self.count), self.samples, -1)

    @property
    def present(self) -> Tensor:
        """Whether a row holds an embedding, bool `[K, n]`."""
        return torch.arange(self.samples, device=self.count.device) < self.count.unsqueeze(1)

    @torch.no_grad()
    def enter(self, embeddings: Tensor, label: Tensor) -> None:
        """Store embeddings `[B, d]` of the classes `label` `[B]` in their order; those with label -1 are left out."""
        of_class = (label.unsqueeze(1) == torch.arange(len(self.count), device=label.device)).to(torch.int64)
        kind = label.clamp_min(0)
        number = (self.count + of_class.cumsum(dim=0) - 1).gather(1, kind.unsqueeze(1)).squeeze(1)
        is_stored = (label >= 0) & (number < self.samples)
        row = torch.where(is_stored, kind * self.samples + number, len(self.flat) - 1)
        self.flat.index_copy_(0, row, embeddings.to(self.flat.dtype))
        self.flat[-1].zero_()
        self.count += of_class.sum(dim=0)


def with_gradient_now(loss: Callable[..., Tensor], *inputs: Tensor, parts: Sequence[slice] = (slice(None),)) -> Tensor:
    """Return the sum of `loss(part, *inputs)`, a scalar, over parts of the rows, and compute its gradient at once.

    The memory that the loss reads can then be overwritten before the backward pass, and only what the loss of one part
    needs exists at a time.

    Args:
        loss: a function of a part, a slice, and of its rows of the inputs; nothing else receives a gradient.
        inputs: tensors with equally many rows.
        parts: of the rows, by default all in one.
    """
    value: Tensor = _GradientNow.apply(loss, parts, *inputs)
    return value


def refuse_other_shapes(module: nn.Module, state: Mapping[str, Tensor], prefix: str, names: Mapping[str, str]) -> None:
    """Check the shapes of a checkpoint's tensors against the module's, before anything is loaded.

    Args:
        module: the module to be loaded.
        state: a state dict.
        prefix: prefix of the module's keys in it.
        names: what error messages call the tensors, by key.

    Raises:
        UserError: a tensor has another shape.
    """
    current = module.state_dict()
    for key, name in names.items():
        if prefix + key in state and key in current and state[prefix + key].shape != current[key].shape:
            stored, configured = (" x ".join(map(str, tensor.shape)) for tensor in (state[prefix + key], current[key]))
            raise UserError(
                f"{type(module).__name__}: {name} is {stored} in the checkpoint and {configured} in the configuration: "
                "resume with the arguments it was trained with, or start a new run"
            )


class _GradientNow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Callable[..., Tensor], parts: Sequence[slice], *inputs: Tensor) -> Tensor:
        values, gradients = [], []
        for part in parts:
            with torch.enable_grad():
                leaves = [tensor[part].detach().requires_grad_() for tensor in inputs]
                value = loss(part, *leaves)
                gradients.append(torch.autograd.grad(value, leaves))
            values.append(value.detach())
        ctx.save_for_backward(*(torch.cat(rows) for rows in zip(*gradients, strict=True)))
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(gradients[0] * saved for saved in ctx.saved_tensors))
