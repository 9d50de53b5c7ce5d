"""Data modules, one file per data set, whose batches are dicts of image, label, index and draw."""

from distill.data.augmentation import TimmAugmentation, photo_transform, small_image_transform
from distill.data.base import ImageData
from distill.data.batch import Names, as_batch
from distill.data.cars import StanfordCars
from distill.data.cifar import CIFAR10, CIFAR100
from distill.data.dataset import ImageDataset, Split
from distill.data.digits import Digits
from distill.data.fashion_mnist import FashionMNIST
from distill.data.folder import ImageFolder
from distill.data.hugging_face import HuggingFaceImages
from distill.data.image_files import read_image
from distill.data.longtail import ExponentialTail, ListedTail, LongTail, StepTail
from distill.data.mixing import Mixing
from distill.data.photos import PhotoData
from distill.data.reading import ImageReader
from distill.data.small_images import SmallImageData
from distill.data.sources import ArraySource, FileSource
from distill.data.stl10 import STL10
from distill.data.tiny_imagenet import TinyImageNet
from distill.data.views import RandAugment

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "ArraySource",
    "Digits",
    "ExponentialTail",
    "FashionMNIST",
    "FileSource",
    "HuggingFaceImages",
    "ImageData",
    "ImageDataset",
    "ImageFolder",
    "ImageReader",
    "ListedTail",
    "LongTail",
    "Mixing",
    "Names",
    "PhotoData",
    "RandAugment",
    "SmallImageData",
    "Split",
    "StanfordCars",
    "StepTail",
    "TimmAugmentation",
    "TinyImageNet",
    "as_batch",
    "photo_transform",
    "read_image",
    "small_image_transform",
]
