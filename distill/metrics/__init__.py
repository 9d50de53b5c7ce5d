"""What a test reports: top-k accuracy, calibration, and agreement with the teacher."""

from distill.metrics.agreement import Agreement, TeacherDivergence
from distill.metrics.collection import UNCOUNTED, classification_metrics, teacher_metrics

__all__ = ["UNCOUNTED", "Agreement", "TeacherDivergence", "classification_metrics", "teacher_metrics"]
