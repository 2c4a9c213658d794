"""The tensor-core kernel `mma`: its CUDA source executed on a CPU (see emulate.py), and what its machine code is."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import emulate
import numpy as np
import pytest
from emulate import Order
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from on_device import needs_gpu, run_variant
from test_simt import EPILOGUES, WORK, Code, Data, Work, expected

from sparsec.codegen.generate.cuda import Source, generate, translate
from sparsec.codegen.generate.nvrtc import compile_cuda, find_cuda_compilers, resources
from sparsec.codegen.kernels.gpu import mma
from sparsec.codegen.kernels.gpu.schedule import GpuSchedule
from sparsec.codegen.problem import Problem
from sparsec.codegen.target.cuda import TABLE, parse_cuda
from sparsec.ir import Activation, Epilogue
from sparsec.ir.sparse_matrix import panel_width
from sparsec.ir.values.floats import DTYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

needs_compiler = pytest.mark.skipif(emulate.COMPILER is None, reason="needs g++, which runs the kernels on a CPU")
needs_nvrtc = pytest.mark.skipif(not find_cuda_compilers(), reason="needs NVRTC (pip install 'sparsec[cuda]') or nvcc")
# Every way of the threads to take turns that is an extreme.
EXTREMES = [Order("rising", late=True), Order("falling", late=False), Order("falling", late=True)]


def simple(tile_rows: int, warps: int = 4, stages: int = 3) -> GpuSchedule:
    return GpuSchedule("mma", tile_rows, warps=warps, stages=stages)


# ---- Right results ----


def arrays_of(data: Data) -> dict[str, Array]:
    m = data.matrix
    rows, out = data.residual.shape
    return {
        "x": data.x,
        "values": m.values,
        "indices": m.indices,
        "indptr": m.indptr,
        "order": np.argsort(-np.diff(m.indptr), kind="stable").astype(np.int32),
        "bias": data.bias,
        "residual": data.residual,
        "y": np.full((rows, out), np.nan, dtype=data.x.dtype),
    }


@lru_cache(maxsize=64)
def source_of(problem: Problem, schedule: GpuSchedule) -> Source:
    return translate(problem, schedule, TABLE["sm_80"])


def run_emulated(problem: Problem, schedule: GpuSchedule, arrays: dict[str, Array], order: Order) -> Array:
    """Y, and a check that nothing else was changed."""
    source = source_of(problem, schedule)
    (launch,) = source.launches
    rows = len(arrays["x"])
    given_ = {name: array.copy() for name, array in arrays.items()} | {"rows": rows}
    emulate.run(
        source.text,
        launch.entry,
        [given_[name] for name in launch.arguments],
        grid=launch.units * -(-rows // launch.tile_rows),
        threads=launch.threads,
        shared_bytes=launch.shared_bytes,
        order=order,
    )
    for name, array in arrays.items():
        assert name == "y" or array.tobytes() == given_[name].tobytes(), f"{name} was changed"
    return given_["y"]


def check_sums(code: Code, data: Data, y: Array) -> None:
    """Every element of `y` is right for the dtype; TF32 rounds each operand by up to 2^-11 of it."""
    right, bound = expected(data, code.epilogue)
    if code.dtype == "float32":
        # No activation is steeper than 1.13.
        bound += 1.13 * 2**-10 * (np.abs(data.x) @ np.abs(data.matrix.to_dense()).T)
    wrong = ~(np.abs(y.astype(np.float64) - right) <= bound)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}"


def check(code: Code, work: Work, order: Order) -> None:
    data = Data.random(code, work)
    check_sums(code, data, run_emulated(code.problem, code.schedule, arrays_of(data), order))


# Outputs a block for which tensor cores are of use.
FIT = {dtype: [rows for rows in range(1, 200) if panel_width(rows, dtype) % 16 == 0] for dtype in DTYPES}
# Such a block that does not fill its panels.
RAGGED = {dtype: next(rows for rows in FIT[dtype] if rows % panel_width(rows, dtype)) for dtype in DTYPES}
SCHEDULES = st.builds(
    GpuSchedule,
    st.just("mma"),
    tile_rows=st.sampled_from((8, 16, 24, 32, 64, 128)),
    warps=st.sampled_from((1, 2, 4, 8)),
    stages=st.integers(2, 5),
)
ORDERS = st.builds(Order, st.sampled_from(("rising", "falling", "random")), st.booleans(), st.integers(0, 2**16))
RUNS = st.lists(st.tuples(WORK, ORDERS), min_size=4, max_size=5)
EVERYTHING = [
    (Work(height, density, seed=height), order)
    for height, density in ((1, 1.0), (3, 0.0), (9, 0.4), (40, 0.2))
    for order in EXTREMES
]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(dtype: str) -> None:
    """Any shape, block, schedule, epilogue, number of rows and density, in any order of the threads."""
    blocks = st.tuples(
        st.one_of(st.sampled_from((16, 32, 64, 128)), st.sampled_from(FIT[dtype])),
        st.one_of(st.sampled_from((1, 2, 4, 8, 16, 32)), st.integers(1, 40)),
    )
    # Sizes that allow vectors, and any.
    size = st.one_of(st.integers(2, 32).map(lambda n: 8 * n), st.integers(16, 260))

    @settings(max_examples=4, deadline=None, derandomize=True, database=None)
    @given(st.builds(Code, SCHEDULES, st.tuples(size, size), blocks, EPILOGUES, st.just(dtype)), RUNS)
    @example(Code(simple(8), (128, 256), (64, 8), Epilogue(bias=True), dtype), EVERYTHING)
    @example(Code(simple(32, 8, 4), (130, 259), (32, 1), Epilogue(bias=True, residual=True), dtype), EVERYTHING)
    @example(Code(simple(16, 2), (150, 60), (RAGGED[dtype], 3), dtype=dtype), EVERYTHING)
    @example(Code(simple(64, 4, 2), (256, 160), (128, 16), Epilogue(Activation.GELU), dtype), EVERYTHING)
    def property_(code: Code, runs: list[tuple[Work, Order]]) -> None:
        assume(not mma.obstacle(code.problem, code.schedule, "sm_80"))
        for work, order in runs:
            check(code, work, order)

    property_()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_inputs_beyond_the_edge_do_not_leak(dtype: str) -> None:
    """A NaN in a row of X stays in that row of Y, one in an input that no block keeps does not reach Y at all."""
    code = Code(simple(16), (64, 80), (32, 8), dtype=dtype)
    data = Data.random(code, Work(height=21, density=0.3, seed=0))
    right = run_emulated(code.problem, code.schedule, arrays_of(data), Order())
    kept = np.unique(data.matrix.indices[:, None] + np.arange(8))
    unused = np.setdiff1d(np.arange(80), kept)
    assert unused[0] == 0, "the input that is read where there is none"
    x = data.x.copy()
    x[:, unused] = np.nan
    x[20] = np.nan
    y = run_emulated(code.problem, code.schedule, arrays_of(replace(data, x=x)), Order())
    assert np.array_equal(y[:20], right[:20])
    assert np.isnan(y[20].astype(np.float32)).any()


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(16, 1), (32, 3), (64, 8), (128, 16)])
@pytest.mark.parametrize("tile_rows", [8, 32, 128])
def test_equals_float64_on_a_gpu(tile_rows: int, block: tuple[int, int], dtype: str) -> None:
    epilogue = Epilogue(Activation.SILU, alpha=1.5, bias=True, residual=True)
    code = Code(simple(tile_rows), (520, 1000), block, epilogue, dtype)
    data = Data.random(code, Work(height=150, density=0.2))
    variant = generate(code.problem, code.schedule, parse_cuda()[0])
    check_sums(code, data, run_variant(variant, arrays_of(data), 150))


# ---- Machine code ----


def dense_problem(block: tuple[int, int], dtype: str) -> Problem:
    return Problem(4096, 4096, block, panel_width(block[0], dtype), 0.1, Epilogue(Activation.GELU, bias=True), dtype)


@needs_nvrtc
@pytest.mark.parametrize("dtype", DTYPES)
def test_uses_tensor_cores_and_asynchronous_copies(dtype: str) -> None:
    source = translate(dense_problem((64, 16), dtype), simple(32), TABLE["sm_80"])
    ptx = compile_cuda(source.text, "compute_80", "ptx").decode()
    assert mma._MMA[dtype][0] in ptx
    assert "cp.async.cg.shared.global" in ptx
    assert "cp.async.ca.shared.global" in ptx
    assert "ldmatrix.sync.aligned.m8n8.x4.shared.b16" in ptx
    assert ("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in ptx) == (dtype != "float32")
    assert "st.global.v4" in ptx, "stores of 16 bytes"


@needs_nvrtc
@pytest.mark.parametrize("arch", TABLE)
def test_fits_the_registers_of_several_blocks(arch: str) -> None:
    """No local memory; 65,536 registers are enough for 6 thread blocks of few rows and 2 of many."""
    for block, dtype, schedule, blocks in (
        ((32, 1), "float16", simple(8, 4, 4), 6),
        ((32, 32), "float32", simple(16, 4), 6),
        ((128, 16), "bfloat16", simple(64, 8), 2),
    ):
        source = translate(dense_problem(block, dtype), schedule, TABLE[arch])
        (used,) = resources(compile_cuda(source.text, arch, "cubin")).values()
        assert used.stack_bytes == 0
        assert used.registers * 32 * schedule.warps * blocks <= 65536


def test_obstacles_say_why() -> None:
    fits = dense_problem((64, 16), "float16")
    assert not mma.obstacle(fits, simple(8), "sm_80")
    assert not mma.obstacle(fits, simple(8), "compute_90")
    small = replace(fits, block=(8, 1), panel=8)
    assert "panels of 8 outputs" in mma.obstacle(small, simple(8), "sm_80")
    assert "tiles of 12 rows" in mma.obstacle(fits, simple(12), "sm_80")
    assert "2 stages" in mma.obstacle(fits, simple(8, stages=1), "sm_80")
    assert "not persistent" in mma.obstacle(fits, replace(simple(8), blocks_per_sm=2), "sm_80")
    assert "3 warps cannot share" in mma.obstacle(fits, simple(8, warps=3), "sm_80")
    large = simple(256, 8, 5)
    assert "bytes of shared memory" in mma.obstacle(fits, large, "sm_86")
    assert not mma.obstacle(fits, large, "sm_90a")


# ---- The emulation notices what it says ----

COPY = """#define ushort unsigned short
#endif
__forceinline__ __device__ void copy(uint32_t __to, const void* __from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :  : "r"(__to), "l"(__from), "r"(16u) : "memory");
}
__forceinline__ __device__ void commit() {
  asm volatile("cp.async.commit_group;" :  : );
}
__forceinline__ __device__ void wait() {
  asm volatile("cp.async.wait_group 0;" :  :  : "memory");
}
"""


def reversed_by(body: str) -> None:
    """Run a kernel that should reverse the groups of four elements of x [256] by way of shared memory; check y."""
    source = f"""{COPY}
