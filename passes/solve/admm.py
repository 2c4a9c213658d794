"""The alternating direction method: the best dense weights and the best mask pull at each other until they agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from .problem import Problem, Solution

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .statistics import Statistics

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

Array: TypeAlias = "NDArray[np.floating]"


def admm(problem: Problem, densities: Sequence[float]) -> list[Solution]:
    """ALPS (Meng et al., NeurIPS 2024) with the pattern's projection; densest first, each begins where the last ended.

    min ||X (B - W0)||² + indicator(D legal), B = D, with inputs scaled to a diagonal of ones:
    B = (W0 H + rho (D - U))(H + rho I)⁻¹, D = project(B + U), U += B - D, where rho U is the paper's V.
    """
    statistics = problem.statistics
    dtype = np.dtype(np.float32 if products(problem) > FLOAT32_FROM else np.float64)
    weight = (problem.weight * statistics.scale).astype(dtype)
    target = (statistics.times(problem.weight) / statistics.scale).astype(dtype)
    shifted = _low_rank(statistics, dtype) if statistics.factor is not None else _eigen(problem, dtype)
    start = weight
    solutions: dict[float, Solution] = {}
    for density in sorted(set(densities), reverse=True):
        start, mask = _iterate(problem, density, start, target, shifted)
        solutions[density] = Solution(np.where(mask, start / statistics.scale, 0.0), mask)
    return [solutions[density] for density in densities]


def _iterate(
    problem: Problem, density: float, start: Array, target: Array, shifted: Callable[[float], Callable[[Array], Array]]
) -> tuple[Array, NDArray[np.bool_]]:
    """D and its mask [out, in]; `target` is W0 H, and `shifted` makes of rho the product with (H + rho I)⁻¹."""
    every, most = QUICK if products(problem) > QUICK_FROM else THOROUGH
    rho, still = RHO, 0
    mask = raised = _project(problem, start, density)
    divided = shifted(rho)
    legal = start * mask
    dual = np.zeros_like(start)
    for step in range(1, most + 1):
        rows = legal - dual
        rows *= rho
        rows += target
        pulled = divided(rows)
        pulled += dual
        before, mask = mask, _project(problem, pulled, density)
        legal = pulled * mask
        dual = np.subtract(pulled, legal, out=pulled)
        still = still + 1 if np.array_equal(mask, before) else 0
        if still == STILL:
            break
        if step % every == 0 and step < most:
            moved = int(np.count_nonzero(mask & ~raised)) / max(int(np.count_nonzero(mask)), 1)
            factor = next(factor for least, factor in RAISES if moved >= least)
            rho *= factor
            divided = shifted(rho)
            dual /= factor  # rho U stays
            raised = mask
    return legal, mask


def _project(problem: Problem, weight: Array, density: float) -> NDArray[np.bool_]:
    """The mask by squares, in the precision of the steps: sorting is a good part of one."""
    return problem.pattern.project(cast("NDArray[np.float64]", np.square(weight)), density)


def _eigen(problem: Problem, dtype: np.dtype[Any]) -> Callable[[float], Callable[[Array], Array]]:
    """Products with (H + rho I)⁻¹ by eigenvectors; as one matrix where that costs less than a product more a step."""
    values, vectors = (part.astype(dtype) for part in problem.statistics.eigen)
    out, inputs = problem.shape

    def shifted(rho: float) -> Callable[[Array], Array]:
        shares = 1 / (values + rho)
        if inputs > out:
            return lambda rows: ((rows @ vectors) * shares) @ vectors.T
        inverse = (vectors * shares) @ vectors.T
        return lambda rows: rows @ inverse

    return shifted


def _low_rank(statistics: Statistics, dtype: np.dtype[Any]) -> Callable[[float], Callable[[Array], Array]]:
    """Products with (F Fᵀ + E)⁻¹ = E⁻¹ - E⁻¹ F (I + Fᵀ E⁻¹ F)⁻¹ Fᵀ E⁻¹, E diagonal (Woodbury)."""
    assert statistics.factor is not None
    factor = statistics.factor / statistics.scale[:, None]
    ridge = statistics.ridge / statistics.diagonal

    def shifted(rho: float) -> Callable[[Array], Array]:
        shares = 1 / (ridge + rho)
        left = factor * shares[:, None]
        right = np.linalg.solve(np.eye(factor.shape[1]) + factor.T @ left, left.T).astype(dtype)
        narrow, own = left.astype(dtype), shares.astype(dtype)

        def divided(rows: Array) -> Array:
            result = rows * own
            result -= (rows @ narrow) @ right
            return np.asarray(result)

        return divided

    return shifted


def products(problem: Problem) -> float:
    """Multiplications of one of the two products of a step."""
    return float(problem.weight.size) * problem.shape[1]
