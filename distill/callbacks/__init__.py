"""What rides along with the Trainer."""

from distill.callbacks.pictures import HeadPictures
from distill.callbacks.random_state import RandomState

__all__ = ["HeadPictures", "RandomState"]
