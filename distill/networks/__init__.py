"""Networks that return `Features`: students, and frozen teachers."""

from distill.networks.base import Network
from distill.networks.teacher import FrozenTeacher
from distill.networks.timm import Timm
from distill.networks.torch_module import TorchModule
from distill.networks.weights import WeightsFile, load_weights

__all__ = ["FrozenTeacher", "Network", "Timm", "TorchModule", "WeightsFile", "load_weights"]
