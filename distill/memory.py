"""What heads remember from batch to batch: a ring of the latest embeddings, and a bank with a place for each sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import UserError

Storage = Literal["float32", "bfloat16"]
"""What a memory's numbers are stored as; they are computed with in the queries' type."""


class EmbeddingQueue(nn.Module):
    """A ring buffer of the latest embeddings, oldest overwritten first.

    Any number of rows can be put in at a time, also more than there is room for. All of its state is in buffers, so
    in checkpoints; no value is read on the host. Nothing keeps a graph.

    Under data parallelism, put in the *gathered* batch: then every rank holds the same rows and one process holds
    them too.

    Args:
        size: K, the number of rows.
        width: d, the width of an embedding.
        dtype: what they are stored as.

    Attributes:
        rows: `[K, d]`; only the first `filled` of them hold anything.
        count: int64 scalar, how many rows were ever put in.

    Raises:
        UserError: a size or width below 1.
    """

    rows: Tensor
    count: Tensor

    def __init__(self, size: int = 16384, width: int = 128, dtype: Storage = "float32") -> None:
        super().__init__()
        for name, given in (("size", size), ("width", width)):
            if given < 1:
                raise UserError(f"{name} of the memory must be at least 1, given {given}")
        self.register_buffer("rows", torch.zeros(size, width, dtype=getattr(torch, dtype)))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def filled(self) -> Tensor:
        """How many rows hold an embedding: an int64 scalar."""
        return self.count.clamp_max(len(self.rows))

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor) -> None:
        """Put in embeddings `[B, d]`, the first of them first."""
        size = len(self.rows)
        kept = embeddings[-size:]
        first = self.count + (len(embeddings) - len(kept))
        places = (first + torch.arange(len(kept), device=kept.device)) % size
        self.rows.index_copy_(0, places, kept.to(self.rows.dtype))
        self.count += len(embeddings)

    def latest(self) -> Tensor:
        """The rows that hold anything, oldest first, `[filled, d]`; it reads the count on the host."""
        count, size = int(self.count), len(self.rows)
        return self.rows[:count] if count <= size else self.rows.roll(-(count % size), 0)


class SampleBank(nn.Module):
    """A place for each sample of a data set, with what two networks last saw of it, and its class.

    It takes `samples` x `width` x 2 numbers. A place is filled with a random vector at first; later ones move it
    towards what is seen, and normalize it.

    Args:
        samples: n, the number of samples.
        width: d, the width of an embedding.
        momentum: the share of the old embedding in the new one.

    Attributes:
        student: `[n, d]`.
        teacher: `[n, d]`.
        label: int64 `[n]`, -1 for a sample whose class is not known (yet).

    Raises:
        UserError: less than two samples, a width below 1, or a momentum outside of [0, 1].
    """

    student: Tensor
    teacher: Tensor
    label: Tensor

    def __init__(self, samples: int = 50_000, width: int = 128, momentum: float = 0.5) -> None:
        super().__init__()
        if samples < 2:
            raise UserError(f"samples must be at least 2, given {samples}")
        if width < 1:
            raise UserError(f"width must be at least 1, given {width}")
        if not 0 <= momentum <= 1:
            raise UserError(f"momentum must be between 0 and 1, given {momentum}")
        self.momentum = momentum
        bound = math.sqrt(3 / width)  # the mean square of a vector's length is then 1
        for side in ("student", "teacher"):
            self.register_buffer(side, torch.empty(samples, width).uniform_(-bound, bound))
        self.register_buffer("label", torch.full((samples,), -1))

    @torch.no_grad()
    def update(self, index: Tensor, student: Tensor, teacher: Tensor, label: Tensor) -> None:
        """Move the places `index` `[B]` towards embeddings `[B, d]` and note the labels `[B]`.

        Of a sample that occurs twice, the last one counts.
        """
        twins = index.unsqueeze(1) == index
        last = (twins * torch.arange(len(index), device=index.device)).amax(dim=1)  # twins then write the same
        for bank, fresh in ((self.student, student), (self.teacher, teacher)):
            moved = torch.lerp(fresh[last].to(bank.dtype), bank[index], self.momentum)
            bank.index_copy_(0, index, F.normalize(moved, dim=1))
        self.label.index_copy_(0, index, label[last])


def with_gradient_now(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`loss(*inputs)`, a scalar, whose gradient is computed at once.

    So the memory that the loss reads can be written over before the backward pass.

    Args:
        loss: a function of the inputs; nothing else receives a gradient.
        inputs: of any shape.
    """
    value: Tensor = _GradientNow.apply(loss, *inputs)
    return value


def refuse_other_shapes(module: nn.Module, state: Mapping[str, Tensor], prefix: str, names: Mapping[str, str]) -> None:
    """Hold a checkpoint's tensors against the module's, before anything of it is loaded.

    Args:
        module: what is to be loaded.
        state: a state dict.
        prefix: of the module's keys in it.
        names: what to call the dimensions, by the key.

    Raises:
        UserError: a tensor has another shape.
    """
    own = module.state_dict()
    for key, name in names.items():
        if prefix + key in state and key in own and state[prefix + key].shape != own[key].shape:
            stored, given = (" x ".join(map(str, tensor.shape)) for tensor in (state[prefix + key], own[key]))
            raise UserError(
                f"{type(module).__name__}: {name} is {stored} in the checkpoint and {given} in the configuration: "
                "resume with what it was trained with, or start anew"
            )


class _GradientNow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            value = loss(*leaves)
            ctx.save_for_backward(*torch.autograd.grad(value, leaves))
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(gradients[0] * known for known in ctx.saved_tensors))
