"""Gradients of the terms over the batches and ranks of an optimizer step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from distill.distributed import all_sum, rank, world_size
from distill.errors import UserError
from distill.gradients.measurement import Measurement
from distill.objective import Losses

_CHUNK = 1 << 20
"""Elements of each gradient that are multiplied at a time, in float64."""


class TermGradients:
    """Sum of each term's gradient over the batches of an optimizer step, averaged over batches and ranks.

    A parameter is the same for all batches and ranks, so its gradients are averaged; an activation belongs to its
    batch, so the gradients of all batches and ranks are parts of one longer gradient. Holds one copy of the parameters
    per term.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._values: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._flat: dict[str, Tensor] = {}  # gradients at parameters, by term
        self._products: dict[tuple[str, str], Tensor] = {}  # of gradients at activations, for pairs of terms

    def add(
        self,
        losses: Losses,
        at: Sequence[Tensor],
        scale: float | Tensor = 1.0,
        skip: Collection[str] = (),
    ) -> None:
        """Compute and add the gradients of a batch, before its backward pass.

        Args:
            losses: the losses of the batch.
            at: the same parameters for each batch, or activations of this batch.
            scale: factor of the losses in the backward pass.
            skip: terms that are not measured, the same on all ranks and in all batches of a step.
        """
        if not at or not all(tensor.requires_grad for tensor in at):
            raise UserError("gradients are compared at tensors that require one, given none: the terms share no layer")
        leaves = [tensor for tensor in at if tensor.is_leaf]
        inputs = [get_gradient_edge(leaf) for leaf in leaves]
        inputs += [source for tensor in at if not tensor.is_leaf for source in _sources(tensor)]
        found: dict[str, Sequence[Tensor | None]] = {}
        for name, value in losses.values.items():
            self._values[name] = self._values[name] + value.detach() if self._batches else value.detach().clone()
            self._weights[name] = losses.weights[name]
            if name not in skip and value.requires_grad:
                # With its weight, as in the step itself, a gradient in float16 is as precise as there.
                factor = torch.full_like(value, losses.weights[name] or 1.0) * scale
                gradients = _gradients(value, inputs, factor)
                if any(gradient is not None for gradient in gradients):
                    found[name] = [
                        None if gradient is None else _wide_flat(gradient) / factor for gradient in gradients
                    ]
        # Another batch may reach a parameter that this one does not.
        at_leaves = {name: row[: len(leaves)] for name, row in found.items()}
        for name, row in _rows(at_leaves, [_wide_flat(leaf) for leaf in leaves]).items():
            self._flat[name] = self._flat[name] + row if name in self._flat else row
        elsewhere = {name: row[len(leaves) :] for name, row in found.items()}
        rows = _rows(elsewhere, [None] * (len(inputs) - len(leaves)))
        if rows:
            products = _inner_products(list(rows.values()))
            for i, name in enumerate(rows):
                for j, partner in enumerate(rows):
                    so_far = self._products.get((name, partner), 0.0)
                    self._products[name, partner] = so_far + products[i, j]
        self._batches += 1

    def measure(self) -> Measurement:
        """Average over batches and ranks, and copy the result to the host; waits for the device."""
        if not self._values:  # all terms have weight 0
            return Measurement({}, {}, {})
        count = self._batches * world_size()
        names = list(dict.fromkeys((*self._flat, *(name for name, _ in self._products))))
        values = all_sum(torch.stack(list(self._values.values()))) / count
        products = values.new_zeros(len(names), len(names), dtype=_wide(values.device))
        if self._flat:  # one collective per term, in the same order on all ranks
            averages = {name: all_sum(self._flat[name]) / count for name in names if name in self._flat}
            zero = torch.zeros_like(next(iter(averages.values())))
            products += _inner_products([averages.get(name, zero) for name in names])
        if self._products:
            zero = products.new_zeros(())
            parts = [self._products.get((name, partner), zero) for name in names for partner in names]
            products += all_sum(torch.stack(parts).view_as(products)) / count**2
        figures = torch.cat([values.to(products), products.flatten()])
        # Rank 0's figures on all ranks, since what follows from them must be the same to the last bit.
        host = all_sum(figures if rank() == 0 else torch.zeros_like(figures)).tolist()
        rows = [host[start : start + len(names)] for start in range(len(values), len(host), max(len(names), 1))]
        return Measurement(
            dict(zip(self._values, host, strict=False)),
            dict(self._weights),
            {name: dict(zip(names, row, strict=True)) for name, row in zip(names, rows, strict=True)},
        )


