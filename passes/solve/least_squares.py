"""The best values for weights whose places are decided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...ir import SparsecError
from .statistics import Statistics

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Conjugate gradients end when a step lowers the loss by less than this share, or after as many steps.
LEAST_GAIN = 1e-3
MOST_STEPS = 100
# The share for large products, where a step costs up to a second.
LEAST_GAIN_LARGE = 1e-2
# Systems times inputs for every output above which conjugate gradients are faster (measured; 12 · 30 by their sums).
SYSTEMS = 256
# Multiplications of one product above which conjugate gradients run in float32, at twice the speed, and end earlier.
LARGE = 2e9
# Damping of a refit for inputs / rows, and its bounds. Networks of three pruned layers with ReLU and a dense one, 256
# wide, pruned to 50, 30 and 20 % of single weights or groups of 16, refitted with biases; squared error of the output
# on held-out data against the same without a refit, geometric mean by damping:
#     rows an input   0.01   0.03   0.1    0.3
#                 1   1.06   0.98   0.89   0.86
#                 2   1.01   0.98   0.94   0.94   (single weights)
#                 4   0.97   0.96   0.95   0.97   (two pruned layers, 160 wide)
#                16   0.94   0.94   0.95   1.00   (two pruned layers, 160 wide)
# Pulling towards the pruned weights instead of the dense ones gave 0.94 to 1.24, nowhere better.
DAMPING_FOR_INPUT = 0.3
REFIT_DAMPING = (0.01, 0.3)
# Where nobody knows the rows.
REFIT_DAMPING_UNKNOWN = 0.1


def least_squares(
    best: NDArray[np.float64],
    mask: NDArray[np.bool_],
    statistics: Statistics,
    start: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Weights W inside `mask` that minimise tr((W - `best`) H (W - `best`)ᵀ).

    Exact where many outputs share a mask: one system for them all. Where each output has its own, conjugate gradients,
    as exact as `LEAST_GAIN` says.

    Args:
        best: [out, in] the weights without a mask.
        mask: [out, in].
        statistics: H.
        start: [out, in] where conjugate gradients begin, `best` if None; the closer the fewer steps.

    Returns:
        [out, in], exact zeros outside the mask.
    """
    groups = _groups(mask)
    if groups is None:
        return _conjugate_gradients(best, mask, statistics, best if start is None else start)
    # Of an output, the values of the kept inputs S from whichever system is the smaller: that of S itself,
    # w_S H_SS = (w H)_S, or that of the dropped inputs P in the inverse (OBS), w_S - w_P [(H⁻¹)_PP]⁻¹ (H⁻¹)_PS.
    weight, pushed = np.zeros_like(best), np.zeros_like(best)
    target = np.asarray(statistics.times(best), dtype=np.float64)
    for rows, kept, dropped in groups:
        if len(kept) <= len(dropped):
            weight[np.ix_(rows, kept)] = _solved(statistics.hessian, kept, target[rows[:, None], kept])
        else:
            pushed[np.ix_(rows, dropped)] = _solved(statistics.inverse, dropped, best[rows[:, None], dropped])
    if (inverted := np.flatnonzero(pushed.any(axis=1) | mask.all(axis=1))).size:
        change = pushed[inverted] @ statistics.inverse
        weight[inverted] = np.where(mask[inverted], best[inverted] - change, 0.0)
    return weight


def _groups(mask: NDArray[np.bool_]) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] | None:
    """Outputs that share a mask, its inputs and those outside; None where so few share one that systems are slow."""
    distinct, groups = np.unique(np.packbits(mask, axis=1), axis=0, return_inverse=True)
    # A system costs up to in³ / 12, a step of conjugate gradients out · in², of which some 30 are needed: in larger
    # products, so faster ones.
    if len(distinct) * mask.shape[1] > SYSTEMS * mask.shape[0]:
        return None
    members = (np.flatnonzero(groups.reshape(-1) == group) for group in range(len(distinct)))
    return [(rows, np.flatnonzero(mask[rows[0]]), np.flatnonzero(~mask[rows[0]])) for rows in members]