extern "C" __global__ void __launch_bounds__(64) reverse(float* __restrict__ x, float* __restrict__ y, int64_t n);
extern "C" __global__ void __launch_bounds__(64) reverse(float* __restrict__ x, float* __restrict__ y, int64_t n) {{
  extern __shared__ __align__(64) float shared[];
  int i = threadIdx.x * 4, j = 252 - i;
  {body}
}}
"""
    x = np.arange(256, dtype=np.float32)
    for order in EXTREMES:
        y = np.full(256, np.nan, dtype=np.float32)
        emulate.run(source, "reverse", [x, y, 256], grid=1, threads=64, shared_bytes=1024, order=order)
        assert np.array_equal(y.reshape(-1, 4), x.reshape(-1, 4)[::-1])


RIGHT = """copy(__cvta_generic_to_shared(shared + i), x + i); commit(); wait(); __syncthreads();
*(float4*)(y + i) = *(float4*)(shared + j);"""


@needs_compiler
def test_emulation_runs_a_right_kernel() -> None:
    reversed_by(RIGHT)


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("__syncthreads();", ""),
        ("wait();", ""),
        ("wait(); __syncthreads();", "__syncthreads(); wait();"),
        ("commit();", ""),
        ("x + i)", "x + i + 1)"),
        ("x + i)", "x + i + 256)"),
        ("shared + i)", "shared + i + 4)"),
        ("(y + i)", "(y + i + 1)"),
        ("(y + i)", "(y + i + 4)"),
        ("__syncthreads();", "if (i) __syncthreads();"),
        ("__syncthreads();", "__syncthreads(); if (threadIdx.x % 2) __syncwarp();"),
        ("__syncthreads();", "__syncthreads(); int big = 2147483647; j += big + i > 0;"),
    ],
)
def test_emulation_notices(right: str, wrong: str) -> None:
    assert right in RIGHT
    with pytest.raises(AssertionError):
        reversed_by(RIGHT.replace(right, wrong))


@needs_compiler
def test_emulation_refuses_what_it_does_not_know() -> None:
    source = COPY.replace("cp.async.commit_group", "nanosleep.u32 1") + 'extern "C" void g(int* p) { commit(); }'
    with pytest.raises(RuntimeError, match="nanosleep"):
        emulate.run(source, "g", [0], grid=1, threads=32, shared_bytes=0)
