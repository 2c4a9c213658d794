"""Pruning against calibration data: legal masks, exact where it says exact, and better than what is simpler."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sparsec.ir import BlockPattern, SparsecError, UsageError, parse_pattern
from sparsec.ir.patterns import NMPattern, UnstructuredPattern
from sparsec.passes.solve import METHODS, Moments, Statistics, error, refit, solve, solve_all
from sparsec.passes.solve import least_squares as least_squares_module
from sparsec.passes.solve import obs as obs_module
from sparsec.passes.solve import statistics as statistics_module
from sparsec.passes.solve.least_squares import _conjugate_gradients, least_squares
from sparsec.passes.solve.methods import choose
from sparsec.passes.solve.obs import removal_order
from sparsec.passes.solve.problem import Problem
from sparsec.passes.solve.statistics import DAMPING

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

PATTERNS = ("unstructured", "nm:2:4", "nm:3:5", "group:4", "block:4x4", "block:5x3")
DENSITIES = (0.9, 0.5, 0.3, 0.1)


def make(out: int, inputs: int, seed: int, samples: int = 0, decay: float = 1.0) -> tuple[Array, Array]:
    """A weight with unequal outputs, and the second moment of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((inputs, inputs)))
    x = rng.standard_normal((samples or 4 * inputs, inputs)) * np.arange(1, inputs + 1) ** -decay @ basis
    x *= np.exp(0.5 * rng.standard_normal(inputs))
    weight = rng.standard_normal((out, inputs)) * np.exp(0.4 * rng.standard_normal((out, 1)))
    return weight.astype(np.float32), x.T @ x / len(x)


def exact_least_squares(weight: Array, mask: Array, hessian: Array) -> Array:
    """One system an output."""
    result = np.zeros(weight.shape)
    target = weight.astype(np.float64) @ hessian
    for o, kept in enumerate(mask):
        if kept.any():
            result[o, kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], target[o, kept])
    return result


def legal(mask: Array, pattern: BlockPattern) -> bool:
    if isinstance(pattern, NMPattern):
        padded = np.pad(mask, ((0, 0), (0, -mask.shape[1] % pattern.m)))
        return bool((padded.reshape(len(mask), -1, pattern.m).sum(axis=2) <= pattern.n).all())
    # A weight may come out as zero by chance, but here none does.
    kept = pattern.reduce(mask.astype(np.float64))
    return bool(((kept == 0) | (kept == pattern.reduce(np.ones(mask.shape)))).all())


# ---- Patterns ----


def test_unstructured_is_blocks_of_one() -> None:
    scores = np.round(np.random.default_rng(0).random((7, 9)), 1)
    for density in np.linspace(0, 1, 41):
        expected = BlockPattern(1, 1).project(scores, density)
        assert np.array_equal(UnstructuredPattern().project(scores, density), expected), density


def test_nm_keeps_the_best_of_each_group() -> None:
    scores = np.array([[3.0, 1, 2, 2, 5, 5, 5, 5, 1, 0]])
    mask = NMPattern(2, 4).project(scores, 0.5)
    assert mask[0].astype(int).tolist() == [1, 0, 1, 0, 1, 1, 0, 0, 1, 1]
    assert not NMPattern(2, 4).project(scores, 0.0).any()


@pytest.mark.parametrize("text", ["unstructured", "nm:2:4"])
def test_patterns_of_single_weights_parse_and_pack(text: str) -> None:
    pattern = parse_pattern(text)
    assert str(pattern) == text
    weight = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    weight *= pattern.project(weight.astype(np.float64) ** 2, 0.5)
    matrix = pattern.pack(weight)
    assert np.array_equal(matrix.to_dense(), weight)
    assert matrix.density == 0.5


def test_impossible_nm() -> None:
    for text in ("nm:4:4", "nm:0:4"):
        with pytest.raises(UsageError, match=text):
            parse_pattern(text)


