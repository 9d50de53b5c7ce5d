"""Measured gradients on the host, and each term's share of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from distill.errors import UserError


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


def require_terms(names: Sequence[str]) -> None:
    """Require at least two terms.

    Raises:
        UserError: there are fewer.
    """
    if len(names) < 2:
        raise UserError(
            f"gradients of several terms are compared, but {names[0]!r} is the only term: add one to model.heads"
        )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
