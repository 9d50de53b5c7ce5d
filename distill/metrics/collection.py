"""Collections of the metrics of validation and test."""

from __future__ import annotations

from torchmetrics import Metric, MetricCollection

from distill.metrics.agreement import Agreement, TeacherDivergence
from distill.metrics.classification import CalibrationError, TopAccuracy


def classification_metrics(num_classes: int, stage: str) -> MetricCollection:
    """Create top-1 and top-5 accuracy and the expected calibration error (15 bins, L1).

    Args:
        num_classes: K; top-5 is reported for more than 5 classes.
        stage: `val` or `test`, the prefix of the names.
    """
    metrics: dict[str, Metric | MetricCollection] = {"top1": TopAccuracy(), "calibration_error": CalibrationError()}
    if num_classes > 5:
        metrics["top5"] = TopAccuracy(5)
    return MetricCollection(metrics, prefix=f"{stage}/", compute_groups=False)


def teacher_metrics(stage: str) -> MetricCollection:
    """Create agreement with the teacher and KL(teacher || student)."""
    return MetricCollection(
        {"agreement": Agreement(), "kl_to_teacher": TeacherDivergence()}, prefix=f"{stage}/", compute_groups=False
    )
