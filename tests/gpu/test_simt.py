"""The kernel for few rows: against float64 on a CPU, and what its machine code is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import emulate
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsec.codegen.generate.cuda import translate
from sparsec.codegen.generate.nvrtc import compile_cuda, find_cuda_compilers, resources
from sparsec.codegen.kernels.gpu import simt
from sparsec.codegen.kernels.gpu.schedule import GpuSchedule
from sparsec.codegen.problem import Problem
from sparsec.codegen.target.cuda import TABLE
from sparsec.codegen.tune.gpu.measure import activated
from sparsec.ir import Activation, BlockPattern, Epilogue, SparseMatrix
from sparsec.ir.values.floats import DTYPES

if TYPE_CHECKING:
    from conftest import OpenCl
    from numpy.typing import NDArray

    Array = NDArray[Any]

EPSILON = float(np.finfo(np.float32).eps)
PLAIN = Epilogue()

# ---- Kernels and data ----


@dataclass(frozen=True)
class Code:
    """What is compiled."""

    schedule: GpuSchedule
    shape: tuple[int, int]  # out, in
    block: tuple[int, int]
    epilogue: Epilogue = PLAIN
    dtype: str = "float32"

    @property
    def pattern(self) -> BlockPattern:
        return BlockPattern(*self.block)

    @property
    def problem(self) -> Problem:
        # The kernel does not depend on the density: one compiled kernel serves all of them.
        empty = SparseMatrix.from_dense(np.zeros(self.shape, dtype=np.float32), self.pattern, self.dtype)
        return replace(Problem.of(empty, self.epilogue), density=0.5)


@dataclass(frozen=True)
class Work:
    """What it is run on; `dense_row` is a block row all of whose blocks are stored, if it has one."""

    height: int
    density: float
    dense_row: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Data:
    matrix: SparseMatrix
    x: Array
    bias: Array
    residual: Array

    @classmethod
    def random(cls, code: Code, work: Work) -> Data:
        rng = np.random.default_rng(work.seed)
        out, inputs = code.shape
        blocks = rng.random(code.pattern.grid(code.shape)) < work.density
        if work.dense_row is not None:
            blocks[work.dense_row % len(blocks)] = True
        weight = rng.standard_normal(code.shape) * code.pattern.expand(blocks, code.shape)
        dtype = DTYPES[code.dtype]
        return cls(
            SparseMatrix.from_dense(weight.astype(np.float32), code.pattern, code.dtype),
            rng.standard_normal((work.height, inputs)).astype(dtype),
            rng.standard_normal(out).astype(dtype),
            rng.standard_normal((work.height, out)).astype(dtype),
        )


def expected(data: Data, epilogue: Epilogue) -> tuple[Array, Array]:
    """The product and its epilogue in float64, and how far from it the kernel may be.

    Sums in float32 may be off by 16 units of the last place of the sum of all terms' magnitudes; an activation adds
    one term of magnitude 1, as its own error is absolute, and none is steeper than 1.13. Rounding the result to 16 bits
    costs half a unit of its own last place.
    """
    x, weight = data.x.astype(np.float64), data.matrix.to_dense().astype(np.float64)
    z, size = x @ weight.T, np.abs(x) @ np.abs(weight).T
    if epilogue.bias:
        z, size = z + data.bias.astype(np.float64), size + np.abs(data.bias.astype(np.float64))
    y, size = activated(z, epilogue), size + (epilogue.activation is not Activation.NONE)
    if epilogue.residual:
        y, size = y + data.residual.astype(np.float64), size + np.abs(data.residual.astype(np.float64))
    bound = 16 * EPSILON * size
    if data.x.dtype != np.float32:
        info = ml_dtypes.finfo(data.x.dtype)
        bound += (np.abs(y) + bound) * float(info.eps) / 2 + float(info.smallest_subnormal) / 2
    return y, bound


def check(code: Code, work: Work, opencl: OpenCl) -> None:
    """Compile, run, compare: every element of Y is right, and nothing else is written."""
    assert not simt.obstacle(code.problem, code.schedule, "sm_80")
    data = Data.random(code, work)
    arrays = arrays_of(code, data)
    opencl.compile(code.problem, code.schedule)(arrays, work.height)
    compare(code, data, arrays["y"])


def arrays_of(code: Code, data: Data) -> dict[str, Array]:
    """A kernel's arguments by name; NaN where it is not to look."""
    m, height = data.matrix, len(data.x)
    unread = np.setdiff1d(np.arange(code.shape[1]), m.indices[:, None] + np.arange(m.block[1]))
    x = data.x.copy()
    x[:, unread] = np.nan
    return {
        "x": x,
        "values": m.values,
        "indices": m.indices,
        "indptr": m.indptr,
        "bias": data.bias,
        "residual": data.residual,
        "y": np.full((height, code.shape[0]), np.nan, dtype=data.x.dtype),
        "workspace": np.full(height * simt.workspace(code.problem, code.schedule), np.nan, dtype=np.float32),
    }


def compare(code: Code, data: Data, y: Array) -> None:
    right, bound = expected(data, code.epilogue)
    wrong = ~(np.abs(y.astype(np.float64) - right) <= bound)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}"


