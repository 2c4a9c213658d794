"""The 8-bit grids of activations, from what flows into the layers when the model runs on calibration data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ...ir import Grid, SparsecError
from .gather import finite
from .trial import Trial

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ...ir import Layer, Program
    from ..machine import Machine
    from .samples import Samples
    from .trial import Weights

# Bins of the histogram between the least and the largest value.
BINS = 2048
# Of "percentile": the share of values that the range holds.
PERCENTILE = 0.9999
# Ranges that "mse" and "entropy" compare: from the whole down to this share of it.
_STEPS, _NARROWEST = 48, 0.2


def find_grids(
    program: Program,
    layers: Sequence[Layer],
    weights: Mapping[str, Weights],
    samples: Samples,
    machine: Machine,
    folder: Path,
    method: str,
) -> dict[str, Grid]:
    """A grid for the input X of each layer, in two passes through the model: extremes, then a histogram between them.

    Args:
        program: the dense model.
        layers: whose inputs are meant.
        weights: the model runs with these.
        samples: calibration data.
        machine: where the model runs.
        folder: scratch space.
        method: one of `METHODS`.

    Raises:
        SparsecError: an activation is NaN or infinite, or a layer never ran.
    """
    trial = Trial(program, layers, machine, folder, watched=True)
    fed, names = trial.feeds(weights), [layer.name for layer in layers]
    extremes: dict[str, tuple[float, float]] = {}
    for feeds in samples.runs:
        watched = trial.watch(feeds, fed, names)
        for layer in layers:
            x = finite(watched[layer.name], layer, samples.name)
            if x.size:
                low, high = extremes.get(layer.name, (0.0, 0.0))
                extremes[layer.name] = min(low, float(x.min())), max(high, float(x.max()))
    for layer in layers:
        if layer.name not in extremes:
            raise SparsecError(
                f"calibration data '{samples.name}': nothing ever flowed into layer '{layer.name}', so no range of its "
                "input is known; add samples that reach it, or compile with --activations dynamic"
            )
    counts: dict[str, NDArray[np.int64]] = {name: np.zeros(BINS, dtype=np.int64) for name in names}
    for feeds in samples.runs if method != "minmax" else ():
        watched = trial.watch(feeds, fed, names)
        for name in names:
            counts[name] += np.histogram(watched[name], BINS, extremes[name])[0]
    return {name: METHODS[method](counts[name], *extremes[name]) for name in names}


def _minmax(counts: NDArray[np.int64], low: float, high: float) -> Grid:
    """Everything that was seen."""
    return Grid.spanning(low, high)


def _percentile(counts: NDArray[np.int64], low: float, high: float) -> Grid:
    """All but the rarest: the same share is left out on either side."""
    share = np.cumsum(counts) / max(int(counts.sum()), 1)
    left, right = np.searchsorted(share, ((1 - PERCENTILE) / 2, (1 + PERCENTILE) / 2))
    edges = np.linspace(low, high, BINS + 1)
    return Grid.spanning(float(edges[min(left, BINS)]), float(edges[min(right + 1, BINS)]))


def _mse(counts: NDArray[np.int64], low: float, high: float) -> Grid:
    """The range of least squared error."""
    centres = _centres(low, high)

    def error(grid: Grid) -> float:
        return float((counts * np.square(grid.round(centres) - centres)).sum())

    return min(_narrower(low, high), key=error)


def _entropy(counts: NDArray[np.int64], low: float, high: float) -> Grid:
    """The range whose codes tell most (Migacz 2017, "8-bit Inference with TensorRT").

    The least Kullback-Leibler divergence between the histogram, its tails moved to the edges, and what the codes leave
    of it.
    """
    centres = _centres(low, high)

    def divergence(grid: Grid) -> float:
        rounded = grid.round(centres)
        kept = np.abs(rounded - centres) <= grid.scale * 0.5001
        inside = np.where(kept, counts, 0).astype(np.float64)
        clipped = inside.copy()
        ends = np.flatnonzero(kept)
        clipped[ends[0]] += counts[: ends[0]].sum()
        clipped[ends[-1]] += counts[ends[-1] + 1 :].sum()
        codes = np.unique(rounded, return_inverse=True)[1].ravel()
        filled = inside > 0
        mass = np.bincount(codes, inside) / np.maximum(np.bincount(codes, filled), 1)
        left = np.where(filled, mass[codes], 0.0)
        p, q = clipped / max(clipped.sum(), 1), left / max(left.sum(), 1e-300)
        both = (p > 0) & (q > 0)
        missing = float(p[(p > 0) & (q <= 0)].sum())
        return float((p[both] * np.log(p[both] / q[both])).sum()) + missing

    return min(_narrower(low, high), key=divergence)


def _centres(low: float, high: float) -> NDArray[np.float64]:
    edges = np.linspace(low, high, BINS + 1)
    return np.asarray((edges[1:] + edges[:-1]) / 2)


def _narrower(low: float, high: float) -> list[Grid]:
    """The whole range first, so that it wins where nothing is better."""
    return [Grid.spanning(low * share, high * share) for share in np.linspace(1, _NARROWEST, _STEPS)]


METHODS: dict[str, Callable[[NDArray[np.int64], float, float], Grid]] = {
    "mse": _mse,
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
}