def _solved(matrix: NDArray[np.float64], places: NDArray[np.int64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows [k, places] that times `matrix` at `places` make `target`."""
    return np.asarray(np.linalg.solve(matrix.take(places, axis=0).take(places, axis=1), target.T).T)


def _conjugate_gradients(
    best: NDArray[np.float64],
    mask: NDArray[np.bool_],
    statistics: Statistics,
    start: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Each output by itself, all at once, until a step gains next to nothing of the loss."""
    large = _large(mask)
    weight = np.where(mask, start, 0.0)
    change = (best - weight).astype(_dtype(mask), copy=False)
    residual = statistics.times(change)
    loss = float(np.vdot(change, residual))
    for gain in _steps(weight, residual, mask, statistics):
        loss -= gain
        if gain <= (LEAST_GAIN_LARGE if large else LEAST_GAIN) * loss or loss <= 0:
            break
    return weight


def _steps(
    weight: NDArray[np.float64], residual: NDArray[np.floating], mask: NDArray[np.bool_], statistics: Statistics
) -> Iterator[float]:
    """Improve `weight` in place, inside `mask`, step by step; each step's gain of the loss.

    Conjugate gradients for each output, preconditioned by the diagonal (Hestenes and Stiefel 1952). `residual`, (the
    target) - (the weight) H, is used up.
    """
    dtype = residual.dtype
    inside = mask.astype(dtype)
    inverse = inside / statistics.diagonal.astype(dtype)
    residual *= inside
    step = residual * inverse
    slope = np.einsum("oi,oi->o", residual, step)
    for _ in range(MOST_STEPS):
        product = statistics.times(step)
        curve = np.einsum("oi,oi->o", step, product)
        length = np.divide(slope, curve, out=np.zeros_like(slope), where=curve > 0)
        weight += length[:, None] * step
        # A step along the conjugate direction lowers the loss by length · slope.
        yield float(length @ slope)
        product *= inside
        product *= length[:, None]
        residual -= product
        towards = residual * inverse
        before, slope = slope, np.einsum("oi,oi->o", residual, towards)
        step *= np.divide(slope, before, out=np.zeros_like(slope), where=before > 0)[:, None]
        step += towards


def _large(mask: NDArray[np.bool_]) -> bool:
    return bool(mask.shape[0] * mask.shape[1] ** 2 > LARGE)


def _dtype(mask: NDArray[np.bool_]) -> np.dtype[np.floating]:
    return np.dtype(np.float32 if _large(mask) else np.float64)


@dataclass(frozen=True)
class Moments:
    """What the pruned model's inputs Xp [n, in] of a layer say about the dense model's, X0.

    Attributes:
        hessian: [in, in] float64, Xpᵀ Xp / n.
        cross: [in, in] float64, Xpᵀ X0 / n.
        mean: [in] of Xp.
        mean0: [in] of X0.
        rows: n, 0 where it is not known.
    """

    hessian: NDArray[np.float64]
    cross: NDArray[np.float64]
    mean: NDArray[np.float64]
    mean0: NDArray[np.float64]
    rows: int = 0

    @property
    def centred(self) -> Moments:
        """The moments about the means; an input that never changes has exact zeros."""
        hessian = self.hessian - np.outer(self.mean, self.mean)
        cross = self.cross - np.outer(self.mean, self.mean0)
        fixed = np.diagonal(hessian) <= 1e-12 * np.diagonal(self.hessian)
        hessian[fixed] = hessian[:, fixed] = cross[fixed] = 0
        zeros = np.zeros_like(self.mean)
        return Moments(hessian, cross, zeros, zeros, self.rows)

    @property
    def damping(self) -> float:
        """What generalises: the more, the fewer rows there are for every input."""
        if not self.rows:
            return REFIT_DAMPING_UNKNOWN
        least, most = REFIT_DAMPING
        return min(max(DAMPING_FOR_INPUT * len(self.mean) / self.rows, least), most)


def refit(
    weight0: NDArray[np.float32],
    mask: NDArray[np.bool_],
    moments: Moments,
    bias: bool = False,
    start: NDArray[np.float32] | None = None,
    damping: float | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float64] | None]:
    """Weights inside `mask` that make the dense layer's outputs from the *pruned* model's inputs.

    Minimises ||Xp Wᵀ + b - X0 W0ᵀ||² / n + damping · ||W - W0||² over W and, with `bias`, over b, so that a layer also
    makes good what the layers before it got wrong.

    Args:
        weight0: [out, in] the dense weight.
        mask: [out, in] where weights may be other than zero.
        moments: of the pruned and the dense model's inputs.
        bias: whether the layer's bias may follow.
        start: [out, in] where conjugate gradients begin, the pruned weight as it is; `weight0` if None.
        damping: as a share of the mean square (with `bias`, variance) of the inputs; `moments.damping` if None.

    Returns:
        The weight, and what is to be added to the bias, [out]; None without `bias`.

    Raises:
        SparsecError: shapes do not match, or a value is not finite.
    """
    inputs = len(moments.mean)
    square = (inputs, inputs)
    start = weight0 if start is None else start
    if (
        not weight0.shape == mask.shape == start.shape == (len(weight0), inputs)
        or not moments.hessian.shape == moments.cross.shape == square
        or moments.mean0.shape != (inputs,)
    ):
        raise SparsecError(
            f"weight {list(weight0.shape)}, mask {list(mask.shape)}, start {list(start.shape)}, second moment "
            f"{list(moments.hessian.shape)} and cross moment {list(moments.cross.shape)} do not fit {inputs} inputs"
        )
    if not all(np.isfinite(a).all() for a in (weight0, start, moments.cross, moments.mean, moments.mean0)):
        raise SparsecError("the weight, a mean or the cross moment has NaN or infinite values: nothing can be fitted")
    dense = weight0.astype(np.float64)
    # Inputs that were never other than zero get no weight, those that never change keep theirs: the bias makes it good.
    inside = mask & (np.diagonal(moments.hessian) != 0)
    about = moments.centred if bias else moments
    weight = np.where(inside, start.astype(np.float64), 0.0)
    if np.diagonal(about.hessian).any():
        _refit(weight, dense, inside, about, moments.damping if damping is None else damping)
    shift = dense @ moments.mean0 - weight @ moments.mean if bias else None
    return weight.astype(np.float32), shift


def _refit(
    weight: NDArray[np.float64],
    weight0: NDArray[np.float64],
    mask: NDArray[np.bool_],
    moments: Moments,
    damping: float,
) -> None:
    """Improve `weight` in place, by systems where outputs share masks, else by conjugate gradients."""
    statistics = Statistics.of(moments.hessian, damping)
    # What W H has to be at the inputs that W may use.
    target = weight0 @ moments.cross.T + weight0 * statistics.ridge
    groups = _groups(mask)
    if groups is not None:
        for rows, kept, _ in groups:
            weight[np.ix_(rows, kept)] = _solved(statistics.hessian, kept, target[rows[:, None], kept])
        return
    residual = (target - statistics.times(weight)).astype(_dtype(mask), copy=False)
    total = 0.0
    for gain in _steps(weight, residual, mask, statistics):
        total += gain
        if gain <= LEAST_GAIN * total:
            break
