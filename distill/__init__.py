"""Relation distillation for image models on PyTorch Lightning."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "ClassificationModule": "distill.training.classification",
    "DistillationModule": "distill.training.distillation",
    "Distiller": "distill.distiller",
    "Ensemble": "distill.networks",
    "Features": "distill.features",
    "FeatureSpec": "distill.features",
    "Head": "distill.heads",
    "Network": "distill.networks",
    "Objective": "distill.objective",
    "Progress": "distill.schedules",
    "RelationHead": "distill.heads",
    "StoredTeacher": "distill.store",
    "Term": "distill.objective",
    "Timm": "distill.networks",
    "UserError": "distill.errors",
    "TorchModule": "distill.networks",
    "fit": "distill.api",
    "load_student": "distill.export",
}
__all__ = ["__version__", *_HOMES]  # imported on first use, so that `import distill` stays light


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'distill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
