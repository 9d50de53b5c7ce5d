"""Accuracy and calibration, updated without waiting for a device.

torchmetrics drops the labels that do not count from each batch, so that its length depends on values and a GPU stands
still. Here they are masked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.metrics.full_precision import FullPrecision

IGNORE_INDEX = -1
"""The label of samples that are unlabeled or only pad a rank's last batch."""


class TopAccuracy(FullPrecision):
    """Share of the images whose label is among the k classes of the highest scores, in `[0, 1]`; 0 without labels.

    Args:
        top: k.
    """

    full_state_update = False
    higher_is_better = True
    hits: Tensor
    images: Tensor

    def __init__(self, top: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.top = top
        for name in ("hits", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, label: Tensor) -> None:
        """Add scores `[B, K]`; labels `[B]` equal to `IGNORE_INDEX` do not count."""
        chosen = scores.argmax(dim=1, keepdim=True) if self.top == 1 else scores.topk(self.top, dim=1).indices
        self.hits += (chosen == label.unsqueeze(1)).sum()
        self.images += (label != IGNORE_INDEX).sum()

    def compute(self) -> Tensor:
        """Return the share of all images that count."""
        return self.hits.float() / self.images.clamp_min(1).float()


class CalibrationError(FullPrecision):
    """Expected calibration error: the mean distance of confidence from accuracy over bins of equal confidence.

    Each bin counts as often as it has images (L1). Only the sums of the bins are kept, not the images' confidences.

    Args:
        bins: number of bins of `[0, 1]`; a confidence of exactly 1 has one of its own.
    """

    full_state_update = False
    higher_is_better = False
    bounds: Tensor
    images: Tensor
    confidence: Tensor
    hits: Tensor

    def __init__(self, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("bounds", torch.linspace(0, 1, bins + 1), persistent=False)
        for name in ("images", "confidence", "hits"):
            self.add_state(name, torch.zeros(bins + 1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probability: Tensor, label: Tensor) -> None:
        """Add probabilities `[B, K]`; labels `[B]` equal to `IGNORE_INDEX` do not count."""
        confidence, chosen = probability.max(dim=1)
        bin_of = torch.bucketize(confidence, self.bounds.to(confidence), right=True) - 1
        of_bin = bin_of.unsqueeze(1) == torch.arange(len(self.bounds), device=bin_of.device)
        of_bin = of_bin & (label != IGNORE_INDEX).unsqueeze(1)
        self.images += of_bin.sum(0)
        self.confidence += torch.where(of_bin, confidence.to(self.confidence).unsqueeze(1), 0.0).sum(0)
        self.hits += (of_bin & (chosen == label).unsqueeze(1)).sum(0)

    def compute(self) -> Tensor:
        """Return the error over all images that count; 0 without labels."""
        return ((self.confidence - self.hits).abs().sum() / self.images.sum().clamp_min(1)).float()
