"""Metrics: top-k accuracy, calibration, agreement with the teacher, neighbors, and many- to few-shot accuracy."""

from distill.metrics.agreement import Agreement, TeacherDivergence
from distill.metrics.classification import IGNORE_INDEX, CalibrationError, TopAccuracy
from distill.metrics.collection import classification_metrics, teacher_metrics
from distill.metrics.longtail import LongTailAccuracy
from distill.metrics.neighbors import NeighborAgreement

__all__ = [
    "IGNORE_INDEX",
    "Agreement",
    "CalibrationError",
    "LongTailAccuracy",
    "NeighborAgreement",
    "TeacherDivergence",
    "TopAccuracy",
    "classification_metrics",
    "teacher_metrics",
]
