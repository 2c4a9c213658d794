"""Products of 8-bit integers: bit for bit those of numpy on every processor, and nothing touched but what was asked."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_kernels import (
    EPSILON,
    GUARD,
    SHARES,
    UNTOUCHED,
    X86,
    Code,
    Fence,
    Work,
    compiled,
    executable,
    loops,
    pointers,
    ranges,
    requested,
    supported,
)

from sparsec.codegen.generate.cpu import generate
from sparsec.codegen.kernels.cpu import dots
from sparsec.codegen.kernels.cpu.abi import POINTERS
from sparsec.codegen.kernels.cpu.schedule import Schedule
from sparsec.codegen.kernels.elementwise import CHEAP
from sparsec.codegen.problem import Problem
from sparsec.codegen.target import parse_cpu
from sparsec.codegen.tune.gpu.measure import activated
from sparsec.ir import Activation, Epilogue, Grid, SparseMatrix
from sparsec.ir.sparse_matrix import DOT_INPUTS
from sparsec.ir.values import Codebook, Floats, Int8, Values

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from sparsec.codegen.target import CpuTarget

    Array = NDArray[Any]

PLAIN = Epilogue()
INT8 = Int8()
# The most inputs of which no sum overflows.
MOST_INPUTS = 65_792

# ---- Kernels and data ----


@dataclass(frozen=True)
class Integers(Code):
    """What is compiled."""

    kind: Values = INT8
    x: str = "uint8"
    y: str = "float"

    @property
    def problem(self) -> Problem:
        zeros = np.zeros(self.shape, dtype=np.float32)
        empty = SparseMatrix.from_dense(zeros, self.pattern, kind=self.kind, together=DOT_INPUTS)
        return replace(Problem.of(empty, self.epilogue, self.x, self.y), density=0.5)


@dataclass(frozen=True)
class Task(Work):
    """What it is run on.

    Attributes:
        x_zero_point, y_zero_point: 0 to 255.
        exact: all scales are powers of two, so that every result is a float32 and has one right value.
        extreme: weights -128 and 127, and x 0 and 255, alone.
    """

    x_zero_point: int = 128
    y_zero_point: int = 0
    exact: bool = True
    extreme: bool = False


@dataclass(frozen=True)
class Data:
    """The operands; `codes` [out, in] is the weight in integers."""

    codes: Array
    matrix: SparseMatrix
    x: Array
    x_grid: Grid
    y_grid: Grid
    bias: Array
    residual: Array

    @property
    def scales(self) -> Array:
        """[out] of the weight."""
        return self.matrix.table[:, 0]

    @classmethod
    def random(cls, code: Integers, task: Task) -> Data:
        rng = np.random.default_rng(task.seed)
        out, inputs = code.shape

        def codes(low: int, high: int, shape: tuple[int, int]) -> Array:
            return rng.choice([low, high], shape) if task.extreme else rng.integers(low, high + 1, shape)

        def scale(*shape: int) -> Array:
            powers = rng.integers(-6, 3, shape)
            return np.exp2(powers if task.exact else powers + rng.random(shape)).astype(np.float32)

        def whole(*shape: int) -> Array:
            """Dyadic numbers, which sums of few leave exact."""
            return (rng.integers(-64, 64, shape) / 16 if task.exact else rng.standard_normal(shape)).astype(np.float32)

        blocks = rng.random(code.pattern.grid(code.shape)) < task.density
        weight = codes(-128, 127, code.shape) * code.pattern.expand(blocks, code.shape)
        table = scale(out, 1)
        matrix = code.pattern.pack(weight.astype(np.float32) * table, "float32", Int8(), table, DOT_INPUTS)
        x_grid = Grid(float(scale()), task.x_zero_point)
        x = codes(0, 255, (task.height, inputs)).astype(np.uint8)
        # All of a row's grid is used, so that a row's own scale is that of the grid.
        x[:, :2] = 0, 255
        sums = np.abs(weight).sum() / len(weight) * x_grid.scale * table.mean() + 1
        y_scale = np.exp2(np.round(np.log2(sums / 8)) + (0 if task.exact else 0.3))
        return cls(
            weight,
            matrix,
            x if code.x == "uint8" else floats(rng, x, x_grid, task.exact),
            x_grid,
            Grid(float(np.float32(y_scale)), task.y_zero_point),
            whole(out),
            whole(task.height, out),
        )


def floats(rng: np.random.Generator, codes: Array, grid: Grid, exact: bool) -> Array:
    """Values of a grid; where they need not be exact, also ties, values between them and beyond its ends."""
    values = (codes.astype(np.float32) - np.float32(grid.zero_point)) * np.float32(grid.scale)
    if exact:
        return values
    steps = rng.choice([0, 0.5, -0.5, 0.1, 300, -300], codes.shape, p=[0.3, 0.2, 0.1, 0.38, 0.01, 0.01])
    return values + (steps * grid.scale).astype(np.float32)


# ---- What is right ----


def quantized(values: Array, inverse: Any, zero_point: Any) -> Array:
    """Codes of float32: nearest, ties to even, saturated; 0 of NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.clip(values * np.float32(inverse), -zero_point, np.float32(255) - zero_point)
    return np.where(np.isnan(values), 0, np.rint(scaled) + zero_point).astype(np.int64)