# ---- Right results ----

SCHEDULES = st.builds(
    GpuSchedule,
    st.just("simt"),
    tile_rows=st.sampled_from((1, 2, 3, 4)),
    warps=st.sampled_from((2, 4)),
    unroll=st.sampled_from((1, 2, 4)),
    split=st.sampled_from((1, 1, 2, 3)),
)
# The block sizes that people prune to, as well as any other.
BLOCKS = st.one_of(
    st.sampled_from([(1, 1), (1, 16), (2, 1), (4, 1), (4, 4), (8, 1), (16, 1), (32, 1), (32, 32), (64, 1), (64, 16)]),
    st.tuples(st.integers(1, 70), st.integers(1, 40)),
)
EPILOGUES = st.builds(
    Epilogue,
    st.sampled_from((Activation.NONE, Activation.RELU, Activation.SILU)),
    alpha=st.just(1.5),
    bias=st.booleans(),
    residual=st.booleans(),
)
WORK = st.builds(
    Work,
    height=st.integers(1, 20),
    density=st.sampled_from((0.0, 0.03, 0.2, 0.6, 1.0)),
    dense_row=st.one_of(st.none(), st.integers(0, 100)),
    seed=st.integers(0, 2**16),
)
# A kernel takes a while to compile: it is run on several weights and inputs.
WORKS = st.lists(WORK, min_size=4, max_size=6)
EVERYTHING = [Work(height, density, seed=height) for height in (1, 2, 5, 20) for density in (0.0, 0.2, 1.0)]


def simple(tile_rows: int, warps: int = 2, unroll: int = 2, split: int = 1) -> GpuSchedule:
    return GpuSchedule("simt", tile_rows, warps, unroll, split)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(dtype: str, opencl: OpenCl) -> None:
    """Any shape, block, schedule, epilogue, number of rows and density."""

    @settings(max_examples=5, deadline=None, derandomize=True, database=None)
    @given(
        st.builds(
            Code,
            SCHEDULES,
            st.tuples(st.integers(1, 200), st.integers(1, 200)),
            BLOCKS,
            EPILOGUES,
            st.just(dtype),
        ),
        WORKS,
    )
    @example(Code(simple(1), (1, 1), (1, 1), dtype=dtype), EVERYTHING)
    @example(Code(simple(4, split=2), (67, 300), (1, 3), Epilogue(bias=True), dtype), EVERYTHING)
    @example(Code(simple(3), (34, 50), (3, 2), dtype=dtype), EVERYTHING)
    @example(Code(simple(2, unroll=4), (75, 190), (37, 6), Epilogue(residual=True), dtype), EVERYTHING)
    def property_(code: Code, works: list[Work]) -> None:
        for work in works:
            check(code, work, opencl)

    property_()


@pytest.mark.parametrize("activation", Activation)
def test_every_activation(activation: Activation, opencl: OpenCl) -> None:
    alpha, beta = {Activation.CLIP: (-0.5, 0.7), Activation.LEAKY_RELU: (0.1, 0.0)}.get(activation, (1.0, 0.0))
    epilogue = Epilogue(activation, alpha, beta, bias=True, residual=True)
    check(Code(simple(2), (38, 24), (4, 4), epilogue), Work(7, 0.5), opencl)


@pytest.mark.parametrize(
    "code",
    [
        Code(simple(8, warps=4, unroll=4), (100, 300), (32, 1), Epilogue(bias=True), "float16"),
        Code(simple(8, warps=4, unroll=4, split=3), (128, 200), (64, 64), Epilogue(residual=True), "bfloat16"),
        Code(simple(8, warps=8), (20, 400), (1, 16), dtype="float16"),
        Code(simple(8, warps=4), (20, 397), (1, 16), dtype="bfloat16"),
        Code(simple(16, warps=8), (70, 90), (20, 2)),
        Code(simple(1, warps=16, split=2), (64, 700), (64, 1), Epilogue(Activation.GELU), "float16"),
    ],
    ids=str,
)
def test_large_tiles(code: Code, opencl: OpenCl) -> None:
    """The tiles that a GPU runs, with fewer rows, whole tiles and more."""
    for height in (1, 8, 13):
        check(code, Work(height, 0.3, dense_row=0, seed=height), opencl)


def with_dynamic_shared(source: str) -> tuple[str, int]:
    """The source with its arrays in dynamic shared memory, the only one that the emulator has; and their bytes."""
    pattern = re.compile(r"__shared__ alignas\(64\) float (\w+)\[(\d+)\];")
    size = 0
    for name, length in pattern.findall(source):
        first = "" if size else "extern __shared__ float arrays[];"
        source = pattern.sub(f"{first} float* {name} = arrays + {size};", source, count=1)
        size += int(length)
    return source, 4 * size


