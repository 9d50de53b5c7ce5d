"""Classes that a configuration may name without their module."""

from importlib import import_module

_MODULES = (
    "distill.data",
    "distill.heads",
    "distill.networks.timm",
    "distill.networks.torch_module",
    "distill.schedules",
    "distill.training.lr_schedulers",
)


def import_named_classes() -> None:
    """Import the classes, since jsonargparse resolves short names of imported subclasses only."""
    for module in _MODULES:
        import_module(module)
