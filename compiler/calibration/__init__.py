"""Calibration: samples of a model's inputs, and what they say about the inputs of its layers."""

from .gather import Calibration, gather
from .samples import Samples, open_samples

__all__ = ["Calibration", "Samples", "gather", "open_samples"]
