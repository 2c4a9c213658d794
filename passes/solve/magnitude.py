"""The weights of the largest norm, whatever their inputs are: what every other method is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .problem import Problem, Solution


def magnitude(problem: Problem, densities: Sequence[float]) -> list[Solution]:
    """Keep what the pattern scores highest by w² (Hartenstein et al. 2020 for groups; not retrained)."""
    scores = np.square(problem.weight)
    return [problem.masked(problem.pattern.project(scores, density)) for density in densities]
