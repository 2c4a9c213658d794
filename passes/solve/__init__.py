"""Weights and masks that keep a layer's outputs: post-training pruning against calibration data, one method a file."""

from .least_squares import Moments, correct_bias, refit
from .methods import METHODS, solve, solve_all
from .statistics import Statistics, error

__all__ = ["METHODS", "Moments", "Statistics", "correct_bias", "error", "refit", "solve", "solve_all"]
