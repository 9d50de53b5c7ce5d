"""What rides along with the Trainer."""

from distill.callbacks.pictures import HeadPictures
from distill.callbacks.random_state import RandomState
from distill.callbacks.superpixels import SuperpixelSegments

__all__ = ["HeadPictures", "RandomState", "SuperpixelSegments"]
