"""One sweep from the first input to the last; each decision's error is made good by the inputs that follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ir.patterns import NMPattern
from .problem import Problem, Solution

# Inputs whose weights are chosen together (SparseGPT's block size), rounded up to whole blocks of the pattern.
PANEL = 128


def sparsegpt(problem: Problem, densities: Sequence[float]) -> list[Solution]:
    """SparseGPT (Frantar and Alistarh, ICML 2023), for any pattern whose masks can be cut between inputs.

    With H = R Rᵀ, R upper triangular, the loss is ||Δ R||², and the k-th column of Δ R holds the changes Δ of inputs
    up to k only. Input k therefore has the best value w0 - (Σ_{i<k} Δ_i R_ik) / R_kk given those before it, and
    dropping it costs (that value · R_kk)²: the paper's sweep, by forward substitution in R instead of by updates with
    the Cholesky factor of H⁻¹. A panel costs one product with all changes before it.
    """
    return [_sweep(problem, density) for density in densities]


def _sweep(problem: Problem, density: float) -> Solution:
    weight, root = problem.weight, problem.statistics.root
    inputs = problem.shape[1]
    unit = problem.pattern.m if isinstance(problem.pattern, NMPattern) else problem.pattern.cols
    panel = -(-PANEL // unit) * unit
    change = np.zeros_like(weight)
    mask = np.zeros(weight.shape, dtype=np.bool_)
    for a in range(0, inputs, panel):
        b = min(a + panel, inputs)
        own = root[a:b, a:b]
        pushed = change[:, :a] @ root[:a, a:b]
        # Step 1. Choose: the panel's weights if all of them could still follow the errors before it.
        best = weight[:, a:b] - pushed @ np.linalg.inv(own)
        kept = problem.pattern.project(np.square(best * np.diagonal(own)), density)
        mask[:, a:b] = kept
        # Step 2. Sweep: dropped weights are -w0 away, kept ones go to their best value.
        for k in range(b - a):
            follow = -(pushed[:, k] + change[:, a : a + k] @ own[:k, k]) / own[k, k]
            change[:, a + k] = np.where(kept[:, k], follow, -weight[:, a + k])
    return Solution(np.where(mask, weight + change, 0.0), mask)
