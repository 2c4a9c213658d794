"""Rounding input by input; each weight's error is made good by the kept weights of its output that follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ...ir.values import Int8, Values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .statistics import Statistics

# Outputs [B, R] by B masks, and the inputs [B, K] in which they are rounded, last to first; -1 pads to equal lengths.
Batch: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.int64]]"

# Inputs between two products.
PANEL = 64
# Bytes of the factors that are there at once; a larger one is alone.
BATCH = 2**28
# Inputs, the first ones, on which the two orders are compared.
SAMPLE = 1024


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that weights may be.

    Attributes:
        values: the kind.
        table: its table.
        least: the least code of integers.
    """

    values: Values
    table: NDArray[np.float32]
    least: int = -127

    def nearest(
        self, weights: NDArray[np.float64], outputs: NDArray[np.int64], inputs: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """`weights` [k] of single outputs and inputs, rounded."""
        values, table, column = self.values, self.table, weights[:, None]
        if isinstance(values, Int8):
            table = table[outputs, inputs // values.group if values.group else 0][:, None]
            values, column = Int8(), np.maximum(column, table * self.least)
        return values.round(column, table)[:, 0]


def by_mask(mask: NDArray[np.bool_], statistics: Statistics) -> Iterator[Batch]:
    """Outputs that share a mask [out, in] together, each with its kept inputs alone: the exact sweep."""
    order = _order(statistics)[::-1]
    distinct, which = np.unique(np.packbits(mask, axis=1), axis=0, return_inverse=True)
    groups = [np.flatnonzero(which.reshape(-1) == group) for group in range(len(distinct))]
    # Alike ones next to each other; those that keep most come first, so that a batch pads little.
    kept = mask.sum(axis=1)
    groups = sorted((g for g in groups if kept[g[0]]), key=lambda g: (len(g), -int(kept[g[0]])))
    while groups:
        size, rows = int(kept[groups[0][0]]), len(groups[0])
        most = max(1, BATCH // (8 * size * (size + rows)))
        count = next((i for i, g in enumerate(groups[:most]) if len(g) != rows), min(most, len(groups)))
        batch, groups = groups[:count], groups[count:]
        inputs = np.full((count, size), -1)
        for own, group in zip(inputs, batch, strict=True):
            own[: kept[group[0]]] = order[mask[group[0], order]]
        yield np.stack(batch), inputs


def at_once(mask: NDArray[np.bool_], statistics: Statistics) -> Iterator[Batch]:
    """All outputs in one sweep over all inputs, as if dropped weights that follow could help too: one factor."""
    yield np.arange(len(mask))[None], _order(statistics)[None, ::-1]


def seconds(mask: NDArray[np.bool_]) -> float:
    """Of one core, for the sweep `by_mask`: the factors, then the steps (measured on a Xeon at 2.5 GHz)."""
    distinct = np.unpackbits(np.unique(np.packbits(mask, axis=1), axis=0), axis=1)
    kept = distinct.sum(axis=1, dtype=np.float64)
    share = np.minimum(8 * kept**2 / BATCH, 1.0)
    return float(np.sum(1.3e-11 * kept**3 + 1.2e-8 * kept**2 + 5e-5 * kept * share))


def nearest_plane(
    rounded: NDArray[np.float64],
    pull: NDArray[np.float64],
    mask: NDArray[np.bool_],
    grid: Grid,
    statistics: Statistics,
    batches: Iterator[Batch],
) -> NDArray[np.float64]:
    """GPTQ's sweep (Frantar et al., ICLR 2023), which is Babai's nearest-plane algorithm (Chen et al. 2025).

    For changes Δ of an output's kept weights S the loss is ||Δ L + c||² and what no change can lower: H_SS = L Lᵀ, L is
    lower triangular, and c = g L⁻ᵀ from the gradient g at S. The k-th term holds changes of inputs from k on only. In a
    sweep from the last to the first, input k therefore has the best value w - (c_k + Σ_{i>k} Δ_i L_ik) / L_kk, given
    those before it: that is rounded.

    Args:
        rounded: [out, in] weights w to begin with; zero outside the mask.
        pull: [out, in] the gradient g, half of the loss's.
        mask: [out, in].
        grid: the numbers that weights may be.
        statistics: H.
        batches: outputs and inputs whose weights are rounded together.

    Returns:
        [out, in] weights on the grid, zero outside the mask.
    """
    result = np.array(rounded)
    for rows, inputs in batches:
        outputs = rows[:, :, None]
        inside = mask[outputs, inputs[:, None]] & (inputs >= 0)[:, None]
        triangle, below = _factor(statistics.hessian, inputs, pull[outputs, inputs[:, None]])
        start = np.where(inside, rounded[outputs, inputs[:, None]], 0.0)
        swept = _swept(start, below, triangle, inside, grid, (rows, inputs))
        for own, used, new in zip(rows, inputs, swept, strict=True):
            result[own[:, None], used[used >= 0]] = new[:, used >= 0]
    return result


def _order(statistics: Statistics) -> NDArray[np.int64]:
    """All inputs, as they come or by falling diagonal (GPTQ's "act-order"): whichever promises less loss.

    Rounding input k costs about step² / 12 · L_kk². Where inputs differ in size falling order is better, by 10 to 25 %
    of the loss from rounding; where neighbours are alike and equally large (signals, images) the order as they come, by
    10 to 20 %. Taking the least L_kk one by one (for all of H) was at most 2 % better than the better of the two.
    """
    natural, falling = np.arange(len(statistics.diagonal)), np.argsort(-statistics.diagonal, kind="stable")
    costs = []
    for order in (natural, falling):
        first = order[order < SAMPLE][::-1]
        triangle = np.linalg.cholesky(statistics.hessian[np.ix_(first, first)])
        costs.append(float(np.sum(np.square(np.diagonal(triangle)))))
    return natural if costs[0] <= costs[1] else falling


def _factor(
    hessian: NDArray[np.float64], inputs: NDArray[np.int64], pull: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """L [B, K, K], lower triangular (what is above is not to be read), L Lᵀ = H at `inputs` [B, K]; and `pull` L⁻ᵀ.

    Rows below a matrix become themselves times L⁻ᵀ while it is factorised panel by panel.
    """
    count, size = inputs.shape
    system = np.empty((count, size + pull.shape[1], size))
    system[:, size:] = np.where((inputs >= 0)[:, None], pull, 0.0)
    for a in range(0, size, PANEL):
        b = min(a + PANEL, size)
        for matrix, used in zip(system, inputs, strict=True):
            matrix[a:size, a:b] = _panel(hessian, used[a:], b - a).T
        system[:, a:, a:b] -= system[:, a:, :a] @ system[:, a:b, :a].swapaxes(1, 2)
        own = np.linalg.cholesky(system[:, a:b, a:b])
        system[:, a:b, a:b] = own
        system[:, b:, a:b] = system[:, b:, a:b] @ np.linalg.inv(own).swapaxes(1, 2)
    return system[:, :size], system[:, size:]


def _panel(hessian: NDArray[np.float64], inputs: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """H between the first `count` of `inputs` [k] and all of them: [count, k]; of padding, the identity."""
    panel = hessian.take(inputs[:count], axis=0).take(inputs, axis=1)
    padding = inputs < 0
    panel[padding[:count]] = panel[:, padding] = 0
    panel[np.arange(count), np.arange(count)] += padding[:count]
    return panel


def _swept(
    start: NDArray[np.float64],
    below: NDArray[np.float64],
    triangle: NDArray[np.float64],
    inside: NDArray[np.bool_],
    grid: Grid,
    batch: Batch,
) -> NDArray[np.float64]:
    """`start` [B, R, K] after the sweep, zero where it is not `inside`; c is `below` [B, R, K], L `triangle`."""
    rows, inputs = batch
    result, change = np.zeros_like(start), np.zeros_like(start)
    outputs = rows.reshape(-1)
    for b in range(inputs.shape[1], 0, -PANEL):
        a = max(b - PANEL, 0)
        # The panel's inputs first: [P, B, R], and of L [P, P, B].
        own = triangle[:, a:b, a:b].transpose(1, 2, 0)
        pushed = below[:, :, a:b] + change[:, :, b:] @ triangle[:, b:, a:b]
        pull, now, kept = (
            np.ascontiguousarray(x.transpose(2, 0, 1)) for x in (pushed, start[..., a:b], inside[..., a:b])
        )
        new = np.zeros_like(now)
        for k in range(b - a - 1, -1, -1):
            best = now[k] - pull[k] / own[k, k, :, None]
            nearest = grid.nearest(best.reshape(-1), outputs, inputs[:, a + k].repeat(rows.shape[1]))
            new[k] = np.where(kept[k], nearest.reshape(best.shape), 0.0)
            pull[:k] += own[k, :k, :, None] * (new[k] - now[k])
        result[..., a:b], change[..., a:b] = new.transpose(1, 2, 0), (new - now).transpose(1, 2, 0)
    return result
