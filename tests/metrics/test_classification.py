"""Accuracy and calibration against torchmetrics, batch by batch on any device, and without a wait."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassRecall

from distill.metrics import (
    IGNORE_INDEX,
    LongTailAccuracy,
    NeighborAgreement,
    classification_metrics,
    teacher_metrics,
)
from distill.testing import no_waiting

CLASSES = 7


def batches(sharpness: float) -> list[tuple[Tensor, Tensor]]:
    """Scores and labels, some of which do not count, in batches of unequal length; the last has none that counts."""
    generator = torch.Generator().manual_seed(int(sharpness))
    found = []
    for count in (32, 5, 1, 4):
        label = torch.randint(-1, CLASSES, (count,), generator=generator)
        scores = sharpness * torch.randn(count, CLASSES, generator=generator)
        found.append((scores, label if count != 4 else torch.full_like(label, IGNORE_INDEX)))
    return found


@pytest.mark.parametrize("sharpness", [1.0, 8.0, 25.0], ids=["unsure", "sure", "certain"])
def test_the_figures_are_those_of_torchmetrics(sharpness: float, device: torch.device) -> None:
    metrics = classification_metrics(CLASSES, "val").to(device)
    reference = {
        "val/top1": MulticlassAccuracy(CLASSES, average="micro", ignore_index=IGNORE_INDEX),
        "val/top5": MulticlassAccuracy(CLASSES, top_k=5, average="micro", ignore_index=IGNORE_INDEX),
        "val/calibration_error": MulticlassCalibrationError(CLASSES, ignore_index=IGNORE_INDEX),
    }
    for scores, label in batches(sharpness):
        probability = scores.softmax(dim=1)
        given = probability.to(device), label.to(device)
        with no_waiting(device):
            metrics.update(*given)
        for metric in reference.values():
            metric.update(probability, label)
    found = {name: value.cpu() for name, value in metrics.compute().items()}
    torch.testing.assert_close(found, {name: metric.compute() for name, metric in reference.items()})


def test_without_a_label_all_figures_are_0() -> None:
    metrics = classification_metrics(CLASSES, "val")
    metrics.update(torch.ones(3, CLASSES) / CLASSES, torch.full((3,), IGNORE_INDEX))
    assert not any(metrics.compute().values())


def test_recalls_are_those_of_torchmetrics(device: torch.device) -> None:
    metric = LongTailAccuracy(CLASSES, {"few": [0, 3]}).to(device)
    reference = MulticlassRecall(CLASSES, average="none", ignore_index=IGNORE_INDEX)
    for scores, label in batches(1.0):
        given = scores.to(device), label.to(device)
        with no_waiting(device):
            metric.update(*given)
        reference.update(scores, label)
    recall, found = reference.compute(), metric.compute()
    torch.testing.assert_close(torch.stack([found[f"recall/{label}"] for label in range(CLASSES)]).cpu(), recall)
    torch.testing.assert_close(found["few"].cpu(), recall[[0, 3]].mean())


def test_comparisons_with_the_teacher_do_not_wait(device: torch.device) -> None:
    metrics, neighbors = teacher_metrics("val").to(device), NeighborAgreement(2).to(device)
    for scores, label in batches(1.0)[:2]:
        given = scores.to(device), scores.flip(0).to(device), (label >= 0).to(device)
        with no_waiting(device):
            metrics.update(*given)
            neighbors.update(*given)
    assert 0 <= float(metrics.compute()["val/agreement"]) <= 1
    assert 0 <= float(neighbors.compute()) <= 1


def test_sums_keep_their_type_in_a_module_of_half_precision() -> None:
    metrics = [classification_metrics(CLASSES, "val"), teacher_metrics("val"), LongTailAccuracy(CLASSES, {"few": [0]})]
    expected = [metric.metric_state for collection in metrics for metric in members(collection)]
    torch.nn.ModuleList(metrics).to(torch.bfloat16)
    found = [metric.metric_state for collection in metrics for metric in members(collection)]
    assert found
    for before, after in zip(expected, found, strict=True):
        assert {name: tensor.dtype for name, tensor in after.items()} == {
            name: tensor.dtype for name, tensor in before.items()
        }


def members(metrics: torch.nn.Module) -> list[Metric]:
    return [metric for metric in metrics.modules() if isinstance(metric, Metric)]
