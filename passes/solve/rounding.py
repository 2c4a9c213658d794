"""Weights on the grid that they are stored on: rounded so that the errors of rounding and of pruning cancel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...ir import SparsecError
from ...ir.values import Floats, Values
from .nearest_plane import Grid, at_once, by_mask, nearest_plane, seconds
from .statistics import Statistics

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What the exact sweep may take of one core. It lowers the whole loss, pruning's included, by up to 2 % (codebook16).
SECONDS = 5.0
# Passes of coordinate descent, and the share of the loss that one has to gain for another.
PASSES = 2
LEAST_GAIN = 1e-3
# Inputs between two products of a pass.
PANEL = 64


def round_weights(
    weight: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    reference: NDArray[np.float32],
    statistics: Statistics,
    values: Values,
    table: NDArray[np.float32] | None = None,
    limit: float = SECONDS,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights W inside `mask`, of a kind of values, that keep tr((W - `reference`) H (W - `reference`)ᵀ) small.

    Of each output, the better of two: every weight rounded to the nearest, and `nearest_plane`'s sweep, in which the
    kept weights that follow make good each one's error, and what pruning left to be made good. It is exact, by a factor
    of H at the kept inputs for each mask, where that takes no longer than `limit`: where outputs share masks, and in
    small layers. Else one factor serves all outputs, and `weight` should be the best with its mask; the loss from
    rounding is then 2 to 10 % higher. Last, coordinate descent: each weight in turn takes the number nearest to its
    best value. With correlated inputs the loss from rounding is 0.2 to 0.6 of what rounding to the nearest gives.

    Codebooks come from k-means on the kept weights, squared errors weighted by diag H, scales from the largest weight.
    Measured and left out: fitting a codebook to the result by least squares and rounding again (less than 3 % of the
    loss from rounding), and smaller scales that clip the largest weights of 8 bits (1 %).

    Args:
        weight: [out, in] float32, pruned and repaired.
        mask: [out, in] where weights may be other than zero; where `weight` is, if None.
        reference: W0, [out, in] float32, the dense weight.
        statistics: H.
        values: the kind.
        table: of a model that came with its own; None to fit one.
        limit: seconds of one core.

    Returns:
        [out, in] float32, exactly what it is after packing, with zeros outside the mask; and the table.

    Raises:
        SparsecError: shapes do not match, or a weight is not finite or too large for the kind.
    """
    _check(weight, mask, reference, statistics)
    mask = weight != 0 if mask is None else mask
    pruned = np.where(mask, weight, np.float32(0))
    table = values.fit(pruned, statistics.diagonal) if table is None else table
    with np.errstate(over="ignore"):
        codes = values.encode(pruned, table)
    nearest = values.decode(codes, table)
    if not np.isfinite(nearest).all():
        raise SparsecError(f"the layer's largest weight, {np.abs(pruned).max():g}, is too large for {values}")
    if values == Floats():
        return nearest, table
    # -128 is for models that came with it.
    grid = Grid(values, table, least=min(int(codes.min()), -127))
    rounded = _improved(nearest, pruned, mask, reference, statistics, grid, limit)
    return rounded.astype(np.float32), table


def _check(
    weight: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    reference: NDArray[np.float32],
    statistics: Statistics,
) -> None:
    shape = (len(weight), len(statistics.dead))
    if not weight.size or not weight.shape == reference.shape == shape or (mask is not None and mask.shape != shape):
        raise SparsecError(
            f"weight {list(weight.shape)}, its reference {list(reference.shape)} and a mask "
            f"{list(weight.shape if mask is None else mask.shape)} do not fit {shape[1]} inputs"
        )
    if not (np.isfinite(weight).all() and np.isfinite(reference).all()):
        raise SparsecError("the layer's weight has NaN or infinite values: it cannot be rounded")


def _improved(
    nearest: NDArray[np.float32],
    pruned: NDArray[np.float32],
    mask: NDArray[np.bool_],
    reference: NDArray[np.float32],
    statistics: Statistics,
    grid: Grid,
    limit: float,
) -> NDArray[np.float64]:
    """`nearest` [out, in] or what is better, output by output."""
    dense, rounded = reference.astype(np.float64), nearest.astype(np.float64)
    gradient = np.asarray(statistics.times(rounded - dense), dtype=np.float64)
    # Step 1. Sweep.
    if seconds(mask) <= limit:
        pull, batches = gradient, by_mask(mask, statistics)
    else:
        # A sweep that overlooks which weights are dropped must not see what dropping them lost.
        pull = np.asarray(statistics.times(rounded - pruned.astype(np.float64)), dtype=np.float64)
        batches = at_once(mask, statistics)
    swept = nearest_plane(rounded, pull, mask, grid, statistics, batches)
    loss = _keep_better(rounded, gradient, swept, dense, statistics)
    # Step 2. Descend.
    for _ in range(PASSES):
        before = loss
        loss = _keep_better(rounded, gradient, _descended(rounded, gradient, mask, grid, statistics), dense, statistics)
        if before - loss <= LEAST_GAIN * before:
            break
    return rounded


def _keep_better(
    rounded: NDArray[np.float64],
    gradient: NDArray[np.float64],
    other: NDArray[np.float64],
    dense: NDArray[np.float64],
    statistics: Statistics,
) -> float:
    """Put the outputs of `other` that lose less, and their gradient, in place of the ones there; the loss of all."""
    pull = statistics.times(other - dense)
    losses, others = (np.einsum("oi,oi->o", w - dense, g) for w, g in ((rounded, gradient), (other, pull)))
    better = others < losses
    rounded[better], gradient[better] = other[better], pull[better]
    return float(np.minimum(losses, others).sum())


def _descended(
    rounded: NDArray[np.float64],
    gradient: NDArray[np.float64],
    mask: NDArray[np.bool_],
    grid: Grid,
    statistics: Statistics,
) -> NDArray[np.float64]:
    """One pass of coordinate descent, all outputs at once: each weight to the number nearest to its best value."""
    hessian = statistics.hessian
    result, change = np.zeros_like(rounded), np.zeros_like(rounded)
    outputs = np.arange(len(rounded))
    for a in range(0, rounded.shape[1], PANEL):
        b = a + PANEL
        own = hessian[a:b, a:b]
        pull = np.ascontiguousarray((gradient[:, a:b] + change[:, :a] @ hessian[a:b, :a].T).T)
        now, kept = (np.ascontiguousarray(array[:, a:b].T) for array in (rounded, mask))
        new = np.zeros_like(now)
        for k in range(len(own)):
            best = now[k] - pull[k] / own[k, k]
            new[k] = np.where(kept[k], grid.nearest(best, outputs, np.full(len(best), a + k)), 0.0)
            pull[k + 1 :] += own[k + 1 :, k, None] * (new[k] - now[k])
        result[:, a:b], change[:, a:b] = new.T, (new - now).T
    return result
