"""The alternating direction method: the best dense weights and the best mask pull at each other until they agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .problem import Problem, Solution

if TYPE_CHECKING:
    from numpy.typing import NDArray

# ALPS raises rho the more the more of the mask has moved since the last time (its section 3 and appendix); it begins
# with 0.1, which settled too early here on inputs whose spectrum decays fast.
RHO = 0.03
RAISES = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
# The mask has settled when it stood still for as many steps.
STILL = 5
# Steps between two raises, and at most in all. The quick schedule, for large products, keeps most of the gain.
THOROUGH = (3, 90)
QUICK = (1, 15)
QUICK_FROM = 5e8
# Multiplications of one product above which the steps run in float32.
FLOAT32_FROM = 2e7


def admm(problem: Problem, densities: Sequence[float]) -> list[Solution]:
    """ALPS (Meng et al., NeurIPS 2024) with the pattern's projection; densest first, each begins where the last ended.

    min ||X (B - W0)||² + indicator(D legal), B = D, with inputs scaled to a diagonal of ones:
    B = (W0 H - V + rho D)(H + rho I)⁻¹, D = project(B + V / rho), V += rho (B - D).
    """
    statistics = problem.statistics
    dtype = np.dtype(np.float32 if products(problem) > FLOAT32_FROM else np.float64)
    values, vectors = (part.astype(dtype) for part in statistics.eigen)
    weight = (problem.weight * statistics.scale).astype(dtype)
    dense = (weight @ vectors) * values
    start = weight
    solutions: dict[float, Solution] = {}
    for density in sorted(set(densities), reverse=True):
        start, mask = _iterate(problem, density, start, dense, values, vectors)
        solutions[density] = Solution(np.where(mask, start / statistics.scale, 0.0), mask)
    return [solutions[density] for density in densities]


def _iterate(
    problem: Problem,
    density: float,
    start: NDArray[np.floating],
    dense: NDArray[np.floating],
    values: NDArray[np.floating],
    vectors: NDArray[np.floating],
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """D and its mask [out, in]; `dense` is W0 H in the basis of the eigenvectors."""
    project = problem.pattern.project
    every, most = QUICK if products(problem) > QUICK_FROM else THOROUGH
    rho, still = RHO, 0
    price = np.zeros_like(start)
    mask = raised = project(np.square(start, dtype=np.float64), density)
    legal = np.where(mask, start, 0)
    for step in range(1, most + 1):
        free = ((dense + (rho * legal - price) @ vectors) / (values + rho)) @ vectors.T
        pulled = free + price / rho
        before, mask = mask, project(np.square(pulled, dtype=np.float64), density)
        legal = np.where(mask, pulled, 0)
        price = rho * (pulled - legal)
        still = still + 1 if np.array_equal(mask, before) else 0
        if still == STILL:
            break
        if step % every == 0:
            moved = int(np.count_nonzero(mask & ~raised)) / max(int(np.count_nonzero(mask)), 1)
            rho *= next(factor for least, factor in RAISES if moved >= least)
            raised = mask
    return legal, mask


def products(problem: Problem) -> float:
    """Multiplications of one of the two products of a step."""
    return float(problem.weight.size) * problem.shape[1]
