"""The methods by name, and which one a layer gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...ir import UsageError
from ...ir.patterns import NMPattern
from .admm import QUICK, QUICK_FROM, THOROUGH, admm, products
from .least_squares import least_squares
from .magnitude import magnitude
from .obs import obs
from .problem import Method, Problem, Solution
from .sparsegpt import sparsegpt
from .statistics import Statistics
from .wanda import wanda

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...ir import Pattern

METHODS: dict[str, Method] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "obs": obs,
    "admm": admm,
}
AUTO = "auto"
# Where inputs hardly correlate these masks can be the best. Where it costs little they are tried too, so that no other
# method ends above them.
PLAIN = ("magnitude", "wanda")
# What "auto" may spend on a layer, in seconds of one core.
SECONDS = 15.0


def solve(
    weight: NDArray[np.float32],
    hessian: NDArray[np.float64] | Statistics,
    pattern: Pattern,
    density: float,
    method: str = AUTO,
    repair: bool = True,
    seconds: float = SECONDS,
) -> NDArray[np.float32]:
    """The weight [out, in] of a layer, pruned to `density`: `solve_all` for one."""
    return solve_all(weight, hessian, pattern, (density,), method, repair, seconds)[0]


def solve_all(
    weight: NDArray[np.float32],
    hessian: NDArray[np.float64] | Statistics,
    pattern: Pattern,
    densities: Sequence[float],
    method: str = AUTO,
    repair: bool = True,
    seconds: float = SECONDS,
) -> list[NDArray[np.float32]]:
    """Weights W of a layer for several densities: min ||X (W - W0)ᵀ||² with zeros that are legal for the pattern.

    What can be computed once is: factorisations, the order of removal of "obs", and "admm" begins with the result of
    the density before.

    Args:
        weight: W0, [out, in] float32.
        hessian: Xᵀ X / n [in, in] of the layer's inputs, or `Statistics` of it, to share between layers.
        pattern: the shape of sparsity.
        densities: shares of weights to keep; of one that the pattern cannot reach, the nearest.
        method: one of `METHODS`, or "auto": by `choose`.
        repair: whether the kept weights get their least-squares values, and the plainer methods' masks are tried
            where that costs little. Without it "magnitude" and "wanda" leave the kept weights as they were.
        seconds: what "auto" may spend.

    Returns:
        For each density a float32 matrix [out, in] with exact zeros outside the mask, which is as it came where it has
        the zeros already. Inputs that were always zero in calibration get the weight 0.

    Raises:
        UsageError: there is no such method, or a density is outside 0..1.
        SparsecError: shapes do not match, or a value is NaN or infinite.
    """
    statistics = hessian if isinstance(hessian, Statistics) else Statistics.of(hessian)
    problem = Problem.of(weight, statistics, pattern)
    for density in densities:
        if not 0 <= density <= 1:
            raise UsageError(f"density {density:g} is outside 0..1")
    name = choose(problem, seconds, min(densities, default=1.0)) if method == AUTO else method
    if name not in METHODS:
        raise UsageError(f"'{name}' is no method of pruning: expected {', '.join((AUTO, *METHODS))}")
    if isinstance(pattern, NMPattern):
        densities = [pattern.n / pattern.m if density else 0.0 for density in densities]
    # A weight that has the zeros already stays as it came: nothing is nearer to it.
    weights = {density: problem.weight for density in densities if _has_zeros(problem, density)}
    wanted = sorted({*densities} - weights.keys(), reverse=True)
    solutions = METHODS[name](problem, wanted) if wanted else []
    if repair:
        if name != "obs":  # whose weights are the least-squares ones already
            solutions = [_repaired(problem, solution) for solution in solutions]
        # On a real model's layers "obs" is 13 to 50 % below them; of many densities it is not worth twice the time.
        if name not in PLAIN and (name != "obs" or len(wanted) == 1) and products(problem) <= QUICK_FROM:
            for other in PLAIN:
                plain = [_repaired(problem, solution) for solution in METHODS[other](problem, wanted)]
                solutions = [_better(problem, *pair) for pair in zip(solutions, plain, strict=True)]
    weights |= {density: solution.weight for density, solution in zip(wanted, solutions, strict=True)}
    return [weights[density].astype(np.float32) for density in densities]


def _has_zeros(problem: Problem, density: float) -> bool:
    outside = ~problem.pattern.project(np.square(problem.weight), density)
    return not problem.weight[outside].any()


def _repaired(problem: Problem, solution: Solution) -> Solution:
    weight = least_squares(problem.weight, solution.mask, problem.statistics, start=solution.weight)
    return Solution(weight, solution.mask)


def _better(problem: Problem, first: Solution, second: Solution) -> Solution:
    return first if problem.loss(first.weight) <= problem.loss(second.weight) else second


def choose(problem: Problem, seconds: float = SECONDS, density: float = 0.5) -> str:
    """The most accurate method whose estimated time on one core, down to `density`, is within `seconds`.

    Where outputs share their masks that is "obs", then "admm"; for single weights and N:M, where "obs" would need an
    inverse for every output, "admm". "sparsegpt" is left for the largest.
    """
    shared = problem.pattern.rows * problem.pattern.cols > 1
    if shared and obs_seconds(problem, density) <= seconds:
        return "obs"
    return "admm" if admm_seconds(problem) <= seconds else "sparsegpt"


def obs_seconds(problem: Problem, density: float = 0.5) -> float:
    """Of one core: of every block row the factor, one removal after the other, and the last system (measured).

    All measurements: an AVX-512 Xeon at 2.5 GHz.
    """
    block_rows, block_cols = problem.pattern.grid(problem.shape)
    gone, inputs = 1 - density, problem.shape[1]
    factor = 3e-11 * inputs**3 * gone**2 * (3 - 2 * gone)
    system = 2.7e-11 * (inputs * min(density, gone)) ** 3
    return 1e-10 * inputs**3 + block_rows * (factor + system + 2.5e-5 * block_cols * gone)


def admm_seconds(problem: Problem) -> float:
    """Of one core: the eigenvectors, unless the rank is low, and the steps for one density (measured)."""
    size, inputs, factor = products(problem), float(problem.shape[1]), problem.statistics.factor
    _, steps = QUICK if size > QUICK_FROM else THOROUGH
    if factor is not None:
        rank = factor.shape[1]
        return float(steps * (problem.weight.size * (3e-8 + 5e-11 * rank) + 5e-11 * inputs * rank**2))
    return float(6e-10 * inputs**3 + steps * (5e-11 * size + 3e-8 * problem.weight.size))
