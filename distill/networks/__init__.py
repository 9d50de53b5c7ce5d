"""Networks that return `Features`: students, and frozen teachers."""

from distill.networks.base import FeatureSource, Network
from distill.networks.teacher import Ensemble, FrozenTeacher, Teacher
from distill.networks.timm import Timm
from distill.networks.torch_module import TorchModule
from distill.networks.weights import load_weights

__all__ = ["Ensemble", "FeatureSource", "FrozenTeacher", "Network", "Teacher", "Timm", "TorchModule", "load_weights"]
