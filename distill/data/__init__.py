"""The data modules: one file a data set; each batch is a dict of image, label and index."""

from distill.data.base import ImageData, Mixing, Samples, Split
from distill.data.digits import Digits
from distill.data.folder import ImageFolder

__all__ = ["Digits", "ImageData", "ImageFolder", "Mixing", "Samples", "Split"]
