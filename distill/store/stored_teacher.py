"""A teacher whose answers are read from a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import UserError
from distill.features import Features, FeatureSpec, Summary
from distill.networks import Teacher
from distill.store.index import StoreIndex
from distill.store.quantities import Quantity
from distill.store.requests import FEATURES, Request, summary_arguments
from distill.store.state import read_state
from distill.store.stored_rows import StoredRows

CLASSIFIER = "classifier"
"""Name of the state that holds the teacher's classifier, where it is linear."""
STORED = "stored"
"""Key of a batch under which the rows of stored teachers are, by teacher and quantity."""


@dataclass(frozen=True)
class StoredFeatures(Features):
    """A teacher's answers as they were stored: some of its own features, and the summaries of terms.

    Attributes:
        summaries: by the term's name; those that are not stored for a batch's split are missing.
    """

    summaries: Mapping[str, Summary] = field(default_factory=dict)

    def apply(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the answers with `function` applied to every tensor, those of the summaries included."""
        summaries = {term: summary.apply(function) for term, summary in self.summaries.items()}
        return replace(super().apply(function), summaries=summaries)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return the answers for several batches as those for one."""
        summaries = {term: Summary.joined([part.summaries[term] for part in parts]) for term in parts[0].summaries}
        return replace(super().joined(parts), summaries=summaries)


class LinearClassifier(nn.Module):
    """A teacher's classifier as it was stored: embeddings `[..., d]` to logits `[..., K]`, in their dtype.

    Args:
        weight: `[K, d]`.
        bias: `[K]`, or `None`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, embedding: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(embedding.dtype)
        return F.linear(embedding, self.weight.to(embedding.dtype), bias)


class StoredTeacher(Teacher):
    """A teacher that was run once, by `distill store`, and is read from the disk since.

    No network is built. The rows come with the batches of a data module of this package, whose images must be those
    that the teacher saw. On a CPU in float32, training equals that with the teacher itself bit for bit, with as many
    threads and a network whose answer to an image does not depend on its place in the batch. (Where it does, in the
    last digits and at batch sizes that are no multiple of 32, `distill store` warns.)

    Args:
        path: folder of the store.
        verify: number of stored rows to recompute before the first step, with the network built for it as it was for
            the store; they must agree to 1e-5.
        any_batch_size: accept batches of another size per process than the teacher had. Its features then agree to
            about 1e-5 only.

    Raises:
        UserError: `verify` is negative.
    """

    def __init__(self, path: str, verify: int = 0, any_batch_size: bool = False) -> None:
        super().__init__()
        if verify < 0:
            raise UserError(f"verify must be at least 0, given {verify}")
        self.path, self.verify, self.any_batch_size = path, verify, any_batch_size
        self.requests: dict[str, Request] = {}
        self._key = ""
        self._index: StoreIndex | None = None
        self.classify: LinearClassifier | None = None

    def build(self, members: Mapping[str, Teacher] | None = None) -> None:
        """Read the index of the store.

        Raises:
            UserError: there is no store, or its index or classifier is damaged.
        """
        self._index = StoreIndex.read(self.path)
        if self.index.identity["teacher"].get("classifies"):
            self.classify = LinearClassifier(**read_state(self.path, CLASSIFIER))

    @property
    def index(self) -> StoreIndex:
        """The index of the store."""
        assert self._index is not None, "the teacher is not built"
        return self._index

    @property
    def name(self) -> str:
        """The name shown in tables."""
        return f"{self.index.identity['teacher']['name']}, stored in {self.path}"

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the teacher that was stored."""
        return str(self.index.identity["teacher"]["fingerprint"])

    @property
    def spec(self) -> FeatureSpec:
        """The shapes of the features that the teacher had, stored or not."""
        identity = self.index.identity
        maps = {name: tap["shape"] for name, tap in identity.get("taps", {}).items()}
        spec = spec_from_json({**identity["teacher"]["features"], "maps": maps})
        return replace(spec, classifies=self.classify is not None)

    def gives(self, name: str, split: str) -> bool:
        """Return True if the teacher's feature `name` is stored for a split."""
        return split in self.index.splits and name in self.index.contents[split]

    def answers(self, term: str, split: str) -> bool:
        """Return True if the summaries of a term are stored for a split."""
        return split in self.index.splits and self.requests[term].is_met_by(self.index.contents[split])

    def use(self, key: str, requests: Mapping[str, Request]) -> None:
        """Choose the quantities to read.

        Args:
            key: the teacher's name, under which batches have its rows.
            requests: by term.
        """
        self._key, self.requests = key, dict(requests)

    def require(self, term: str) -> None:
        """Require the summaries of a term for the training images.

        Raises:
            UserError: they are not stored.
        """
        request = self.requests[term]
        if not self.answers(term, "train"):
            wanted = " and ".join(map(repr, request.features)) or f"what {request.head} compares with at these settings"
            rounded = "" if request.dtype == "float32" else f" in {request.dtype}"
            raise UserError(
                f"the store {self.path!r} does not have {wanted}{rounded} of the training images: add it by "
                f"`distill store --config ... --output {self.path}` with a configuration that has this term"
            )

    def quantities(self, split: str) -> list[Quantity]:
        """Return the quantities that are read for the images of a split."""
        stored = self.index.contents.get(split, ())
        names = {name for request in self.requests.values() for name in request.parts(stored).values()}
        if split != "train":
            names |= {name for name in FEATURES[:2] if name in stored}  # for the metrics
        return [quantity for quantity in self.index.quantities_of(split) if quantity.name in names] if stored else []

    def rows(self, split: str) -> StoredRows:
        """Return the rows that are read for the images of a split."""
        return StoredRows(self.path, split, self.quantities(split), self.index.splits[split], self.index.key)

    def features(self, batch: Mapping[str, Any], others: Mapping[str, Features]) -> StoredFeatures:
        """Return the answers that came with a batch, which may be none."""
        rows: Mapping[str, Tensor] = batch.get(STORED, {}).get(self._key, {})
        summaries = {
            term: Summary(
                **summary_arguments(
                    {part: rows[name] for part, name in request.parts([*rows]).items()},
                    self.spec.grid if request.features else None,
                ),
                classify=self.classify,
            )
            for term, request in self.requests.items()
            if request.is_met_by([*rows])
        }
        features = {name: rows[name] for name in FEATURES if name in rows}
        arguments = summary_arguments(features, self.spec.grid)
        return StoredFeatures(**arguments, classify=self.classify, summaries=summaries)

    def dummy_rows(self, count: int) -> dict[str, Tensor]:
        """Return random rows of the shapes that training reads, by quantity."""
        return {
            quantity.name: torch.randn(count, *quantity.shape).to(quantity.dtype)
            for quantity in self.quantities("train")
        }


def spec_to_json(spec: FeatureSpec) -> dict[str, Any]:
    """Return the shapes of features as JSON values."""
    shapes = {name: getattr(spec, name) for name in (*FEATURES, "grid")}
    found = {name: list(shape) for name, shape in shapes.items() if shape is not None}
    return {**found, "maps": {name: list(shape) for name, shape in spec.maps.items()}}


def spec_from_json(value: Mapping[str, Any]) -> FeatureSpec:
    """Return the shapes that `spec_to_json` described."""
    shapes = {name: tuple(value[name]) for name in (*FEATURES, "grid") if name in value}
    return FeatureSpec(**shapes, maps={name: tuple(shape) for name, shape in value["maps"].items()})  # type: ignore[arg-type]  # a grid has two
