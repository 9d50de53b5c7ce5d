"""Relation distillation for image models on PyTorch Lightning."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ClassificationModule": "distill.training.modules",
    "DistillationModule": "distill.training.modules",
    "Features": "distill.features",
    "FeatureSpec": "distill.features",
    "Head": "distill.heads",
    "Network": "distill.networks",
    "RelationHead": "distill.heads",
    "Term": "distill.heads",
    "Timm": "distill.networks",
    "UserError": "distill.errors",
    "Wrap": "distill.networks",
}
__all__ = ["__version__", *_HOMES]  # made on demand, so that `import distill` stays light


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'distill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
