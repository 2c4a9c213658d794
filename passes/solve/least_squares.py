"""The best values for weights whose places are decided."""

from __future__ import annotations

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
    distinct, groups = np.unique(np.packbits(mask, axis=1), axis=0, return_inverse=True)
    groups = groups.reshape(-1)
    # A system costs up to in³ / 12, a step of conjugate gradients out · in², of which some 30 are needed: in larger
    # products, so faster ones.
    if len(distinct) * mask.shape[1] > SYSTEMS * mask.shape[0]:
        return _conjugate_gradients(best, mask, statistics, best if start is None else start)
    weight = np.zeros_like(best)
    for group in range(len(distinct)):
        rows = np.flatnonzero(groups == group)
        kept = np.flatnonzero(mask[rows[0]])
        weight[np.ix_(rows, kept)] = _exact(best[rows], kept, statistics)
    return weight


def _exact(best: NDArray[np.float64], kept: NDArray[np.int64], statistics: Statistics) -> NDArray[np.float64]:
    """Of some outputs, the values [outputs, kept] for `kept` inputs, from whichever system is the smaller."""
    dropped = np.setdiff1d(np.arange(best.shape[1]), kept, assume_unique=True)
    lost = best[:, dropped]
    if len(kept) <= len(dropped):
        # The kept inputs' share in predicting the dropped ones: H_SS⁻¹ H_SP.
        moments = statistics.hessian[kept]
        change = np.linalg.solve(moments[:, kept], moments[:, dropped] @ lost.T).T
    else:
        # The same from the inverse (OBS): -[(H⁻¹)_PP]⁻¹ (H⁻¹)_PS.
        moments = statistics.inverse[dropped]
        change = -np.linalg.solve(moments[:, dropped], lost.T).T @ moments[:, kept]
    return np.asarray(best[:, kept] + change)


def _conjugate_gradients(
    best: NDArray[np.float64],
    mask: NDArray[np.bool_],
    statistics: Statistics,
    start: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Each output by itself, all at once, preconditioned by the diagonal (Hestenes and Stiefel 1952)."""
    large = mask.shape[0] * mask.shape[1] ** 2 > LARGE
    dtype = np.dtype(np.float32 if large else np.float64)
    least = LEAST_GAIN_LARGE if large else LEAST_GAIN
    hessian = statistics.hessian.astype(dtype, copy=False)
    inside = mask.astype(dtype)
    inverse = inside / statistics.diagonal.astype(dtype)
    weight = np.where(mask, start, 0.0)
    change = (best - weight).astype(dtype)
    residual = np.asarray(change @ hessian, dtype=dtype)
    loss = float(np.vdot(change, residual))
    residual *= inside
    step = residual * inverse
    slope = np.einsum("oi,oi->o", residual, step)
    for _ in range(MOST_STEPS):
        product = np.asarray(step @ hessian, dtype=dtype)
        curve = np.einsum("oi,oi->o", step, product)
        length = np.divide(slope, curve, out=np.zeros_like(slope), where=curve > 0)
        # A step along the conjugate direction lowers the loss by length · slope.
        gain = float(length @ slope)
        loss -= gain
        weight += length[:, None] * step
        if gain <= least * loss or loss <= 0:
            break
        product *= inside
        product *= length[:, None]
        residual -= product
        towards = residual * inverse
        before, slope = slope, np.einsum("oi,oi->o", residual, towards)
        step *= np.divide(slope, before, out=np.zeros_like(slope), where=before > 0)[:, None]
        step += towards
    return weight


def refit(
    weight0: NDArray[np.float32],
    mask: NDArray[np.bool_],
    hessian_pruned: NDArray[np.float64] | Statistics,
    cross: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Weights inside `mask` that make the dense layer's outputs from the *pruned* model's inputs.

    Minimises ||Xp Wᵀ - X0 W0ᵀ||² / n + damping · ||W - W0||², so that a layer also makes good what the layers before it
    got wrong.

    Args:
        weight0: [out, in] the dense weight.
        mask: [out, in] where weights may be other than zero.
        hessian_pruned: [in, in] Xpᵀ Xp / n, of the inputs that the pruned model gives the layer.
        cross: [in, in] Xpᵀ X0 / n, of those against the dense model's.

    Raises:
        SparsecError: shapes do not match, or a value is not finite.
    """
    statistics = hessian_pruned if isinstance(hessian_pruned, Statistics) else Statistics.of(hessian_pruned)
    inputs = len(statistics.dead)
    if weight0.shape != mask.shape or weight0.shape[1:] != (inputs,) or cross.shape != (inputs, inputs):
        raise SparsecError(
            f"weight {list(weight0.shape)}, mask {list(mask.shape)} and cross moment {list(cross.shape)} do not fit "
            f"a second moment of {inputs} inputs"
        )
    if not (np.isfinite(weight0).all() and np.isfinite(cross).all()):
        raise SparsecError("the weight or the cross moment has NaN or infinite values: nothing can be fitted to it")
    dense = weight0.astype(np.float64)
    best = (dense @ cross.T + statistics.damping * dense) @ statistics.inverse
    best[:, statistics.dead] = 0
    return least_squares(best, mask, statistics).astype(np.float32)


def correct_bias(
    bias: NDArray[np.float32] | None,
    weight0: NDArray[np.float32],
    weight: NDArray[np.float32],
    mean0: NDArray[np.float64],
    mean: NDArray[np.float64],
) -> NDArray[np.float32]:
    """The bias [out] with which the pruned layer's outputs have the dense layer's mean: b + W0 E[x0] - W E[x].

    Args:
        bias: [out], None for zeros.
        weight0: [out, in] the dense weight.
        weight: [out, in] the pruned one.
        mean0: [in] of the dense model's inputs to the layer.
        mean: [in] of the pruned model's.
    """
    shift = weight0.astype(np.float64) @ mean0 - weight.astype(np.float64) @ mean
    return np.asarray(shift if bias is None else bias + shift, dtype=np.float32)
