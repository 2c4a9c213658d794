"""What is asked of the CUDA driver, and what measuring makes of the answers; on a driver without a GPU."""

from __future__ import annotations

import ctypes
import gc
import math
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import ARGUMENTS, COMPILER, Fake, build, installed, numpy_kernel, variant
from hypothesis import given, settings
from hypothesis import strategies as st
from on_device import needs_gpu, run_variant

from sparsec.codegen.kernel import ANY_ROWS, CudaVariant, Launch
from sparsec.codegen.problem import Problem
from sparsec.codegen.tune.gpu import device, measure
from sparsec.codegen.tune.gpu.device import gpu_count, grid, open_device
from sparsec.ir import Activation, BlockPattern, Epilogue, SparsecError, SparseMatrix
from sparsec.ir.sparse_matrix import panel_width
from sparsec.ir.values.floats import DTYPES

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def fake(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    with installed(library, monkeypatch) as fake:
        yield fake


def two_launches() -> CudaVariant:
    """A split kernel: the second launch adds up, is persistent and takes its arguments in another order."""
    launches = (
        Launch("first", ("rows", "x", "workspace"), units=3, tile_rows=8, threads=128, shared_bytes=64 << 10),
        Launch("second", ("workspace", "y", "rows"), units=7, tile_rows=4, threads=256, blocks_per_sm=2),
    )
    return CudaVariant("split", "sm_90a", ANY_ROWS, launches, workspace=5, image=b"\x7fELF")


# ---- The driver ----


def test_no_driver_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(device.ctypes, "CDLL", missing)
    device._driver.cache_clear()
    assert gpu_count() == 0
    with pytest.raises(SparsecError, match=r"no NVIDIA driver .*libcuda.so.1.*run on a machine with a GPU"):
        device._driver()
    device._driver.cache_clear()


def test_a_device_is_what_the_driver_says(fake: Fake) -> None:
    gpu = open_device()
    assert gpu_count() == 1
    assert (gpu.name, gpu.capability, gpu.sms, gpu.l2_bytes, gpu.shared_bytes) == (
        "Fake GPU",
        (9, 0),
        10,
        1 << 20,
        232448,
    )
    assert gpu.driver_version == (13, 2)
    assert open_device() is gpu
    assert fake.calls("cuDevicePrimaryCtxRetain", "cuStreamCreate") == [
        "cuDevicePrimaryCtxRetain 0",
        "cuStreamCreate 1",
    ]
    # The context is made this thread's at every opening: another library may have chosen its own since.
    assert len(fake.calls("cuCtxSetCurrent")) == 3
    with pytest.raises(SparsecError, match=r"GPU 1 .*opening it failed: unknown error \(some other error\)"):
        open_device(1)


def test_arrays_go_there_and_back(fake: Fake) -> None:
    gpu = open_device()
    array = np.arange(24, dtype=DTYPES["bfloat16"]).reshape(4, 6).T
    buffer = gpu.upload(array)
    assert np.array_equal(buffer.read(array.dtype, array.shape), array)
    twin = gpu.allocate(buffer.nbytes)
    twin.fill(0xFF)
    assert np.isnan(twin.read(array.dtype, (24,)).astype(np.float32)).all()
    twin.copy(buffer)
    assert np.array_equal(twin.read(array.dtype, array.shape), array)
    with pytest.raises(ValueError, match="46 bytes for a buffer of 48"):
        buffer.write(np.zeros(23, dtype=np.float16))
    with pytest.raises(ValueError, match="50 bytes from a buffer of 48"):
        buffer.read(np.dtype(np.float16), (25,))


def test_nothing_is_ever_enqueued_elsewhere_than_on_the_own_stream(fake: Fake) -> None:
    gpu = open_device()
    buffer = gpu.upload(np.zeros(3))
    buffer.fill(1)
    gpu.event().record()
    buffer.read(np.dtype(np.uint8), (24,))
    names = ("cuMemcpyHtoDAsync_v2", "cuMemsetD8Async", "cuEventRecord", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize")
    assert {line.split()[-1] for line in fake.calls(*names)} == {"0x57"}


def test_launches_in_order_with_their_arguments(fake: Fake) -> None:
    seen = []

    def launched(entry: bytes, blocks: int, threads: int, shared: int, arguments: Any) -> None:
        values = [ctypes.c_uint64.from_address(arguments[i]).value for i in range(3)]
        seen.append((entry.decode(), blocks, threads, shared, values))

    fake.on_launch(launched)
    gpu = open_device()
    program = gpu.load(two_launches())
    buffers = {name: gpu.allocate(16) for name in ("x", "y", "workspace")}
    x, y, workspace = (buffers[name].address for name in ("x", "y", "workspace"))
    program(buffers, 17)
    # 3 * ceil(17 / 8); 7 * ceil(17 / 4) is more than 2 for each of 10 multiprocessors.
    assert seen == [
        ("first", 9, 128, 64 << 10, [17, x, workspace]),
        ("second", 20, 256, 0, [workspace, y, 17]),
    ]
    assert fake.calls("cuLaunchKernel") == [
        f"cuLaunchKernel first 9,1,1 128,1,1 {64 << 10} 0x57 (nil)",
        "cuLaunchKernel second 20,1,1 256,1,1 0 0x57 (nil)",
    ]
    assert program.workspace(17) == 4 * 5 * 24


def test_rows_are_64_bits(fake: Fake) -> None:
    seen = []
    fake.on_launch(lambda *a: seen.append(ctypes.c_int64.from_address(a[4][0]).value))
    gpu = open_device()
    launch = Launch("long", ("rows",), units=1, tile_rows=1, threads=32, blocks_per_sm=1)
    gpu.load(CudaVariant("long", "sm_90a", ANY_ROWS, (launch,), 0, b"x"))({}, (1 << 40) + 3)
    assert seen == [(1 << 40) + 3]


@pytest.mark.parametrize(
    ("rows", "per_sm", "blocks"), [(1, 0, 6), (16, 0, 6), (17, 0, 12), (1, 1, 6), (17, 1, 10), (4096, 3, 30)]
)
def test_grid(rows: int, per_sm: int, blocks: int) -> None:
    assert grid(Launch("f", (), units=6, tile_rows=16, threads=1, blocks_per_sm=per_sm), rows, sms=10) == blocks


def test_much_shared_memory_is_asked_for_before_the_launch(fake: Fake) -> None:
    open_device().load(two_launches())
    calls = fake.calls("cuModuleGetFunction", "cuFuncSetAttribute")
    assert calls == [
        "cuModuleGetFunction first",
        f"cuFuncSetAttribute first 8 {64 << 10}",
        "cuModuleGetFunction second",
    ]


def test_all_is_given_back(fake: Fake) -> None:
    gpu = open_device()
    things = [gpu.upload(np.ones(5)), gpu.load(two_launches()), gpu.event()]
    assert [fake.count(what) for what in ("allocated", "modules", "events")] == [1, 1, 1]
    del things
    assert [fake.count(what) for what in ("allocated", "modules", "events")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        (
            "cuMemAlloc_v2",
            2,
            r"GPU 0 \(Fake GPU\): allocating 40 bytes failed: CUDA_ERROR_OUT_OF_MEMORY \(out of memory\)",
        ),
        ("cuMemcpyHtoDAsync_v2", 700, "copying to it failed: CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("cuModuleLoadData", 209, "loading kernel 'split' for sm_90a failed: CUDA_ERROR_NO_BINARY_FOR_GPU"),
        ("cuModuleGetFunction", 500, "finding 'first' in kernel 'split' failed: unknown error"),
        ("cuFuncSetAttribute", 1, "giving kernel 'first' 65,536 bytes of shared memory a thread block failed"),
        ("cuLaunchKernel", 1, "launching 'first' failed"),
        ("cuEventCreate", 2, "making an event failed"),
        ("cuStreamSynchronize", 700, "running kernels failed: CUDA_ERROR_ILLEGAL_ADDRESS"),
    ],
)
def test_a_failure_is_a_sentence_and_leaves_nothing_behind(fake: Fake, function: str, code: int, words: str) -> None:
    gpu = open_device()

    def everything() -> None:
        x = gpu.upload(np.ones(5))
        gpu.load(two_launches())({"x": x, "y": x, "workspace": x}, 3)
        gpu.event()
        gpu.synchronize()

    fake.fail(function, code)
    with pytest.raises(SparsecError, match=words):
        everything()
    gc.collect()
    assert [fake.count(what) for what in ("allocated", "modules", "events")] == [0, 0, 0]


def test_a_gpu_machine_needs_neither_tvm_nor_onnx() -> None:
    code = (
        "import sys\n"
        "for name in ('tvm', 'onnx', 'onnx_ir', 'onnxruntime', 'torch'): sys.modules[name] = None\n"
        "import sparsec.codegen.tune.gpu.device, sparsec.codegen.tune.gpu.measure\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import gpu\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "benchmarks")]
    done = subprocess.run(command, cwd=ROOT / ".typing", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- Measuring ----

SMALL = Problem(70, 50, (16, 4), 16, 0.4, Epilogue(Activation.RELU, bias=True), "float16")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Blocks that divide the matrix and ones that do not, in all dtypes."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    inputs, out = draw(st.integers(1, 90)), draw(st.integers(1, 200))
    rows = min(draw(st.sampled_from((1, 3, 16, 32, 64, 128))), out)
    cols = min(draw(st.sampled_from((1, 4, 16))), inputs)
    return Problem(inputs, out, (rows, cols), panel_width(rows, dtype), draw(st.floats(0.01, 1)), dtype=dtype)


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(problems())
def test_random_weights_are_packed_as_any_other(problem: Problem) -> None:
    """And the reference, which has its own way through the packed format, agrees with the unpacked weight."""
    matrix = measure.random_matrix(problem)
    dense = matrix.to_dense()
    again = SparseMatrix.from_dense(dense, BlockPattern(*problem.block), problem.dtype)
    assert matrix.blocks == max(1, round(problem.density * problem.block_rows * problem.block_cols))
    assert np.array_equal(again.indices, matrix.indices) and np.array_equal(again.indptr, matrix.indptr)
    assert np.array_equal(again.values, matrix.values)
    x = np.random.default_rng(1).standard_normal((3, problem.in_features))
    np.testing.assert_allclose(measure.product(x, matrix), x @ dense.T.astype(np.float64), rtol=1e-12, atol=1e-12)


def test_activations_are_onnx_ones() -> None:
    """Against values worked out by hand from the formulas of ONNX's operators."""
    z = np.array([-2.0, 0.5, 3.0])
    for epilogue, expected in (
        (Epilogue(Activation.NONE), [-2, 0.5, 3]),
        (Epilogue(Activation.RELU), [0, 0.5, 3]),
        (Epilogue(Activation.CLIP, -1, 2), [-1, 0.5, 2]),
        (Epilogue(Activation.LEAKY_RELU, 0.1), [-0.2, 0.5, 3]),
        (Epilogue(Activation.SIGMOID), [0.1192029, 0.6224593, 0.9525741]),
        (Epilogue(Activation.TANH), [-0.9640276, 0.4621172, 0.9950548]),
        (Epilogue(Activation.GELU), [-0.0455003, 0.3457312, 2.9959503]),
        (Epilogue(Activation.GELU_TANH), [-0.0454023, 0.3457140, 2.9963627]),
        (Epilogue(Activation.SILU, 1), [-0.2384058, 0.3112297, 2.8577224]),
    ):
        np.testing.assert_allclose(measure.activated(z, epilogue), expected, rtol=0, atol=1e-7, err_msg=str(epilogue))


def test_a_right_kernel_has_its_time(fake: Fake) -> None:
    fake.on_launch(numpy_kernel(SMALL))
    # The clock of the fake driver: a microsecond for the launch and one for the second event.
    assert measure.measure(SMALL, variant(SMALL), 33, 0) == pytest.approx(2e-6, rel=1e-3)


def nan(y: Any) -> None:
    y[-1, 17] = math.nan


def far(y: Any) -> None:
    y[7] += 0.1 * np.abs(y).max()


@pytest.mark.parametrize("spoil", [nan, far, None], ids=["one NaN", "one row off", "nothing written"])
def test_a_wrong_kernel_has_none(fake: Fake, spoil: Any) -> None:
    fake.on_launch(numpy_kernel(SMALL, spoil) if spoil else lambda *_: None)
    with pytest.raises(SparsecError, match=r"kernel 'right' is wrong for 33 rows .* expected at most 0.00098"):
        measure.measure(SMALL, variant(SMALL), 33, 0)


def test_a_nan_in_a_row_that_is_not_compared_is_seen(fake: Fake) -> None:
    def spoil(y: Any) -> None:
        y[1, 0] = math.nan

    fake.on_launch(numpy_kernel(SMALL, spoil))
    with pytest.raises(SparsecError, match="relative error nan"):
        measure.measure(SMALL, variant(SMALL), 1000, 0)


@pytest.mark.parametrize("rows", [1, 255, 256, 512, 777, 4096, 65536])
@pytest.mark.parametrize("tile", [1, 8, 64, 128, 256])
def test_every_place_of_a_tile_is_compared(fake: Fake, rows: int, tile: int) -> None:
    compared = measure.Workload(Problem(4, 4, (4, 1), 4, 1.0), open_device())._inputs(rows).compared
    assert compared[0] == 0 and compared[-1] == rows - 1 and min(rows, 256) <= len(compared) < 768
    assert np.array_equal(np.unique(compared % tile), np.arange(min(tile, rows)))


def test_tolerance_is_that_of_the_dtype() -> None:
    limits = {dtype: measure.tolerance(Problem(4096, 8, (8, 1), 8, 0.1, dtype=dtype)) for dtype in DTYPES}
    assert limits["float32"] < 1e-5 < 9e-4 < limits["float16"] < 1e-3 < limits["bfloat16"] < 1e-2
    assert measure.tolerance(Problem(4096, 8, (8, 1), 8, 0.1), tf32=True) < 5e-3


def test_sides_take_turns_on_an_empty_cache(fake: Fake) -> None:
    gpu = open_device()
    launches = [Launch(name, (), units=1, tile_rows=1, threads=1) for name in "ab"]
    programs = [gpu.load(CudaVariant(x.entry, "sm_90a", ANY_ROWS, (x,), 0, b"x")) for x in launches]
    calls = [lambda p=p: p({}, 1) for p in programs]
    times = measure.alternate(gpu, calls, seconds=0)
    assert times.shape == (5, 2) and (times > 0).all()
    order = [line.split()[1] for line in fake.calls("cuLaunchKernel")]
    # Each has run once for warming up, and before every other run stands a sweep.
    assert order[:2] == ["a", "b"]
    assert all(before == "sweep" for before, name in pairwise(order[1:]) if name != "sweep")
    assert [name for name in order if name != "sweep"] == [*"ab", *"ab", *"ab", *"ba", *"ab", *"ba", *"ab"]
    sizes = [int(line.split()[1]) for line in fake.calls("cuMemAlloc_v2")]
    assert 2 * gpu.l2_bytes in sizes


def test_the_last_workload_is_kept_and_no_other(fake: Fake) -> None:
    fake.on_launch(numpy_kernel(SMALL))
    measure.measure(SMALL, variant(SMALL), 3, 0)
    uploads = len(fake.calls("cuMemcpyHtoDAsync_v2"))
    measure.measure(SMALL, variant(SMALL), 3, 0)
    assert len(fake.calls("cuMemcpyHtoDAsync_v2")) == uploads
    before = fake.count("allocated")
    other = Problem(60, 50, (16, 4), 16, 0.4, Epilogue(Activation.RELU, bias=True), "float16")
    fake.on_launch(numpy_kernel(other))
    measure.measure(other, variant(other), 3, 0)
    gc.collect()
    assert fake.count("allocated") == before


# ---- Kernels run by other tests ----


def arrays_of(problem: Problem, rows: int) -> dict[str, Any]:
    matrix, rng = measure.random_matrix(problem), np.random.default_rng(3)
    dtype = DTYPES[problem.dtype]
    return {
        "x": rng.standard_normal((rows, problem.in_features)).astype(dtype),
        "values": matrix.values,
        "indices": matrix.indices,
        "indptr": matrix.indptr,
        "bias": rng.standard_normal(problem.out_features).astype(dtype),
        "y": np.empty((rows, problem.out_features), dtype),
    }


def test_run_variant_gives_what_the_kernel_wrote(fake: Fake) -> None:
    fake.on_launch(numpy_kernel(SMALL, nan))
    arrays = arrays_of(SMALL, 5)
    y = run_variant(variant(SMALL), arrays, 5)
    z = measure.product(arrays["x"].astype(np.float64), measure.random_matrix(SMALL)) + arrays["bias"].astype(
        np.float64
    )
    assert np.isnan(y[-1, 17]) and np.isnan(y).sum() == 1
    assert np.array_equal(y[:-1], np.maximum(z, 0).astype(np.float16)[:-1])


@pytest.mark.parametrize(
    ("name", "offset", "words"),
    [("y", -1, "written before y"), ("y", 500, "written after y"), ("bias", 3, "bias was changed")],
)
def test_run_variant_sees_every_other_write(fake: Fake, name: str, offset: int, words: str) -> None:
    def spill(entry: bytes, blocks: int, threads: int, shared: int, arguments: Any) -> None:
        ctypes.memset(ctypes.c_int64.from_address(arguments[ARGUMENTS.index(name)]).value + offset, 0, 1)

    fake.on_launch(spill)
    with pytest.raises(AssertionError, match=words):
        run_variant(variant(SMALL), arrays_of(SMALL, 5), 5)


# y[i] = 2 x[i] for i < rows: a thread an element.
TWICE = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry twice(.param .u64 y, .param .s64 rows, .param .u64 x)
{
    .reg .pred %p1;
    .reg .b32 %r<4>;
    .reg .b64 %rd<7>;
    .reg .f32 %f1;
    ld.param.u64 %rd1, [y];
    ld.param.s64 %rd2, [rows];
    ld.param.u64 %rd3, [x];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.u32 %r1, %r1, %r2, %r3;
    cvt.u64.u32 %rd4, %r1;
    setp.ge.s64 %p1, %rd4, %rd2;
    @%p1 bra done;
    shl.b64 %rd4, %rd4, 2;
    add.s64 %rd5, %rd3, %rd4;
    add.s64 %rd6, %rd1, %rd4;
    ld.global.f32 %f1, [%rd5];
    add.f32 %f1, %f1, %f1;
    st.global.f32 [%rd6], %f1;
done:
    ret;
}
\0"""


@needs_gpu
def test_a_real_gpu_runs_and_times_a_kernel() -> None:
    launch = Launch("twice", ("y", "rows", "x"), units=1, tile_rows=128, threads=128)
    twice = CudaVariant("twice", "compute_70", ANY_ROWS, (launch,), 0, TWICE)
    x, indptr = np.arange(1000, dtype=np.float32), np.zeros(1, np.int32)
    assert np.array_equal(run_variant(twice, {"x": x, "indptr": indptr, "y": np.empty_like(x)}, 1000), 2 * x)
    gpu = open_device()
    source, target = gpu.allocate(1 << 28), gpu.allocate(1 << 28)
    small, large = np.median(measure.alternate(gpu, [lambda: None, lambda: target.copy(source)]), axis=0)
    # Between an empty stretch and 256 MiB read and written lie orders of magnitude on every GPU.
    assert 0 <= small < 20e-6 < large < 0.1