# ---- What every method keeps to ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("repair", [False, True])
def test_masks_are_legal_and_densities_reached(method: str, text: str, repair: bool) -> None:
    """Also where the blocks do not divide the matrix, and are larger than a panel of the sweep leaves over."""
    pattern = parse_pattern(text)
    weight, hessian = make(19, 34, seed=3)
    for density, result in zip(DENSITIES, solve_all(weight, hessian, pattern, DENSITIES, method, repair), strict=True):
        assert result.dtype == np.float32
        assert result.shape == weight.shape
        mask = result != 0
        assert legal(mask, pattern)
        if isinstance(pattern, NMPattern):
            assert abs(mask.mean() - pattern.n / pattern.m) < 0.03
        else:
            assert abs(mask.sum() - density * mask.size) <= pattern.rows * pattern.cols


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "obs", "auto"])
def test_same_input_same_bytes(method: str) -> None:
    weight, hessian = make(16, 40, seed=1)
    pattern = parse_pattern("group:4")
    first, second = (solve_all(weight, hessian, pattern, DENSITIES, method) for _ in range(2))
    assert [a.tobytes() for a in first] == [b.tobytes() for b in second]


@pytest.mark.parametrize("method", METHODS)
def test_densities_in_any_order(method: str) -> None:
    """Each density gets its own result, though they are found together."""
    weight, hessian = make(16, 24, seed=5)
    mixed = solve_all(weight, hessian, BlockPattern(4, 1), (0.3, 0.75, 0.3), method)
    assert [float((w != 0).mean()) for w in mixed] == pytest.approx([0.3, 0.75, 0.3], abs=0.02)
    assert np.array_equal(mixed[0], mixed[2])