@pytest.mark.skipif(emulate.COMPILER is None, reason="needs g++, which runs CUDA sources on a CPU")
@pytest.mark.parametrize(
    "code",
    [
        Code(simple(4, unroll=4), (100, 300), (32, 1), Epilogue(bias=True), "float16"),
        Code(simple(2, warps=4), (128, 100), (64, 64), dtype="bfloat16"),
        Code(simple(2), (34, 51), (3, 2), Epilogue(residual=True)),
    ],
    ids=str,
)
def test_cuda_source_stays_within_its_arrays(code: Code) -> None:
    """Beyond each array is memory that traps; the warps take turns in the order that shows missing barriers."""
    source = translate(code.problem, code.schedule, TABLE["sm_80"])
    text, shared_bytes = with_dynamic_shared(source.text)
    for height in (1, 5):
        data = Data.random(code, Work(height, 0.3, seed=height))
        arrays = arrays_of(code, data)
        (launch,) = source.launches
        emulate.run(
            text,
            launch.entry,
            [height if name == "rows" else arrays[name] for name in launch.arguments],
            grid=launch.units * ceil(height / launch.tile_rows),
            threads=launch.threads,
            shared_bytes=shared_bytes,
            order=emulate.Order("falling"),
        )
        compare(code, data, arrays["y"])


def test_float16_beyond_its_range_is_infinite(opencl: OpenCl) -> None:
    """Sums are float32, and only the result is rounded."""
    code = Code(simple(1), (4, 64), (4, 1), dtype="float16")
    weight = np.full(code.shape, 1000, dtype=np.float32)
    weight[1, 32:] *= -1
    m = SparseMatrix.from_dense(weight, code.pattern, code.dtype)
    x, y = np.full((1, 64), 100, dtype=np.float16), np.zeros((1, 4), dtype=np.float16)
    arrays = {"x": x, "values": m.values, "indices": m.indices, "indptr": m.indptr, "y": y}
    opencl.compile(code.problem, code.schedule)(arrays, 1)
    assert y.tolist() == [[np.inf, 0, np.inf, np.inf]]


def test_obstacles() -> None:
    problem = Code(simple(1), (64, 64), (64, 1), dtype="float16").problem
    few, many, persistent = simple(1, warps=1), simple(32), replace(simple(1), blocks_per_sm=2)
    assert simt.obstacle(problem, few, "sm_80") == "1 warps are fewer threads than a panel's 64 outputs"
    assert simt.obstacle(problem, many, "sm_80") == (
        "334 registers for sums and loads, of 160 that a thread has for them"
    )
    assert "persistent" in simt.obstacle(problem, persistent, "sm_80")


# ---- Machine code ----

needs_compiler = pytest.mark.skipif(not find_cuda_compilers(), reason="needs a CUDA compiler: NVRTC or nvcc")
LARGE = Code(simple(1), (8192, 28672), (32, 1), Epilogue(Activation.GELU, bias=True), "float16")


@needs_compiler
@pytest.mark.parametrize("arch", TABLE)
def test_compiles_without_local_memory(arch: str) -> None:
    code = replace(LARGE, schedule=simple(2, warps=8, unroll=4, split=2))
    source = translate(code.problem, code.schedule, TABLE[arch])
    found = resources(compile_cuda(source.text, source.arch, "cubin"))
    assert sorted(found) == sorted(launch.entry for launch in source.launches)
    assert [function.stack_bytes for function in found.values()] == [0, 0]


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "tile_rows", "warps", "most"),
    [("float16", 1, 8, 80), ("bfloat16", 4, 8, 128), ("float16", 8, 4, 168), ("float32", 8, 8, 128)],
)
def test_registers_leave_room_for_enough_warps(dtype: str, tile_rows: int, warps: int, most: int) -> None:
    """What the thread blocks of one multiprocessor have on the way covers its latency (see the kernel's docstring)."""
    code = replace(LARGE, schedule=simple(tile_rows, warps, unroll=4), dtype=dtype)
    source = translate(code.problem, code.schedule, TABLE["sm_90a"])
    (found,) = resources(compile_cuda(source.text, source.arch, "cubin")).values()
    assert found.registers <= most
    assert found.stack_bytes == 0


@needs_compiler
@pytest.mark.parametrize(
    ("block", "dtype", "widest"),
    [
        ((32, 1), "float32", 16),
        ((32, 1), "float16", 16),
        ((64, 64), "bfloat16", 16),
        ((1, 16), "float16", 16),
        ((4, 4), "float16", 16),
        ((4, 1), "float16", 8),
        ((1, 1), "float32", 4),
    ],
    ids=str,
)
def test_widest_loads(block: tuple[int, int], dtype: str, widest: int) -> None:
    """Weights are read 16 bytes at a time where blocks allow it: 4 loads before the loop and 4 in it."""
    code = Code(simple(1, unroll=4), (256, 512), block, dtype=dtype)
    source = translate(code.problem, code.schedule, TABLE["sm_80"], "ptx")
    text = compile_cuda(source.text, source.arch, "ptx").decode()
    assert ".local" not in text
    assert not re.search(r"ld\.global\.(?!nc)", text), "X and weights are read through the read-only cache"
    loads = [
        int(lanes or 1) * int(bits) // 8 for lanes, bits in re.findall(r"ld\.global\.nc\.(?:v(\d)\.)?\w(\d+)", text)
    ]
    assert max(loads) == widest
    assert loads.count(widest) >= 8
