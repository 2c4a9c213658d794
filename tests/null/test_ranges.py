"""Ranges of activations: from a histogram to a grid."""

from __future__ import annotations

import numpy as np
import pytest

from sparsec.compiler.calibration.ranges import BINS, METHODS, PERCENTILE
from sparsec.ir import Grid

RNG = np.random.default_rng(0)


def grid(method: str, x: np.ndarray) -> Grid:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    return METHODS[method](np.histogram(x, BINS, (low, high))[0], low, high)


def error(grid: Grid, x: np.ndarray) -> float:
    return float(np.square(grid.round(x) - x).mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shift", [0.0, 2.0, -5.0])
def test_what_is_common_is_covered(method: str, shift: float) -> None:
    x = RNG.standard_normal(100_000) + shift
    found = grid(method, x)
    # Within the range an error is at most half a step.
    common = np.quantile(x, [0.02, 0.98])
    assert np.abs(found.round(common) - common).max() <= found.scale / 2 * 1.001


@pytest.mark.parametrize("method", METHODS)
def test_zero_is_a_code(method: str) -> None:
    for x in (RNG.random(1000) + 3, -RNG.random(1000) - 3, np.zeros(10), np.full(10, 7.0)):
        assert grid(method, x).round(np.zeros(1)) == 0


def test_outliers_are_clipped_where_that_pays() -> None:
    x = np.concatenate([RNG.standard_normal(100_000), [60.0]])
    everything = grid("minmax", x)
    assert everything.scale == pytest.approx((60 - x.min()) / 255, rel=1e-3)
    assert error(grid("mse", x), x) < error(everything, x)
    assert grid("percentile", x).scale < everything.scale / 5
    assert grid("entropy", x).scale < everything.scale


def test_mse_is_best_among_what_it_compares() -> None:
    x = RNG.laplace(size=50_000)
    best = error(grid("mse", x), x)
    for share in np.linspace(0.2, 1, 20):
        assert best <= error(Grid.spanning(float(x.min() * share), float(x.max() * share)), x) * 1.02


def test_percentile_leaves_out_what_it_says() -> None:
    x = RNG.standard_normal(1_000_000)
    found = grid("percentile", x)
    low, high = -found.zero_point * found.scale, (255 - found.zero_point) * found.scale
    assert ((x < low) | (x > high)).mean() == pytest.approx(1 - PERCENTILE, rel=0.6)
