"""Gradients of the loss terms at tensors that they share, and what each term's share of them is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from distill.distributed import all_sum, rank, world_size
from distill.errors import UserError
from distill.networks import Network
from distill.objective import Losses

_CHUNK = 1 << 20
"""Elements of each gradient that are multiplied at a time, in float64."""


@dataclass(frozen=True)
class Share:
    """The gradient of one term, beside the reference's.

    Attributes:
        value: unweighted value of the term.
        weight: its weight (schedule x factor).
        norm: Euclidean norm of the unweighted gradient.
        ratio: `norm` / norm of the reference; NaN if that is 0.
        share: norm of the weighted gradient / norm of the reference's weighted gradient; NaN if that is 0.
        cosine: of the angle to the reference's gradient; NaN if one of them is 0.
        cosines: likewise, to each other term's gradient, by term name.
    """

    value: float
    weight: float
    norm: float
    ratio: float
    share: float
    cosine: float
    cosines: Mapping[str, float]


def gradient_shares(
    losses: Losses, reference: str, at: Sequence[Tensor], scale: float | Tensor = 1.0
) -> Mapping[str, Share]:
    """Compare the gradients of all terms of a step with the gradient of one of them.

    Each term takes one backward pass through the step's own graph, which is retained: call this before the step's
    backward pass. No `grad` is written, and no hook of DDP is called. In a process group every rank must call it; the
    gradient is then that of the batch of all ranks.

    >>> from distill.features import Features, FeatureSpec
    >>> from distill.heads import KD, CrossEntropy
    >>> from distill.objective import Objective, Term
    >>> from distill.schedules import Progress
    >>> weight, teacher = torch.randn(10, 64, requires_grad=True), Features(logits=torch.randn(8, 10))
    >>> shapes = FeatureSpec(logits=(10,))
    >>> objective = Objective({"task": Term(CrossEntropy()), "kd": Term(KD(), weight=0.5)}, shapes, shapes)
    >>> student = Features(logits=torch.randn(8, 64) @ weight.T)
    >>> losses = objective(student, teacher, {"label": torch.arange(8)}, Progress())
    >>> shares = gradient_shares(losses, "task", [weight])
    >>> shares["kd"].share == 0.5 * shares["kd"].ratio
    True

    Args:
        losses: the losses of a step, before its backward pass.
        reference: name of the term to compare with.
        at: tensors of the step's graph: parameters, see `shared_parameters`, or activations such as an embedding. An
            activation that is a view or a copy of another one stands for that one.
        scale: factor of the losses in the backward pass, that of a `GradScaler`; it is divided out again.

    Returns:
        Shares by term name, without terms that do not reach `at`.

    Raises:
        UserError: there is one term only, or no term of that name; the reference does not reach `at`; or a gradient is
            not finite, in which case the message names the term.
    """
    gradients = TermGradients()
    gradients.add(losses, at, scale)
    measurement = gradients.measure()
    if broken := measurement.not_finite():
        raise UserError(
            f"the gradient of the term {' and '.join(map(repr, broken))} is not finite: try a smaller learning rate "
            "or weight"
        )
    return measurement.shares(reference)


def shared_parameters(student: Network) -> list[Tensor]:
    """Return the trainable parameters of a student below its classifier, or all if it has no known classifier.

    Raises:
        UserError: there is none.
    """
    above = tuple(f"{layer}." for layer in student.classifier)
    parameters: list[Tensor] = [
        parameter
        for name, parameter in student.model.named_parameters()
        if parameter.requires_grad and not name.startswith(above)
    ]
    if not parameters:
        raise UserError(
            f"{student.name} has no trainable parameter below its classifier, so its terms share no layer: compare "
            "gradients only of a student whose backbone is trained"
        )
    return parameters


@dataclass(frozen=True)
class Measurement:
    """Values of the terms of a step and inner products of their gradients, on the host.

    Attributes:
        values: unweighted values, by term name.
        weights: weights, by term name.
        products: inner products of the unweighted gradients, for the terms that reach the tensors.
    """

    values: Mapping[str, float]
    weights: Mapping[str, float]
    products: Mapping[str, Mapping[str, float]]

    def norm(self, name: str) -> float:
        """Return the norm of a term's unweighted gradient."""
        return math.sqrt(max(self.products[name][name], 0.0))

    def not_finite(self) -> list[str]:
        """Return the names of the terms whose gradient is not finite."""
        return [name for name, row in self.products.items() if not math.isfinite(row[name])]

    def without(self, names: Collection[str]) -> Measurement:
        """Return the measurement without some terms' gradients."""
        products = {
            name: {partner: product for partner, product in row.items() if partner not in names}
            for name, row in self.products.items()
            if name not in names
        }
        return Measurement(self.values, self.weights, products)

    def largest(self) -> str | None:
        """Return the name of the term with the largest weighted gradient; `None` if no term has one."""
        pulls = {name: abs(self.weights[name]) * self.norm(name) for name in self.products}
        return max(pulls, key=lambda name: pulls[name]) if any(pulls.values()) else None

    def shares(self, reference: str) -> dict[str, Share]:
        """Compare all terms with one of them.

        Raises:
            UserError: there is nothing to compare, or the reference does not reach the tensors.
        """
        require_terms(list(self.values))
        if reference not in self.values:
            raise UserError(f"there is no term {reference!r} to compare with; there are {', '.join(self.values)}")
        if reference not in self.products:
            raise UserError(
                f"the gradient of {reference!r} does not reach these tensors, so nothing can be compared with it: "
                "measure at the student's parameters"
            )
        norms = {name: self.norm(name) for name in self.products}
        pull = abs(self.weights[reference]) * norms[reference]
        shares = {}
        for name, norm in norms.items():
            cosines = {
                partner: _ratio(product, norm * norms[partner])
                for partner, product in self.products[name].items()
                if partner != name
            }
            shares[name] = Share(
                value=self.values[name],
                weight=self.weights[name],
                norm=norm,
                ratio=_ratio(norm, norms[reference]),
                share=_ratio(abs(self.weights[name]) * norm, pull),
                cosine=cosines.get(reference, 1.0),
                cosines=cosines,
            )
        return shares


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
        inputs = [get_gradient_edge(tensor) if tensor.is_leaf else _source(tensor) for tensor in at]
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
        for name, row in _rows(found, [index for index, tensor in enumerate(at) if tensor.is_leaf], at).items():
            self._flat[name] = self._flat[name] + row if name in self._flat else row
        rows = _rows(found, [index for index, tensor in enumerate(at) if not tensor.is_leaf], at)
        if rows:
            products = _inner_products(list(rows.values()))
            for i, name in enumerate(rows):
                for j, partner in enumerate(rows):
                    so_far = self._products.get((name, partner), 0.0)
                    self._products[name, partner] = so_far + products[i, j]
        self._batches += 1

    def measure(self) -> Measurement:
        """Average over batches and ranks, and copy the result to the host; waits for the device."""
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


