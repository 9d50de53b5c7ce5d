"""The data modules: one file a data set; each batch is a dict of image, label and index."""

from distill.data.augmentation import TimmAugmentation
from distill.data.base import ImageData, Samples, Split
from distill.data.cifar import CIFAR10, CIFAR100
from distill.data.digits import Digits
from distill.data.folder import ImageFolder
from distill.data.mixing import Mixing

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Digits",
    "ImageData",
    "ImageFolder",
    "Mixing",
    "Samples",
    "Split",
    "TimmAugmentation",
]