def _gradients(value: Tensor, inputs: Sequence[GradientEdge], factor: Tensor) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(value, inputs, factor, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "donated" not in str(error):
            raise
        raise UserError(
            "a compiled network frees its activations in the backward pass: call allow_retained_graphs() before its "
            "first pass, or do not compile the student"
        ) from error


def allow_retained_graphs() -> None:
    """Let networks that are compiled from now on keep their graph for more than one backward pass.

    By default, torch reuses the memory of their activations in the first one.
    """
    import torch._functorch.config as options

    options.donated_buffer = False


def _sources(tensor: Tensor) -> list[GradientEdge]:
    """Return the places in the graph that `tensor` is a view or a copy of, or whose rows it joins.

    A network's tokens, say, are a view of a map that the classifier reads, too: only at the map do all terms meet.
    Likewise, a student that runs once for each view of the images has its features joined afterwards: each view's
    logits come from its own part.
    """
    found: dict[tuple[object, int], GradientEdge] = {}
    pending = [get_gradient_edge(tensor)]
    while pending:
        edge = pending.pop()
        inputs = edge.node.next_functions
        if not _joins_rows(edge.node):
            inputs = inputs[:1] if edge.node.name() in _VIEWS else ()
        sources = [GradientEdge(node, number) for node, number in inputs if node is not None]
        pending += reversed(sources)
        if not sources:
            found[edge.node, edge.output_nr] = edge
    return list(found.values())


def _joins_rows(node: Node) -> bool:
    return node.name() == "CatBackward0" and getattr(node, "_saved_dim", None) == 0


def _wide_flat(gradient: Tensor) -> Tensor:
    """Return a gradient in one dimension and at least float32."""
    return gradient.detach().flatten().to(torch.promote_types(gradient.dtype, torch.float32))


def _rows(found: Mapping[str, Sequence[Tensor | None]], unreached: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Concatenate each term's gradients, with 0 where a term does not reach what others do.

    Args:
        found: gradients at the same places, by term.
        unreached: for each place a tensor like its gradient, for zeros where no term reaches it; `None` for nothing.
    """
    like = list(unreached)
    for row in found.values():
        like = [part if zero is None else zero for part, zero in zip(row, like, strict=True)]
    rows = {}
    for name, row in found.items():
        if any(part is not None for part in row):
            pairs = [(part, zero) for part, zero in zip(row, like, strict=True) if zero is not None]
            rows[name] = torch.cat([torch.zeros_like(zero) if part is None else part for part, zero in pairs])
    return rows


def _inner_products(rows: Sequence[Tensor]) -> Tensor:
    """Return the inner products of vectors `[P]` with each other, `[T, T]`, in float64."""
    wide = _wide(rows[0].device)
    products = torch.zeros(len(rows), len(rows), dtype=wide, device=rows[0].device)
    for start in range(0, len(rows[0]), _CHUNK):
        part = torch.stack([row[start : start + _CHUNK] for row in rows]).to(wide)
        products += part @ part.T
    return products


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


_VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        *("Alias", "AsStrided", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze", "T"),
        *("ToCopy", "Transpose", "Unsqueeze", "UnsafeView", "View"),
    )
)
"""Operations of the graph that only arrange or copy what they get."""