@pytest.mark.parametrize("method", METHODS)
def test_nothing_and_all(method: str) -> None:
    weight, hessian = make(8, 12, seed=2)
    nothing, all_kept = solve_all(weight, hessian, BlockPattern(4, 2), (0.0, 1.0), method)
    assert not nothing.any()
    np.testing.assert_allclose(all_kept, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_few_samples_and_dead_inputs(method: str) -> None:
    """A singular second moment: finite weights, and none for inputs that were never seen."""
    weight, hessian = make(12, 30, seed=4, samples=7)
    hessian[[3, 20]] = 0
    hessian[:, [3, 20]] = 0
    for result in solve_all(weight, hessian, BlockPattern(4, 1), DENSITIES, method):
        assert np.isfinite(result).all()
        assert not result[:, [3, 20]].any()
        assert error(weight, result, hessian) < 1


# ---- Exact where it says exact ----


def brute_force_order(weight: Array, hessian: Array, pattern: BlockPattern) -> Array:
    """The greedy order with every loss from a least-squares fit of its own: [block rows, block columns]."""
    block_rows, block_cols = pattern.grid(weight.shape)
    inputs = weight.shape[1]

    def loss(rows: Array, blocks: list[int]) -> float:
        mask = np.zeros(rows.shape, dtype=np.bool_)
        for b in blocks:
            mask[:, b * pattern.cols : (b + 1) * pattern.cols] = True
        change = exact_least_squares(rows, mask, hessian) - rows
        return float(np.vdot(change @ hessian, change))

    runs = []
    for i in range(block_rows):
        rows = weight[i * pattern.rows : (i + 1) * pattern.rows].astype(np.float64)
        left, run, so_far = list(range(block_cols)), [], 0.0
        while left:
            after = [loss(rows, [b for b in left if b != gone]) for gone in left]
            sizes = [len(rows) * (min(b * pattern.cols + pattern.cols, inputs) - b * pattern.cols) for b in left]
            costs = (np.array(after) - so_far) / sizes
            at = int(np.argmin(costs))
            so_far = after[at]
            run.append((left.pop(at), costs[at]))
        runs.append(run)
    order = np.empty((block_rows, block_cols))
    for turn in range(order.size):
        i = min((i for i in range(block_rows) if runs[i]), key=lambda i: runs[i][0][1])
        order[i, runs[i].pop(0)[0]] = turn
    return order


@pytest.mark.parametrize("text", ["group:4", "block:3x4", "block:1x1", "block:8x5"])
@pytest.mark.parametrize("panel", [4, 48])
def test_obs_is_the_greedy_order(text: str, panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks are candidates here."""
    monkeypatch.setattr(obs_module, "PANEL", panel)
    for seed in range(3):
        weight, hessian = make(11, 22, seed, samples=200)
        problem = Problem.of(weight, Statistics.of(hessian), BlockPattern.parse(text) or BlockPattern(1, 1))
        expected = brute_force_order(weight, problem.statistics.hessian, problem.pattern)
        assert np.array_equal(removal_order(problem), expected)


@pytest.mark.parametrize("text", ["group:4", "block:3x4"])
@pytest.mark.parametrize("memory", [2**28, 1])
@pytest.mark.parametrize("density", [0.8, 0.5, 0.1])
def test_obs_ends_early(text: str, memory: int, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gone at the density is the same, in the same order, as if all had gone; also in batches."""
    monkeypatch.setattr(obs_module, "PANEL", 4)
    pattern = parse_pattern(text)
    weight, hessian = make(27, 46, seed=3)
    problem = Problem.of(weight, Statistics.of(hessian), pattern)
    whole = removal_order(problem)
    monkeypatch.setattr(obs_module, "BATCH", memory)
    ended = removal_order(problem, density)
    gone = int((1 - density) * whole.size)
    assert np.array_equal(ended < gone, whole < gone)
    assert np.array_equal(ended[ended < gone], whole[whole < gone])


@pytest.mark.parametrize("precise", [True, False])
def test_obs_among_candidates_is_as_good(precise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = make(32, 128, seed=4)
    problem = Problem.of(weight, Statistics.of(hessian), BlockPattern(4, 1))
    exact = [problem.loss(s.weight) for s in METHODS["obs"](problem, (0.7, 0.5, 0.3))]
    monkeypatch.setattr(obs_module, "PANEL", 8)
    monkeypatch.setattr(obs_module, "CANDIDATES", 32)
    monkeypatch.setattr(obs_module, "FLOAT32_FROM", 1024 if precise else 0)
    found = [problem.loss(s.weight) for s in METHODS["obs"](problem, (0.7, 0.5, 0.3))]
    np.testing.assert_allclose(found, exact, rtol=5e-3)


@pytest.mark.parametrize("density", DENSITIES)
def test_obs_ends_at_the_least_squares_weights(density: float) -> None:
    weight, hessian = make(12, 40, seed=6)
    problem = Problem.of(weight, Statistics.of(hessian), BlockPattern(4, 2))
    (solution,) = METHODS["obs"](problem, [density])
    expected = exact_least_squares(weight, solution.mask, problem.statistics.hessian)
    np.testing.assert_allclose(solution.weight, expected, atol=1e-8)


@pytest.mark.parametrize("density", DENSITIES)
def test_conjugate_gradients_reach_the_least_squares_loss(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = make(12, 40, seed=7)
    statistics = Statistics.of(hessian)
    dense = weight.astype(np.float64)
    mask = UnstructuredPattern().project(dense**2, density)
    best = statistics.loss(exact_least_squares(weight, mask, statistics.hessian) - dense)
    found = _conjugate_gradients(dense, mask, statistics, dense)
    assert best * (1 - 1e-9) <= statistics.loss(found - dense) <= best * 1.02
    np.testing.assert_allclose(
        least_squares(dense, mask, statistics), exact_least_squares(weight, mask, statistics.hessian), atol=1e-8
    )


def test_low_rank_is_found_and_exact() -> None:
    weight, hessian = make(12, 160, seed=7, samples=20)
    hessian[[3, 20]] = hessian[:, [3, 20]] = 0
    statistics = Statistics.of(hessian)
    factor = statistics.factor
    assert factor is not None and factor.shape[1] <= 22
    built = factor @ factor.T + np.diag(statistics.ridge)
    np.testing.assert_allclose(built, statistics.hessian, atol=1e-4 * statistics.damping)
    np.testing.assert_allclose(statistics.times(weight), weight @ statistics.hessian, rtol=1e-4, atol=1e-3)
    assert Statistics.of(make(12, 160, seed=7, samples=60)[1]).factor is None


def test_admm_is_the_same_with_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = make(16, 160, seed=7, samples=20)
    (quick,) = METHODS["admm"](Problem.of(weight, Statistics.of(hessian), UnstructuredPattern()), [0.3])
    monkeypatch.setattr(statistics_module, "LOW_RANK", 0.0)
    statistics = Statistics.of(hessian)
    assert statistics.factor is None
    (plain,) = METHODS["admm"](Problem.of(weight, statistics, UnstructuredPattern()), [0.3])
    assert (quick.mask != plain.mask).mean() < 0.01
    assert statistics.loss(quick.weight - weight) == pytest.approx(statistics.loss(plain.weight - weight), rel=0.01)


def test_statistics_are_computed_once_between_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = np.linalg.inv
    monkeypatch.setattr(np.linalg, "inv", lambda a: calls.append(len(a)) or plain(a))
    statistics = Statistics.of(make(2, 200, seed=1)[1])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: statistics.inverse, range(32)))
    assert all(a is found[0] for a in found)
    assert len(calls) == 1


@pytest.mark.parametrize("text", ["group:4", "unstructured"])
def test_threads_do_not_change_the_result(text: str) -> None:
    weights, hessian = [make(16, 48, seed)[0] for seed in range(6)], make(16, 48, 0)[1]
    pattern = parse_pattern(text)
    alone = [solve(weight, Statistics.of(hessian), pattern, 0.4).tobytes() for weight in weights]
    shared = Statistics.of(hessian)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda weight: solve(weight, shared, pattern, 0.4).tobytes(), weights))
    assert together == alone