def require_terms(names: Sequence[str]) -> None:
    """Require at least two terms.

    Raises:
        UserError: there are fewer.
    """
    if len(names) < 2:
        raise UserError(
            f"gradients of several terms are compared, but {names[0]!r} is the only term: add one to model.heads"
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


def _source(tensor: Tensor) -> GradientEdge:
    """Return the place in the graph that `tensor` is a view or a copy of.

    A network's tokens, say, are a view of a map that the classifier reads, too: only at the map do all terms meet.
    """
    edge = get_gradient_edge(tensor)
    while edge.node.name() in _VIEWS:
        node, number = edge.node.next_functions[0]
        if node is None:
            break
        edge = GradientEdge(node, number)
    return edge


def _wide_flat(gradient: Tensor) -> Tensor:
    """Return a gradient in one dimension and at least float32."""
    return gradient.detach().flatten().to(torch.promote_types(gradient.dtype, torch.float32))


def _rows(
    found: Mapping[str, Sequence[Tensor | None]], indices: Sequence[int], at: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Concatenate each term's gradients at some of the tensors; 0 where a term does not reach one that others do."""
    like: list[tuple[int, Tensor]] = []
    for index in indices:
        gradient = next((row[index] for row in found.values() if row[index] is not None), None)
        if gradient is not None:
            like.append((index, gradient))
        elif at[index].is_leaf:  # another batch may reach it
            like.append((index, _wide_flat(at[index])))
    rows = {}
    for name, row in found.items():
        if any(row[index] is not None for index in indices):
            parts = [torch.zeros_like(zero) if row[index] is None else row[index] for index, zero in like]
            rows[name] = torch.cat([part for part in parts if part is not None])
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


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


_VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        *("Alias", "AsStrided", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze", "T"),
        *("ToCopy", "Transpose", "Unsqueeze", "UnsafeView", "View"),
    )
)
"""Operations of the graph that only arrange or copy what they get."""
