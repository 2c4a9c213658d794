"""Weights and masks that keep a layer's outputs: post-training pruning against calibration data, one method a file."""

from .coupled import Reader, coupled_order
from .least_squares import Moments, refit
from .methods import AUTO, METHODS, SECONDS, choose, solve, solve_all
from .problem import Problem
from .rounding import round_weights
from .statistics import Statistics, error

__all__ = [
    "AUTO",
    "METHODS",
    "SECONDS",
    "Moments",
    "Problem",
    "Reader",
    "Statistics",
    "choose",
    "coupled_order",
    "error",
    "refit",
    "round_weights",
    "solve",
    "solve_all",
]