def codes_of(code: Integers, data: Data) -> tuple[Array, Array, Array]:
    """X in integers, and the scale and zero point of every row [rows, 1], as float32 arithmetic gives them."""
    rows, one = len(data.x), np.float32(1)
    scale, zero_point = np.full((rows, 1), data.x_grid.scale, np.float32), np.full((rows, 1), data.x_grid.zero_point)
    if code.x == "uint8":
        return data.x.astype(np.int64), scale, zero_point
    if code.x == "dynamic":
        low = np.fmin(data.x, np.float32(0)).min(axis=1, keepdims=True)
        high = np.fmax(data.x, np.float32(0)).max(axis=1, keepdims=True)
        scale = np.maximum((high - low) / np.float32(255), np.float32(1e-30))
        zero_point = np.rint(-low * (one / scale)).astype(np.int64)
    return quantized(data.x, one / scale, zero_point.astype(np.float32)), scale, zero_point


def integer_sums(code: Integers, data: Data) -> tuple[Array, Array]:
    """sum (x - zero point) w: [rows, out] int64, which fit an int32; and the scale of every row."""
    x, scale, zero_point = codes_of(code, data)
    # float64 holds them exactly.
    sums = ((x - zero_point).astype(np.float64) @ data.codes.T.astype(np.float64)).astype(np.int64)
    assert (np.abs(sums) < 2**31).all()
    return sums, scale


def expected(code: Integers, data: Data, exact: bool) -> tuple[Array, Array | float]:
    """Y in float64, before it is rounded to codes, and how far from it float32 may be: 0 where nothing rounds twice."""
    sums, scale = integer_sums(code, data)
    z = sums.astype(np.float32) * (data.scales * scale)
    e, size = code.epilogue, np.abs(z.astype(np.float64))
    if e == PLAIN or (exact and e.activation in CHEAP):
        z = z + data.bias if e.bias else z
        y = activated(z, e).astype(np.float32)
        return (y + data.residual if e.residual else y).astype(np.float64), 0
    y = z.astype(np.float64)
    if e.bias:
        y, size = y + data.bias, size + np.abs(data.bias)
    # An activation's own error is absolute: see test_kernels.py.
    y, size = activated(y, e), size + (e.activation is not Activation.NONE)
    if e.residual:
        y, size = y + data.residual, size + np.abs(data.residual)
    return y, 16 * EPSILON * size


def is_right(code: Integers, data: Data, result: Array, exact: bool) -> Array:
    """Which elements of Y are."""
    right, bound = expected(code, data, exact)
    if code.y == "float":
        return np.asarray(np.abs(result - right) <= bound)
    grid = data.y_grid
    if not np.any(bound):
        inverse = np.float32(1) / np.float32(grid.scale)
        return np.asarray(result == quantized(right.astype(np.float32), inverse, np.float32(grid.zero_point)))
    # Half a step, and what float32 is off at 255 of them.
    steps = np.clip(right / grid.scale + grid.zero_point, 0, 255)
    return np.asarray(np.abs(result - steps) <= 0.5 + bound / grid.scale + 255 * 4 * EPSILON)


