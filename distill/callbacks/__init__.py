"""What rides along with the Trainer."""

from distill.callbacks.frozen_backbone import FrozenBackbone
from distill.callbacks.pictures import HeadPictures
from distill.callbacks.random_state import RandomState
from distill.callbacks.superpixels import SuperpixelSegments

__all__ = ["FrozenBackbone", "HeadPictures", "RandomState", "SuperpixelSegments"]
