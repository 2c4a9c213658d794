"""Weights times the size of their inputs: the cheapest choice that looks at data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .problem import Problem, Solution


def wanda(problem: Problem, densities: Sequence[float]) -> list[Solution]:
    """Keep what the pattern scores highest by w²·E[x²] (Sun et al., ICLR 2024, "A Simple and Effective Pruning...").

    The paper compares |w|·‖x‖ within each output; here the pattern compares over the layer, so that outputs which
    matter more keep more.
    """
    scores = np.square(problem.weight) * problem.statistics.diagonal
    return [problem.masked(problem.pattern.project(scores, density)) for density in densities]
