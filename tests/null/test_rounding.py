"""Rounding against calibration data: on the grid, never above nearest rounding, and exact where it says exact."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.ir import SparsecError, parse_pattern
from sparsec.ir.values import Codebook, Floats, Int8, Values, parse_values
from sparsec.passes.solve import Statistics, solve
from sparsec.passes.solve import nearest_plane as nearest_plane_module
from sparsec.passes.solve.nearest_plane import Grid, at_once, by_mask, nearest_plane, seconds
from sparsec.passes.solve.rounding import round_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

KINDS = ("int8", "int8:5", "codebook16", "codebook256", "bf16", "fp16", "fp32")
PATTERNS = ("unstructured", "nm:2:4", "group:4", "block:5x3")
# Of the sweeps.
LIMITS = (np.inf, 0.0)


def make(out: int, inputs: int, seed: int, samples: int = 0) -> tuple[Array, Statistics]:
    """A weight with unequal outputs, and correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((inputs, inputs)))
    x = rng.standard_normal((samples or 4 * inputs, inputs)) / np.arange(1, inputs + 1) @ basis
    x *= np.exp(0.5 * rng.standard_normal(inputs))
    weight = rng.standard_normal((out, inputs)) * np.exp(0.4 * rng.standard_normal((out, 1)))
    return weight.astype(np.float32), Statistics.of(x.T @ x / len(x))


def few_levels(weight: Array, values: Int8) -> Array:
    """Scales that make the largest weight 7: integers of 4 bits."""
    return values.fit(weight) * np.float32(127 / 7)


def losses(weight: Array, reference: Array, statistics: Statistics) -> Array:
    """Of each output."""
    change = weight.astype(np.float64) - reference
    return np.einsum("oi,oi->o", change @ statistics.hessian, change)


def naive_sweep(start: Array, target: Array, mask: Array, statistics: Statistics, grid: Grid) -> Array:
    """Every output by itself, from the last of its kept inputs to the first."""
    result = np.zeros_like(start)
    for o in range(len(start)):
        kept = np.flatnonzero(mask[o])
        triangle = np.linalg.cholesky(statistics.hessian[np.ix_(kept, kept)])
        for k in range(len(kept) - 1, -1, -1):
            behind = kept[k + 1 :]
            error = result[o, behind] - target[o, behind]
            best = target[o, kept[k]] - error @ triangle[k + 1 :, k] / triangle[k, k]
            result[o, kept[k]] = grid.nearest(np.array([best]), np.array([o]), kept[[k]])[0]
    return result


def best_target(reference: Array, mask: Array, statistics: Statistics) -> Array:
    """The least-squares weights inside the mask."""
    hessian = statistics.hessian
    result = np.zeros(reference.shape)
    for o, kept in enumerate(mask):
        if kept.any():
            result[o, kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], (hessian @ reference[o])[kept])
    return result


# ---- What every kind keeps to ----