# ---- Calls ----


def guarded(count: int, dtype: str) -> tuple[Array, Array]:
    """`count` elements in the middle of untouched memory; and all of that memory, as bytes."""
    size = count * np.dtype(dtype).itemsize
    memory = np.full(2 * GUARD + -(-size // 4), UNTOUCHED).view(np.uint8)
    return memory[4 * GUARD : 4 * GUARD + size].view(dtype), memory


def arguments(code: Integers, data: Data, y: Array, scratch: Array) -> list[Array]:
    """Everything behind the kernel's pointers, in their order; what it does not use is empty."""
    m, e = data.matrix, code.epilogue
    inverses = [1 / np.float32(grid.scale) for grid in (data.x_grid, data.y_grid)]
    parameters = [data.x_grid.scale, inverses[0], data.x_grid.zero_point, inverses[1], data.y_grid.zero_point]
    parts = {"x": data.x, "values": m.values, "indices": m.indices, "indptr": m.indptr}
    parts |= {"table": np.ascontiguousarray(data.scales), "sums": data.codes.sum(axis=1).astype(np.int32)}
    parts |= {"bias": data.bias} if e.bias else {}
    parts |= {"residual": data.residual} if e.residual else {}
    parts |= {"y": y, "workspace": scratch, "parameters": np.array(parameters, dtype=np.float32)}
    return [parts.get(name, np.zeros(0, dtype=np.float32)) for name in POINTERS]


def check(code: Integers, task: Task, call: Callable[..., Any], data: Data | None = None) -> Array:
    """Run a compiled kernel: right where it was asked to compute, and nothing else changed; returns Y."""
    data = data or Data.random(code, task)
    result = run(code, task, call, data)
    wrong = requested(code, task) & ~is_right(code, data, result, task.exact)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}"
    return result


def run(code: Integers, task: Task, call: Callable[..., Any], data: Data) -> Array:
    """Run a compiled kernel, and check that it changed nothing but what it was asked to compute; returns Y."""
    y, y_memory = guarded(task.height * code.shape[0], "uint8" if code.y == "uint8" else "float32")
    scratch, scratch_memory = guarded(dots.workspace(code.problem, code.schedule), "int32")
    given = arguments(code, data, y, scratch)
    read = [array for array in given if array is not y and array is not scratch]
    before = [array.tobytes() for array in read]
    untouched = y.tobytes()
    call(*pointers(given), *ranges(code, task))

    asked = requested(code, task).ravel()
    bits = y.view(f"u{y.itemsize}")
    assert (bits == np.frombuffer(untouched, bits.dtype))[~asked].all(), "wrote to Y outside of its range"
    for memory, used in ((y_memory, y.nbytes), (scratch_memory, scratch.nbytes)):
        fresh = np.full(memory.size // 4, UNTOUCHED).view(np.uint8)
        assert np.array_equal(memory[: 4 * GUARD], fresh[: 4 * GUARD]), "wrote before a buffer"
        assert np.array_equal(memory[4 * GUARD + used :], fresh[4 * GUARD + used :]), "wrote beyond a buffer"
    assert [array.tobytes() for array in read] == before, "wrote to what is only read"
    return y.reshape(task.height, -1)


@pytest.fixture(scope="module")
def host() -> CpuTarget:
    return parse_cpu()


def test_formats_are_part_of_the_key() -> None:
    """And so of the symbols of the code, and of what is measured."""
    formats = [(INT8, x, y) for x, y in FORMATS]
    formats += [(kind, "float", y) for kind in (None, INT8, Int8(16), Codebook(16)) for y in ("float", "uint8")]
    problems = [Problem(64, 64, (32, 4), 32, 0.5, kind=kind, x=x, y=y) for kind, x, y in formats]
    assert len({problem.key for problem in problems}) == len(set(problems)) == len(formats)
    for problem, (kind, x, _) in zip(problems, formats, strict=True):
        assert problem.values == (kind or Floats())
        assert (problem.integers, problem.together) == ((False, 1) if x == "float" else (True, DOT_INPUTS))


# ---- Right results ----

# Larger tiles take seconds to compile: see `test_large_tiles`.
SCHEDULES = st.builds(
    Schedule, st.just("dots"), tile_rows=st.integers(1, 4), accumulators=st.sampled_from((1, 4, 8, 16))
)
# The block sizes that people prune to, as well as any other whose inputs stand four together.
BLOCKS = st.one_of(
    st.sampled_from([(32, 4), (16, 4), (32, 32), (4, 4), (20, 8), (64, 16), (8, 8), (16, 16), (1, 4), (3, 8)]),
    st.tuples(st.integers(1, 70), st.integers(1, 12).map(lambda fours: 4 * fours)),
)
SHAPES = st.tuples(st.integers(1, 150), st.integers(1, 40).map(lambda fours: 4 * fours))
# Those that float32 computes exactly, beside one that it does not.
EPILOGUES = st.one_of(
    st.builds(
        Epilogue,
        st.sampled_from((Activation.NONE, Activation.RELU, Activation.LEAKY_RELU)),
        alpha=st.just(0.25),
        bias=st.booleans(),
        residual=st.booleans(),
    ),
    st.builds(Epilogue, st.just(Activation.SILU), alpha=st.just(1.5), bias=st.booleans(), residual=st.booleans()),
)
ZERO_POINTS = st.sampled_from((0, 255)) | st.integers(0, 255)
TASK = st.builds(
    Task,
    height=st.integers(1, 40),
    density=st.sampled_from((0.0, 0.03, 0.2, 0.6, 1.0)),
    rows=st.one_of(st.just((0.0, 1.0)), SHARES),
    panels=st.one_of(st.just((0.0, 1.0)), SHARES),
    seed=st.integers(0, 2**16),
    x_zero_point=ZERO_POINTS,
    y_zero_point=ZERO_POINTS,
    exact=st.booleans(),
    extreme=st.booleans(),
)
# A kernel takes a while to compile: it is run on several weights and inputs.
TASKS = st.lists(TASK, min_size=6, max_size=8)
X_FORMATS = ("uint8", "static", "dynamic")
FORMATS = [(x, y) for x in X_FORMATS for y in ("float", "uint8")]
EVERYTHING = [
    Task(height, density, seed=height, x_zero_point=zero, y_zero_point=255 - zero, exact=exact, extreme=not exact)
    for height in (1, 2, 5, 40)
    for density, zero in ((0.0, 7), (0.2, 255), (1.0, 0))
    for exact in (True, False)
]


@pytest.mark.parametrize(("x", "y"), FORMATS)
def test_equals_integers(x: str, y: str, host: CpuTarget) -> None:
    """Any shape, block, schedule, epilogue, number of rows, density, grid and range of rows and panels."""
    ragged = Integers(Schedule("dots", 3), (38, 76), (5, 12), Epilogue(Activation.RELU, bias=True), x=x, y=y)

    @settings(max_examples=3, deadline=None, derandomize=True, database=None)
    @given(st.builds(Integers, SCHEDULES, SHAPES, BLOCKS, EPILOGUES, x=st.just(x), y=st.just(y)), TASKS)
    @example(ragged, EVERYTHING)
    def property_(code: Integers, tasks: list[Task]) -> None:
        if code.y == "uint8":
            code = replace(code, epilogue=replace(code.epilogue, residual=False))
        call = compiled(code, host)
        for task in tasks:
            check(code, task, call)

    property_()


def test_smallest(host: CpuTarget) -> None:
    for x, y in FORMATS:
        code = Integers(Schedule("dots", 1), (1, 4), (1, 4), x=x, y=y)
        call = compiled(code, host)
        for task in EVERYTHING:
            check(code, task, call)


@pytest.mark.parametrize(
    ("activation", "y"),
    [(activation, "float") for activation in Activation] + [(Activation.CLIP, "uint8"), (Activation.GELU, "uint8")],
)
def test_every_activation(activation: Activation, y: str, host: CpuTarget) -> None:
    alpha, beta = {Activation.CLIP: (-0.5, 0.75), Activation.LEAKY_RELU: (0.125, 0.0)}.get(activation, (1.0, 0.0))
    epilogue = Epilogue(activation, alpha, beta, bias=True, residual=y == "float")
    # Whole vectors of outputs, and a panel that sticks out.
    code = Integers(Schedule("dots", 2), (38, 24), (4, 4), epilogue, y=y)
    call = compiled(code, host)
    for exact in (True, False):
        for height in (1, 7):
            check(code, Task(height, 0.5, seed=height, y_zero_point=40, exact=exact), call)


@pytest.mark.parametrize("tile", range(5, 17))
def test_large_tiles(tile: int, host: CpuTarget) -> None:
    """Whole tiles, fewer rows than one, and a last tile that lacks rows."""
    block, x = (32, 4) if tile <= 14 else (16, 8), "static" if tile % 2 else "uint8"
    code = Integers(Schedule("dots", tile), (96, 64), block, Epilogue(Activation.RELU, bias=True), x=x)
    call = compiled(code, host)
    for height in (1, 3, tile - 1, tile, tile + 1, 33, 100):
        check(code, Task(height, 0.3, seed=height), call)


def test_largest_tile_with_all_at_once(host: CpuTarget) -> None:
    """A panel that sticks out, rows with grids of their own, codes as result."""
    epilogue = Epilogue(Activation.RELU, bias=True)
    code = Integers(Schedule("dots", 16), (45, 36), (16, 4), epilogue, x="dynamic", y="uint8")
    call = compiled(code, host)
    for task in EVERYTHING:
        check(code, task, call)


def test_parts_make_the_whole(host: CpuTarget) -> None:
    """Calls for all pairs of a range of rows and a range of panels compute Y, whatever the ranges."""
    for x, y in (("dynamic", "float"), ("uint8", "uint8")):
        code = Integers(Schedule("dots", 4), (50, 32), (20, 4), Epilogue(bias=True), x=x, y=y)
        call, task = compiled(code, host), Task(21, 0.5)
        seen = np.zeros((21, 50), dtype=int)
        for rows in ((0, 0.2), (0.2, 0.6), (0.6, 1)):
            for panels in ((0, 0.5), (0.5, 1)):
                part = replace(task, rows=rows, panels=panels)
                check(code, part, call)
                seen += requested(code, part)
        assert (seen >= 1).all()


# ---- Sums in 32 bits ----


def plain_data(code: Integers, weight: Array, x: Array, zero_point: int) -> Data:
    """All scales are 1, so that Y is the sums."""
    table = np.ones((len(weight), 1), dtype=np.float32)
    matrix = code.pattern.pack(weight.astype(np.float32), "float32", Int8(), table, DOT_INPUTS)
    nothing = np.zeros(0, dtype=np.float32)
    return Data(weight.astype(np.int64), matrix, x, Grid(1.0, zero_point), Grid(1.0, 0), nothing, nothing)


def check_sums(code: Integers, call: Callable[..., Any], share: float = 1.0) -> None:
    """Sums below 2^24 come out as they are; larger ones are the nearest float32. Of the inputs, `share` count."""
    out, inputs = code.shape
    rng = np.random.default_rng(0)
    counts = np.arange(inputs) < share * inputs
    # In two thirds of these, pairs of products need 17 bits.
    weights = [rng.integers(-128, 128, code.shape), rng.choice([-128, -127, 127], code.shape)]
    weights.append(np.where(np.arange(inputs) % 3 == 1, -128, 127) * np.ones((out, 1), dtype=int))
    for weight, zero_point in zip(weights, (1, 255, 0), strict=True):
        x = rng.integers(0, 256, (5, inputs)).astype(np.uint8)
        x[3], x[4] = 255, 0
        given = x if code.x == "uint8" else x.astype(np.float32) - np.float32(zero_point)
        y = run(code, Task(5, 1.0), call, plain_data(code, weight * counts, given, zero_point))
        sums = (x.astype(np.int64) - zero_point) @ (weight * counts).T
        assert np.array_equal(y, sums.astype(np.float32))
        assert np.abs(sums).max() < 2**24, "float32 holds them all"


@pytest.mark.parametrize(
    ("block", "x"),
    [((32, 4), "uint8"), ((4, 4), "static"), ((20, 8), "uint8"), ((3, 4), "uint8"), ((2, 4), "static")],
    ids=str,
)
def test_sums_are_exact(x: str, block: tuple[int, int], host: CpuTarget) -> None:
    code = Integers(Schedule("dots", 3), (45, 400), block, x=x)
    check_sums(code, compiled(code, host))


def check_extremes(code: Integers, call: Callable[..., Any]) -> None:
    """Of as many products as may be, all as large as can be; nothing saturates or overflows."""
    inputs = code.shape[1]
    for weight in (-128, 127):
        for x, zero_point in ((255, 0), (255, 255), (0, 255), (128, 0)):
            codes = np.full((5, inputs), x, dtype=np.uint8)
            y = run(code, Task(5, 1.0), call, plain_data(code, np.full(code.shape, weight), codes, zero_point))
            assert (y == np.float32(inputs * weight * (x - zero_point))).all()


def test_no_sum_overflows(host: CpuTarget) -> None:
    assert MOST_INPUTS * 255 * 128 < 2**31 <= (MOST_INPUTS + DOT_INPUTS) * 255 * 128
    code = Integers(Schedule("dots", 2), (8, MOST_INPUTS), (8, 64))
    check_extremes(code, compiled(code, host))


# ---- Quantising on the way ----

NAN, INFINITY = np.float32("nan"), np.float32("inf")


@pytest.mark.parametrize("tile", [1, 4])
def test_rounds_to_even_and_saturates(tile: int, host: CpuTarget) -> None:
    """As ONNX's QuantizeLinear does; NaN becomes 0."""
    halves = np.concatenate([np.arange(-40, 552) / 2, [1e30, -1e30, INFINITY, -INFINITY, NAN, -0.0, 1e-40]])
    x = halves[: len(halves) // 4 * 4].astype(np.float32)
    x = np.concatenate([x, halves[-4:].astype(np.float32)])
    inputs = len(x)
    code = Integers(Schedule("dots", tile), (inputs, inputs), (4, 4), x="static")
    call = compiled(code, host)
    for zero_point in (0, 3, 255):
        # Each output is one code.
        data = plain_data(code, np.eye(inputs), np.stack([x - np.float32(zero_point)] * 5), zero_point)
        y = check(code, Task(5, 1.0, x_zero_point=zero_point), call, data)
        with np.errstate(invalid="ignore"):
            codes = np.clip(np.rint(data.x) + zero_point, 0, 255)
        assert np.array_equal(y, np.where(np.isnan(codes), 0, codes) - zero_point)


def test_result_rounds_to_even_and_saturates(host: CpuTarget) -> None:
    code = Integers(Schedule("dots", 4), (8, 4), (8, 4), y="uint8")
    call = compiled(code, host)
    weight = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]] * 2)
    x = np.arange(256, dtype=np.uint8)[:, None].repeat(4, axis=1)
    for zero_point, y_zero_point in ((0, 0), (128, 100), (255, 255), (128, 3)):
        data = plain_data(code, weight, x, zero_point)
        # Every second code is a tie.
        data = replace(data, y_grid=Grid(2.0, y_zero_point))
        y = check(code, Task(256, 1.0, x_zero_point=zero_point, y_zero_point=y_zero_point), call, data)
        right = np.clip(np.rint((x[:, :1].astype(int) - zero_point) / 2) + y_zero_point, 0, 255)
        assert np.array_equal(y, right.repeat(8, axis=1))


