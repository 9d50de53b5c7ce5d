"""Networks that return `Features`: students, and frozen teachers."""

from distill.networks.base import FeatureSource, Network
from distill.networks.hugging_face import HuggingFace
from distill.networks.teacher import Ensemble, FrozenTeacher, Teacher
from distill.networks.timm import Timm
from distill.networks.torch_module import TorchModule
from distill.networks.torchvision import Torchvision
from distill.networks.weights import WeightsFile, load_weights

__all__ = [
    "Ensemble",
    "FeatureSource",
    "FrozenTeacher",
    "HuggingFace",
    "Network",
    "Teacher",
    "Timm",
    "TorchModule",
    "Torchvision",
    "WeightsFile",
    "load_weights",
]