@settings(max_examples=60, deadline=None)
@given(
    text=st.sampled_from(KINDS),
    pattern=st.sampled_from(PATTERNS),
    density=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    shape=st.tuples(st.integers(1, 14), st.integers(1, 40)),
    samples=st.sampled_from([0, 3]),
    limit=st.sampled_from(LIMITS),
    given_table=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_on_the_grid_inside_the_mask_and_never_above_nearest(
    text: str,
    pattern: str,
    density: float,
    shape: tuple[int, int],
    samples: int,
    limit: float,
    given_table: bool,
    seed: int,
) -> None:
    """Also with fewer samples than inputs, whose second moment is singular."""
    reference, statistics = make(*shape, seed, samples)
    pruned = solve(reference, statistics, parse_pattern(pattern), density)
    values = parse_values(text)
    ready = None
    if given_table:
        ready = few_levels(pruned, values) if isinstance(values, Int8) else values.fit(pruned)
    rounded, table = round_weights(pruned, None, reference, statistics, values, ready, limit)
    assert rounded.dtype == table.dtype == np.float32
    assert rounded.shape == shape
    np.testing.assert_array_equal(values.round(rounded, table), rounded)
    assert not rounded[pruned == 0].any()
    if ready is not None:
        np.testing.assert_array_equal(table, ready)
    nearest = losses(values.round(pruned, table), reference, statistics)
    assert (losses(rounded, reference, statistics) <= nearest * (1 + 1e-6) + 1e-12).all()


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("limit", LIMITS)
def test_same_input_same_bytes(text: str, limit: float) -> None:
    reference, statistics = make(12, 30, seed=1)
    pruned = solve(reference, statistics, parse_pattern("group:4"), 0.5)
    first, second = (
        round_weights(pruned, None, reference, statistics, parse_values(text), limit=limit) for _ in range(2)
    )
    assert [a.tobytes() for a in first] == [b.tobytes() for b in second]


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("limit", LIMITS)
def test_weights_on_the_grid_stay(text: str, limit: float) -> None:
    """With their table; a codebook of their values is found."""
    reference, statistics = make(12, 30, seed=2)
    values = parse_values(text)
    table = values.fit(reference)
    planted = values.round(reference, table)
    rounded, same = round_weights(planted, None, planted, statistics, values, table, limit)
    np.testing.assert_array_equal(rounded, planted)
    np.testing.assert_array_equal(same, table)
    if isinstance(values, Codebook):
        found, _ = round_weights(planted, None, planted, statistics, values, limit=limit)
        np.testing.assert_array_equal(found, planted)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_mask_may_hold_zeros(limit: float) -> None:
    """They may become others; what is outside goes."""
    reference, statistics = make(8, 20, seed=3)
    mask = np.random.default_rng(0).random(reference.shape) < 0.6
    rounded, _ = round_weights(np.zeros_like(reference), mask, reference, statistics, Int8(), limit=limit)
    # The scale of nothing is 1.
    assert rounded.any() and np.array_equal(rounded, np.rint(rounded))
    assert not rounded[~mask].any()
    cut, _ = round_weights(reference, mask, reference, statistics, Int8(), limit=limit)
    assert cut.any() and not cut[~mask].any()


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("limit", LIMITS)
def test_dead_inputs_and_outputs_of_zero(text: str, limit: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 20))
    x[:, [3, 11]] = 0
    statistics = Statistics.of(x.T @ x / len(x))
    reference = rng.standard_normal((6, 20)).astype(np.float32)
    pruned = solve(reference, statistics, parse_pattern("unstructured"), 0.5)
    pruned[2] = 0
    rounded, _ = round_weights(pruned, None, reference, statistics, parse_values(text), limit=limit)
    assert np.isfinite(rounded).all()
    assert not rounded[:, [3, 11]].any() and not rounded[2].any()
    # A weight of a dead input that is there all the same is rounded by itself.
    kept, table = round_weights(reference, None, reference, statistics, Int8(), limit=limit)
    np.testing.assert_array_equal(kept[:, 3], Int8().round(reference, table)[:, 3])


def test_codes_of_minus_128_only_where_the_model_has_them() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 1)) + 0.1 * rng.standard_normal((40, 8))
    statistics, scale = Statistics.of(x.T @ x), np.ones((1, 1), np.float32)
    reference = np.array([[-127.4] * 8], np.float32)
    rounded, _ = round_weights(reference, None, reference, statistics, Int8(), scale)
    assert rounded.min() == -127
    reference[0, 0] = -128
    rounded, _ = round_weights(reference, None, reference, statistics, Int8(), scale)
    assert rounded.min() == -128 and np.count_nonzero(rounded == -128) > 1