def test_rows_have_grids_of_their_own(host: CpuTarget) -> None:
    """Rows of zeros, of one sign, of tiny and of huge numbers beside each other: each as good as alone."""
    inputs = 64
    rng = np.random.default_rng(0)
    row = rng.random(inputs).astype(np.float32)
    rows = [row, -row, 0 * row, 1e-36 * row, 1e30 * row, row - np.float32(0.5), 1e-42 * row, np.ones(inputs)]
    x = np.stack(rows).astype(np.float32)
    code = Integers(Schedule("dots", 3), (32, inputs), (32, 4), x="dynamic")
    call = compiled(code, host)
    weight = rng.integers(-127, 128, code.shape)
    together = check(code, Task(len(x), 1.0), call, plain_data(code, weight, x, 0))
    for i in range(len(x)):
        alone = check(code, Task(1, 1.0), call, plain_data(code, weight, x[i : i + 1], 0))
        assert np.array_equal(alone[0], together[i])
    right = x.astype(np.float64) @ weight.T
    # Half a step of 255 for each input.
    reach = np.maximum(x.max(axis=1), 0) - np.minimum(x.min(axis=1), 0)
    bound = np.maximum(reach, 255 * 1e-30)[:, None] / 255 * (0.501 * np.abs(weight).sum(axis=1) + 1)
    assert (np.abs(together - right) <= bound).all()
    assert not together[2].any()