def test_sparsegpt_is_the_paper_s_sweep() -> None:
    """The published algorithm, with the Cholesky factor of the inverse and updates to the right."""
    weight, hessian = make(6, 40, seed=8)
    statistics = Statistics.of(hessian)
    upper = np.linalg.cholesky(np.linalg.inv(statistics.hessian)).T
    w = weight.astype(np.float64)
    mask = UnstructuredPattern().project((w / np.diagonal(upper)) ** 2, 0.5)
    for j in range(40):
        lost = np.where(mask[:, j], 0.0, w[:, j]) / upper[j, j]
        w[:, j:] -= np.outer(lost, upper[j, j:])
        w[~mask[:, j], j] = 0
    result = solve(weight, statistics, UnstructuredPattern(), 0.5, "sparsegpt", repair=False)
    np.testing.assert_allclose(result, w, atol=1e-5)


def moments_of(pruned: Array, dense: Array, rows: int = 0) -> Moments:
    n = len(dense)
    return Moments(pruned.T @ pruned / n, pruned.T @ dense / n, pruned.mean(0), dense.mean(0), rows)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_refit_makes_good_what_the_inputs_lost(shared: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against lstsq on the samples themselves."""
    monkeypatch.setattr(least_squares_module, "SYSTEMS", 256 if shared else 0)
    monkeypatch.setattr(least_squares_module, "LEAST_GAIN", 1e-14)
    rng = np.random.default_rng(9)
    dense_inputs = rng.standard_normal((400, 10)) @ rng.standard_normal((10, 10)) + rng.standard_normal(10)
    pruned_inputs = dense_inputs @ (np.eye(10) + 0.1 * rng.standard_normal((10, 10))) + 0.2 * rng.standard_normal(10)
    weight = rng.standard_normal((5, 10)).astype(np.float32)
    mask = rng.random((5, 10)) < 0.6
    start = np.where(mask, weight, 0).astype(np.float32)
    result, shift = refit(weight, mask, moments_of(pruned_inputs, dense_inputs), bias, start, damping=1e-9)
    assert (shift is not None) == bias
    ones = np.ones((400, int(bias)))
    for o in range(5):
        wanted = dense_inputs @ weight[o]
        expected = np.linalg.lstsq(np.hstack([pruned_inputs[:, mask[o]], ones]), wanted, rcond=None)[0]
        found = [*result[o, mask[o]], *([] if shift is None else [shift[o]])]
        np.testing.assert_allclose(found, expected, atol=2e-4)
        assert not result[o, ~mask[o]].any()


def test_refit_with_inputs_that_never_change() -> None:
    """One that is always zero gets no weight; one that is always the same keeps it, and the bias makes it good."""
    rng = np.random.default_rng(11)
    dense, pruned = rng.random((2, 60, 6))
    dense[:, 2] = pruned[:, 2] = 0
    dense[:, 4], pruned[:, 4] = 3, 2
    weight = rng.random((4, 6)).astype(np.float32)
    result, shift = refit(weight, np.ones((4, 6), np.bool_), moments_of(pruned, dense), bias=True)
    assert not result[:, 2].any()
    assert np.array_equal(result[:, 4], weight[:, 4])
    np.testing.assert_allclose((pruned @ result.T + shift).mean(0), (dense @ weight.T).mean(0), atol=1e-5)
    all_fixed = np.tile([1.0, 2, 0, 4, 5, 6], (60, 1))
    same, shift = refit(weight, np.ones((4, 6), np.bool_), moments_of(all_fixed, all_fixed), bias=True)
    assert np.array_equal(same, np.where(np.arange(6) == 2, 0, weight))
    np.testing.assert_allclose(shift, 0, atol=1e-5)


def test_refit_damps_more_where_rows_are_scarce() -> None:
    x = np.random.default_rng(0).random((20, 10))
    assert [round(moments_of(x, x, rows).damping, 3) for rows in (0, 5, 20, 100, 10_000)] == [
        0.1,
        0.3,
        0.15,
        0.03,
        0.01,
    ]


def relu_network(layers: list[tuple[Array, Array]], x: Array) -> list[Array]:
    """The input of every layer, and the output."""
    values = [x]
    for weight, bias in layers:
        y = values[-1] @ weight.T + bias
        values.append(y if len(values) == len(layers) else np.maximum(y, 0))
    return values


@pytest.mark.parametrize("text", ["unstructured", "group:16"])
@pytest.mark.parametrize("density", [0.5, 0.2])
@pytest.mark.parametrize("rows", [2, 8])
def test_layer_by_layer_refit_generalises(text: str, density: float, rows: int) -> None:
    """End to end through three layers with ReLU, on data that no layer was fitted to."""
    size, pattern = 64, parse_pattern(text)
    ratios = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        mix = rng.standard_normal((size, size)) * np.arange(1, size + 1)[:, None] ** -0.7
        x, held = (rng.standard_normal((n, size)) @ mix + 0.3 for n in (rows * size, 2000))
        dense = [
            (
                (rng.standard_normal((size, size)) * (2 / size) ** 0.5).astype(np.float32),
                0.2 * rng.standard_normal(size),
            )
            for _ in range(3)
        ]
        inputs = relu_network(dense, x)
        plain = [
            (solve(weight, a.T @ a / len(a), pattern, density), bias)
            for (weight, bias), a in zip(dense, inputs, strict=False)
        ]
        refitted = list(plain)
        for i, (weight0, bias) in enumerate(dense):
            moments = moments_of(relu_network(refitted, x)[i], inputs[i], len(x))
            weight, shift = refit(weight0, plain[i][0] != 0, moments, True, plain[i][0])
            assert shift is not None
            refitted[i] = (weight, bias + shift)
        wanted = relu_network(dense, held)[-1]
        before, after = (float(np.square(relu_network(w, held)[-1] - wanted).sum()) for w in (plain, refitted))
        ratios.append(after / before)
    assert float(np.exp(np.mean(np.log(ratios)))) < 0.99, ratios


def test_bias_restores_the_mean() -> None:
    rng = np.random.default_rng(10)
    x0, x = rng.random((50, 6)), rng.random((50, 6))
    weight0, bias = rng.random((4, 6)).astype(np.float32), rng.random(4)
    moments = Moments(x.T @ x / 50, x.T @ x0 / 50, x.mean(0), x0.mean(0), 50)
    weight, shift = refit(weight0, rng.random((4, 6)) < 0.5, moments, True)
    assert shift is not None
    expected = (x0 @ weight0.T + bias).mean(0)
    np.testing.assert_allclose((x @ weight.T + bias + shift).mean(0), expected, atol=1e-5)


# ---- Better than what is simpler ----


@pytest.mark.parametrize("text", ["group:4", "block:4x4", "unstructured"])
@pytest.mark.parametrize("method", METHODS)
def test_planted_blocks_are_found(text: str, method: str) -> None:
    """A weight that is zero outside blocks that the pattern has comes back as it was."""
    pattern = parse_pattern(text)
    weight, hessian = make(16, 48, seed=12)
    mask = pattern.project(np.repeat(np.random.default_rng(2).random((4, 48)), 4, axis=0), 0.25)
    planted = np.where(mask, np.sign(weight) * (np.abs(weight) + 0.1), 0).astype(np.float32)
    result = solve(planted, hessian, pattern, float(mask.mean()), method)
    assert np.array_equal(result != 0, mask)
    np.testing.assert_allclose(result, planted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_densities_out_of_reach_give_the_nearest(method: str) -> None:
    weight, hessian = make(8, 8, seed=2)
    wanted = (0.05, 0.2, 0.35, 0.7)
    found = solve_all(weight, hessian, BlockPattern(4, 4), wanted, method)
    assert [float((w != 0).mean()) for w in found] == [0.0, 0.25, 0.25, 0.75]
    found = solve_all(weight, hessian, parse_pattern("nm:2:4"), wanted, method)
    assert [float((w != 0).mean()) for w in found] == [0.5] * 4


@pytest.mark.parametrize("text", ["unstructured", "nm:2:4", "group:4", "block:4x4"])
@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("method", ["sparsegpt", "admm", "obs", "auto"])
def test_never_above_magnitude_with_least_squares(text: str, decay: float, method: str) -> None:
    pattern = parse_pattern(text)
    for seed in range(4):
        weight, hessian = make(16, 24, seed, samples=(0, 12)[seed % 2], decay=decay)
        statistics = Statistics.of(hessian)
        plain, found = (solve_all(weight, statistics, pattern, DENSITIES, m) for m in ("magnitude", method))
        for a, b in zip(plain, found, strict=True):
            assert statistics.loss(b.astype(float) - weight) <= statistics.loss(a.astype(float) - weight) * (1 + 1e-5)


@pytest.mark.parametrize("text", ["unstructured", "group:4"])
def test_order_of_the_methods(text: str) -> None:
    """On correlated inputs, the geometric mean over layers: every step up costs more and loses less."""
    pattern = parse_pattern(text)
    means = {}
    for name, method, repair in (
        ("magnitude", "magnitude", False),
        ("wanda", "wanda", False),
        ("magnitude + ls", "magnitude", True),
        ("wanda + ls", "wanda", True),
        ("admm", "admm", True),
        ("obs", "obs", True),
    ):
        losses = []
        for seed in range(6):
            weight, hessian = make(32, 64, seed)
            found = solve_all(weight, hessian, pattern, (0.5, 0.2), method, repair)
            losses += [error(weight, w, hessian) for w in found]
        means[name] = float(np.exp(np.mean(np.log(losses))))
    assert means["magnitude"] > 1.5 * means["wanda"]
    assert means["wanda"] > 3 * means["magnitude + ls"]
    assert means["magnitude + ls"] > 1.2 * means["wanda + ls"]
    assert means["wanda + ls"] > 1.2 * means["admm"]
    assert means["wanda + ls"] > 1.2 * means["obs"]


def test_auto_takes_the_most_accurate_that_time_allows() -> None:
    def chosen(text: str, out: int, inputs: int, seconds: float = 15.0, rank: int = 0) -> str:
        undamped = np.diag((np.arange(inputs) < (rank or inputs)).astype(float))
        statistics = Statistics(undamped + 0.01 * np.eye(inputs), 0.01, np.zeros(inputs, np.bool_))
        return choose(Problem(np.zeros((out, inputs)), statistics, parse_pattern(text)), seconds)

    assert chosen("group:16", 384, 1536) == "obs"
    assert chosen("unstructured", 384, 1536) == "admm"
    assert chosen("nm:2:4", 4096, 1024) == "admm"
    assert chosen("unstructured", 1024, 4096) == "sparsegpt"
    assert chosen("unstructured", 1024, 4096, rank=256) == "admm"
    assert chosen("group:16", 768, 3072, rank=256) == "admm"
    assert chosen("group:16", 768, 3072, seconds=40.0) == "obs"
    assert chosen("group:16", 384, 1536, seconds=0.1) == "sparsegpt"


# ---- Errors ----


def test_error_is_relative() -> None:
    weight, hessian = make(8, 12, seed=0)
    assert error(weight, weight, hessian) == 0
    assert error(weight, np.zeros_like(weight), hessian) == pytest.approx(1)
    assert error(np.zeros_like(weight), weight, hessian) == float("inf")


def test_of_zeros_with_a_power_norms_decide() -> None:
    """A dead channel of a depthwise convolution: only the damping is left."""
    weight = make(8, 12, seed=0)[0]
    statistics = Statistics.of(np.zeros((12, 12)), power=3.0)
    np.testing.assert_allclose(statistics.hessian, 3.0 * DAMPING * np.eye(12))
    np.testing.assert_allclose(statistics.times(weight), 3.0 * DAMPING * weight, rtol=1e-6)
    for method in METHODS:
        (found,) = solve_all(weight, statistics, UnstructuredPattern(), [0.5], method)
        np.testing.assert_allclose(found[found != 0], weight[found != 0], rtol=1e-5, err_msg=method)
        # Of the whole matrix or, with some methods, of each row.
        assert np.abs(found).sum() >= 0.9 * np.sort(np.abs(weight), axis=None)[48:].sum(), method


def test_inputs_that_cannot_be() -> None:
    weight, hessian = make(8, 12, seed=0)
    pattern = UnstructuredPattern()
    broken = hessian.copy()
    broken[2, 3] = np.nan
    with pytest.raises(SparsecError, match="calibration data"):
        solve(weight, broken, pattern, 0.5)
    with pytest.raises(SparsecError, match="all inputs of the layer are zero"):
        solve(weight, np.zeros_like(hessian), pattern, 0.5)
    with pytest.raises(SparsecError, match=r"must be \[in, in\]"):
        solve(weight, hessian[:3], pattern, 0.5)
    with pytest.raises(SparsecError, match="negative diagonal"):
        solve(weight, -hessian, pattern, 0.5)
    with pytest.raises(SparsecError, match="12 inputs"):
        solve(weight[:, :4], hessian, pattern, 0.5)
    with pytest.raises(SparsecError, match="weight has NaN"):
        solve(np.full_like(weight, np.inf), hessian, pattern, 0.5)
    with pytest.raises(UsageError, match=r"outside 0\.\.1"):
        solve(weight, hessian, pattern, 1.5)
    with pytest.raises(UsageError, match="expected auto, magnitude"):
        solve(weight, hessian, pattern, 0.5, "woodchuck")
    mean = np.zeros(12)
    with pytest.raises(SparsecError, match="do not fit"):
        refit(weight, weight != 0, Moments(hessian, hessian[:3], mean, mean))
    with pytest.raises(SparsecError, match="cross moment has NaN"):
        refit(weight, weight != 0, Moments(hessian, broken, mean, mean))


@pytest.mark.parametrize("text", ["unstructured", "group:4", "block:2x2", "nm:2:4"])
@pytest.mark.parametrize("method", ["auto", "magnitude", "sparsegpt"])
def test_a_weight_that_has_the_zeros_already_stays_as_it_came(text: str, method: str) -> None:
    rng = np.random.default_rng(0)
    pattern, x = parse_pattern(text), rng.standard_normal((64, 16))
    full = rng.standard_normal((12, 16)).astype(np.float32)
    weight = np.where(pattern.project(np.square(full, dtype=np.float64), 0.5), full, 0).astype(np.float32)
    hessian = x.T @ x / len(x)
    unchanged, sparser = solve_all(weight, hessian, pattern, (0.5, 0.25), method)
    np.testing.assert_array_equal(unchanged, weight)
    if not text.startswith("nm"):
        assert np.count_nonzero(sparser) <= 0.25 * weight.size