# ---- Exact where it says exact ----


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("text", ["int8", "int8:5", "codebook16"])
@pytest.mark.parametrize("batch", [2**28, 20000, 1])
@pytest.mark.parametrize("panel", [4, 64])
def test_sweep_by_mask_is_babais(
    pattern: str, text: str, batch: int, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every output by itself, from wherever it begins."""
    monkeypatch.setattr(nearest_plane_module, "BATCH", batch)
    monkeypatch.setattr(nearest_plane_module, "PANEL", panel)
    monkeypatch.setattr(nearest_plane_module, "_order", lambda statistics: np.arange(len(statistics.dead))[::-1])
    reference, statistics = make(13, 29, seed=5)
    pruned = solve(reference, statistics, parse_pattern(pattern), 0.5)
    mask = pruned != 0
    mask[3] = False
    mask[7] = True
    values = parse_values(text)
    table = few_levels(reference, values) if isinstance(values, Int8) else values.fit(pruned)
    grid = Grid(values, table)
    start = np.where(mask, values.round(pruned, table), 0).astype(np.float64)
    gradient = (start - reference) @ statistics.hessian
    swept = nearest_plane(start, gradient, mask, grid, statistics, by_mask(mask, statistics))
    expected = naive_sweep(start, best_target(reference, mask, statistics), mask, statistics, grid)
    np.testing.assert_array_equal(swept, expected)


def test_one_factor_is_exact_without_a_mask() -> None:
    reference, statistics = make(9, 70, seed=6)
    grid = Grid(Codebook(16), Codebook(16).fit(reference))
    start = grid.values.round(reference, grid.table).astype(np.float64)
    mask = np.ones(reference.shape, np.bool_)
    pull = (start - reference) @ statistics.hessian
    exact, cheap = (
        nearest_plane(start, pull, mask, grid, statistics, batches(mask, statistics)) for batches in (by_mask, at_once)
    )
    np.testing.assert_array_equal(exact, cheap)


@pytest.mark.parametrize("limit", LIMITS)
def test_tiny_layers_against_brute_force(limit: float) -> None:
    """Never below the best, mostly the best, and with much less on top of it than nearest rounding has."""
    excess = []
    for seed in range(10):
        reference, statistics = make(16, 6, seed)
        # Three kept inputs, and zero as an entry too: 16³ weights for each output.
        mask = np.zeros(reference.shape, np.bool_)
        mask[:8, :3] = mask[8:, 2:5] = True
        pruned = best_target(reference, mask, statistics).astype(np.float32)
        rounded, table = round_weights(pruned, None, reference, statistics, Codebook(16), limit=limit)
        best = np.full(16, np.inf)
        for entries in product(table, repeat=3):
            tried = np.zeros(reference.shape)
            tried[:8, :3] = tried[8:, 2:5] = entries
            best = np.minimum(best, losses(tried, reference, statistics))
        nearest = Codebook(16).round(pruned, table)
        excess.append([losses(w, reference, statistics) - best for w in (rounded, nearest)])
    found, plain = np.swapaxes(excess, 0, 1)
    assert found.min() > -1e-9
    assert (found < 1e-9).mean() > 0.6
    assert found.sum() < 0.4 * plain.sum()


@pytest.mark.parametrize(
    ("pattern", "exact"), [("group:16", True), ("block:16x4", True), ("unstructured", False), ("nm:2:4", False)]
)
def test_shared_masks_are_cheap(pattern: str, exact: bool) -> None:
    scores = np.random.default_rng(0).random((256, 1024))
    assert (seconds(parse_pattern(pattern).project(scores, 0.5)) < 1) == exact


# ---- What it buys ----


def neighbours(out: int, inputs: int) -> tuple[Array, Statistics]:
    """Inputs each of which is much like the one before, as in signals and images."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4 * inputs, inputs))
    for k in range(1, inputs):
        x[:, k] = 0.9 * x[:, k - 1] + np.sqrt(1 - 0.9**2) * x[:, k]
    return rng.standard_normal((out, inputs)).astype(np.float32), Statistics.of(x.T @ x / len(x))


@pytest.mark.parametrize("problem", ["unequal", "neighbours"])
@pytest.mark.parametrize("text", ["codebook16", "int8"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:8x4"])
def test_loss_from_rounding_halves(problem: str, text: str, pattern: str) -> None:
    """Against rounding to the nearest, at 4 bits: the loss beyond that of the best weights with these zeros."""
    reference, statistics = make(32, 128, seed=7) if problem == "unequal" else neighbours(32, 128)
    mask = solve(reference, statistics, parse_pattern(pattern), 0.5) != 0
    pruned = best_target(reference, mask, statistics).astype(np.float32)
    values: Values = parse_values(text)
    table = few_levels(pruned, values) if isinstance(values, Int8) else None
    floor = losses(pruned, reference, statistics).sum()
    shares = []
    for limit in LIMITS:
        rounded, fitted = round_weights(pruned, None, reference, statistics, values, table, limit)
        nearest = losses(values.round(pruned, fitted), reference, statistics).sum() - floor
        shares.append((losses(rounded, reference, statistics).sum() - floor) / nearest)
    assert shares[0] < 0.5
    assert shares[0] < shares[1] * 1.02
    assert shares[1] < 0.6


def test_rounding_repairs_pruning_too() -> None:
    """At 8 bits even below the loss that the weights had before."""
    reference, statistics = make(32, 128, seed=8)
    mask = parse_pattern("block:8x4").project(np.square(reference, dtype=np.float64), 0.5)
    cut = np.where(mask, reference, np.float32(0))
    rounded, _ = round_weights(cut, None, reference, statistics, Int8())
    assert losses(rounded, reference, statistics).sum() < 0.8 * losses(cut, reference, statistics).sum()


# ---- Errors ----


def test_inputs_that_cannot_be() -> None:
    reference, statistics = make(8, 12, seed=0)
    with pytest.raises(SparsecError, match="do not fit 12 inputs"):
        round_weights(reference[:, :5], None, reference, statistics, Int8())
    with pytest.raises(SparsecError, match="do not fit 12 inputs"):
        round_weights(reference, np.ones((8, 1), np.bool_), reference, statistics, Int8())
    with pytest.raises(SparsecError, match="NaN or infinite"):
        round_weights(np.full_like(reference, np.nan), None, reference, statistics, Int8())
    with pytest.raises(SparsecError, match="too large for fp16"):
        round_weights(reference * np.float32(1e6), None, reference, statistics, Floats("float16"))