@pytest.mark.parametrize("y", ["float", "uint8"])
@pytest.mark.parametrize("x", ["static", "dynamic"])
def test_nan_and_infinity_stay_in_their_rows(x: str, y: str, host: CpuTarget) -> None:
    code = Integers(Schedule("dots", 4), (37, 32), (16, 4), Epilogue(Activation.SILU, alpha=1.0, bias=True), x=x, y=y)
    call = compiled(code, host)
    task = Task(23, 0.6, exact=False)
    clean = Data.random(code, task)
    right = check(code, task, call, clean)
    for poison in (NAN, -NAN, INFINITY, -INFINITY, np.float32(3e38), np.float32(-3e38)):
        for whole in (False, True):
            spoilt = clean.x.copy()
            for at in (0, 2, 9, 14, 22):
                spoilt[at, slice(None) if whole else slice(at, None, 24)] = poison
            data = replace(clean, x=spoilt)
            result = run(code, task, call, data)
            rest = np.setdiff1d(np.arange(23), (0, 2, 9, 14, 22))
            assert np.array_equal(result[rest], right[rest])
            if x == "static":
                assert is_right(code, data, result, exact=False).all()


def test_any_result_is_a_code(host: CpuTarget) -> None:
    """Also where the sums are NaN or infinite, of scales or of a bias."""
    code = Integers(Schedule("dots", 2), (40, 8), (16, 4), Epilogue(bias=True), y="uint8")
    data = Data.random(code, Task(3, 1.0))
    bias = data.bias.copy()
    bias[:4], bias[-4:] = [NAN, INFINITY, -INFINITY, 3e38], [NAN, INFINITY, -INFINITY, -3e38]
    y = check(code, Task(3, 1.0, y_zero_point=9), compiled(code, host), replace(data, bias=bias))
    assert (y[:, :4] == (0, 255, 0, 255)).all() and (y[:, -4:] == (0, 255, 0, 0)).all()


