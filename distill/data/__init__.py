"""The data modules: one file a data set; each batch is a dict of image, label and index."""

from distill.data.augmentation import TimmAugmentation
from distill.data.base import ImageData, ImageDataset, Split
from distill.data.cars import StanfordCars
from distill.data.cifar import CIFAR10, CIFAR100
from distill.data.digits import Digits
from distill.data.folder import ImageFolder
from distill.data.longtail import ExponentialTail, ListedTail, LongTail, StepTail
from distill.data.mixing import Mixing
from distill.data.stl10 import STL10
from distill.data.tiny_imagenet import TinyImageNet

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "Digits",
    "ExponentialTail",
    "ImageData",
    "ImageDataset",
    "ImageFolder",
    "ListedTail",
    "LongTail",
    "Mixing",
    "Split",
    "StanfordCars",
    "StepTail",
    "TimmAugmentation",
    "TinyImageNet",
]
