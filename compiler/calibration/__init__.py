"""Calibration: samples of a model's inputs, what they say about its layers, and what its outputs are worth."""

from .gather import Calibration, gather
from .metrics import Drop, Metric, Run, check_metric, default_metric, find_metric, parse_drop
from .ranges import find_grids
from .reorder import reordered
from .repair import covariance, repair
from .rows import has_rows, masks
from .samples import Samples, open_samples, spread
from .trial import Trial, Weights

__all__ = [
    "Calibration",
    "Drop",
    "Metric",
    "Run",
    "Samples",
    "Trial",
    "Weights",
    "check_metric",
    "covariance",
    "default_metric",
    "find_grids",
    "find_metric",
    "gather",
    "has_rows",
    "masks",
    "open_samples",
    "parse_drop",
    "reordered",
    "repair",
    "spread",
]
