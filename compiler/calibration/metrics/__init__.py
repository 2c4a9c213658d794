"""What a model is judged by: measures of the field, or a user's function; against labels or against the dense model."""

from .drop import Drop, parse_drop
from .find import NAMES, default_metric, find_metric
from .metric import Metric, Run

__all__ = ["NAMES", "Drop", "Metric", "Run", "default_metric", "find_metric", "parse_drop"]
