"""Callbacks for the Trainer."""

from distill.callbacks.checkpoint import RunCheckpoint
from distill.callbacks.exact_resume import ExactResume
from distill.callbacks.frozen_backbone import FrozenBackbone
from distill.callbacks.gradient_shares import GradientShares
from distill.callbacks.knn_probe import KNNProbe
from distill.callbacks.pictures import HeadPictures
from distill.callbacks.random_state import RandomState
from distill.callbacks.results import Results
from distill.callbacks.superpixels import SuperpixelSegments
from distill.callbacks.wandb import WandbReport

__all__ = [
    "ExactResume",
    "FrozenBackbone",
    "GradientShares",
    "HeadPictures",
    "KNNProbe",
    "RandomState",
    "Results",
    "RunCheckpoint",
    "SuperpixelSegments",
    "WandbReport",
]