# ---- Memory ----

needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork") or platform.system() != "Linux", reason="needs fork and mprotect"
)


def survives(code: Integers, call: Callable[..., Any], tasks: Sequence[Task]) -> bool:
    """Whether a child process lives through calls whose arguments all end where memory may not be read."""
    child = os.fork()
    if child == 0:
        try:
            for task in tasks:
                data = Data.random(code, task)
                y = np.zeros(data.residual.shape, dtype=np.uint8 if code.y == "uint8" else np.float32)
                scratch = np.zeros(dots.workspace(code.problem, code.schedule), dtype=np.int32)
                fences = [Fence(array) for array in arguments(code, data, y, scratch)]
                call(*(fence.pointer for fence in fences), *ranges(code, task))
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@needs_fork
@pytest.mark.parametrize("block", [(1, 4), (3, 8), (4, 4), (20, 8), (32, 4), (64, 16)], ids="{0[0]}x{0[1]}".format)
def test_reads_nothing_beyond_its_arguments(block: tuple[int, int], host: CpuTarget) -> None:
    tasks = [Task(1, 0.5), Task(6, 0.3), Task(13, 1.0)]
    x, y = FORMATS[sum(block) // 4 % len(FORMATS)]
    code = Integers(Schedule("dots", 2), (43, 52), block, Epilogue(bias=True, residual=y == "float"), x=x, y=y)
    assert survives(code, compiled(code, host), tasks)


# ---- Other processors ----

OLDER = ["x86-64", "x86-64-v3", "skylake-avx512", "cascadelake"]


@pytest.mark.parametrize("cpu", OLDER)
def test_right_on_older_processors(cpu: str, host: CpuTarget) -> None:
    """The same bits from every instruction set."""
    target = parse_cpu(cpu)
    if not supported(target, host):
        pytest.skip(f"this machine lacks what {target} may use")
    code = Integers(Schedule("dots", 2), (53, 40), (20, 4), Epilogue(Activation.GELU, bias=True), x="dynamic")
    call = executable(code, target)["kernel"]
    for height in (1, 9, 33):
        check(code, Task(height, 0.3, exact=False), call)
    plain = Integers(Schedule("dots", 2), (16, MOST_INPUTS), (16, 32))
    call = executable(plain, target)["kernel"]
    check_sums(plain, call, share=0.005)
    check_extremes(plain, call)


def test_object_for_aarch64() -> None:
    code = Integers(Schedule("dots", 1), (53, 40), (20, 4), Epilogue(Activation.GELU, bias=True), x="dynamic")
    made = generate(code.problem, code.schedule, parse_cpu("neoverse-n1"))
    assert int.from_bytes(made.elf[18:20], "little") == 183  # EM_AARCH64


# ---- Machine code ----


def assembly(code: Integers, cpu: str) -> str:
    return str(executable(code, parse_cpu(cpu)).mod.inspect_source("asm"))


@pytest.mark.parametrize(
    ("cpu", "instruction", "register"),
    [
        ("cascadelake", "vpdpbusd", "zmm"),
        ("znver4", "vpdpbusd", "zmm"),
        ("alderlake", "vpdpbusd", "ymm"),
        ("skylake-avx512", "vpmaddwd", "zmm"),
        ("haswell", "vpmaddwd", "ymm"),
        ("x86-64", "pmaddwd", "xmm"),
    ],
)
@pytest.mark.skipif(not X86, reason="LLVM may have no other back end")
def test_instructions(cpu: str, instruction: str, register: str) -> None:
    """Those that multiply four or two inputs at a time, and never the one that saturates."""
    text = assembly(Integers(Schedule("dots", 2), (64, 64), (32, 4)), cpu)
    found = re.findall(r"\t(?:\{\w+\} )?(v?p(?:dp\w+|madd\w+|mull?\w+))\t.*%([xyz]mm)", text)
    assert (instruction, register) in found
    assert {name for name, _ in found} <= {instruction, "vpmulld", "pmulld", "pmuludq"}, "other products"


@pytest.mark.parametrize(("tile", "block", "vectors"), [(14, (32, 4), 28), (12, (16, 16), 12), (1, (32, 4), 2)])
def test_vnni_loop(tile: int, block: tuple[int, int], vectors: int) -> None:
    """All sums stay in registers: as many products on 512 bits as there are sums, and no stores."""
    code = Integers(Schedule("dots", tile), (256, 256), block, Epilogue(bias=True))
    made = generate(code.problem, code.schedule, parse_cpu("cascadelake"))
    assert b"TVMBackendAllocWorkspace" not in made.elf, "sums on the heap"
    body = max((body for _, body in loops(assembly(code, "cascadelake"))), key=lambda body: body.count("vpdpbusd"))
    assert len(re.findall(r"\tvpdpbusd\t.*%zmm", body)) >= vectors
    assert not re.search(r"\tvmovdq\w+\t%zmm\d+, .*\(", body), f"stores between products:\n{body}"
