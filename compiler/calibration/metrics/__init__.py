"""What a model is judged by: measures of the field, or a user's function; against labels or against the dense model."""

from .drop import Drop, parse_drop
from .find import NAMES, check_metric, default_metric, find_metric
from .metric import Metric, Run

__all__ = ["NAMES", "Drop", "Metric", "Run", "check_metric", "default_metric", "find_metric", "parse_drop"]
