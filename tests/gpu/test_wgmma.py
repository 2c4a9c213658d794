"""The Hopper kernel `wgmma`: its CUDA source executed on a CPU (see emulate_wgmma.py), and what its machine code is."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import emulate_wgmma as emulate
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from on_device import needs_gpu, run_variant
from test_simt import Code, Data, Work, expected

from sparsec.codegen.generate.cuda import generate, translate
from sparsec.codegen.generate.nvrtc import compile_cuda, find_cuda_compilers, resources
from sparsec.codegen.kernels.gpu import wgmma
from sparsec.codegen.kernels.gpu.schedule import GpuSchedule
from sparsec.codegen.problem import Problem
from sparsec.codegen.target.cuda import TABLE, parse_cuda
from sparsec.ir import Activation, Epilogue

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from sparsec.codegen.generate.cuda import Source

    Array = NDArray[Any]

SM_90A = TABLE["sm_90a"]
NVCC = shutil.which("nvcc")
needs_compiler = pytest.mark.skipif(emulate.COMPILER is None, reason="needs g++, which runs the kernels on a CPU")
needs_nvrtc = pytest.mark.skipif(not find_cuda_compilers(), reason="needs NVRTC (pip install 'sparsec[cuda]') or nvcc")


def simple(tile_rows: int, stages: int = 3) -> GpuSchedule:
    return GpuSchedule("wgmma", tile_rows, warps=12, stages=stages, blocks_per_sm=1)


# ---- Right results ----


def arrays_of(data: Data) -> dict[str, Array]:
    """The arguments; inputs that no block covers are not to be looked at."""
    m = data.matrix
    x = data.x.copy()
    x[:, np.setdiff1d(np.arange(x.shape[1]), m.indices[:, None] + np.arange(m.block[1]))] = np.nan
    return {
        "x": x,
        "values": m.values,
        "indices": m.indices,
        "indptr": m.indptr,
        "order": np.argsort(-np.diff(m.indptr), kind="stable").astype(np.int32),
        "bias": data.bias,
        "residual": data.residual,
        "y": np.full(data.residual.shape, np.nan, dtype=data.x.dtype),
    }


def run_emulated(source: Source, arrays: dict[str, Array], blocks: int, haste: str, seed: int) -> Array:
    """Y as `blocks` thread blocks compute it, and a check that nothing else was changed."""
    (launch,) = source.launches
    copies = {name: array.copy() for name, array in arrays.items()} | {"rows": len(arrays["x"])}
    emulate.run(
        source.text,
        launch.entry,
        [copies[name] for name in launch.arguments],
        grid=blocks,
        threads=launch.threads,
        shared_bytes=launch.shared_bytes,
        haste=haste,
        seed=seed,
    )
    for name, array in arrays.items():
        assert name == "y" or array.tobytes() == copies[name].tobytes(), f"{name} was changed"
    return copies["y"]


def check_sums(data: Data, epilogue: Epilogue, y: Array) -> None:
    right, bound = expected(data, epilogue)
    wrong = ~(np.abs(y.astype(np.float64) - right) <= bound)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}"


BOTH = Epilogue(bias=True, residual=True)
CODES = {
    # Two panels: the consumers share X. The last block of inputs is moved back, the last block row sticks out.
    "two panels": Code(simple(64), (256, 208), (128, 16), BOTH, "float16"),
    "wide blocks": Code(simple(256, 4), (128, 320), (128, 96), Epilogue(Activation.RELU), "bfloat16"),
    "four panels": Code(simple(192), (512, 136), (256, 32), Epilogue(bias=True), "float16"),
    "edge": Code(simple(128, 5), (200, 152), (128, 48), Epilogue(Activation.SILU, 1.5, bias=True), "bfloat16"),
    # One panel, or three: the consumers share W.
    "one panel": Code(simple(128), (192, 200), (64, 48), BOTH, "bfloat16"),
    "three panels": Code(simple(384), (264, 256), (192, 16), Epilogue(Activation.GELU, residual=True), "float16"),
}
WORK = st.builds(
    Work,
    height=st.integers(1, 700),
    density=st.sampled_from((0.0, 0.05, 0.2, 0.6, 1.0)),
    dense_row=st.one_of(st.none(), st.integers(0, 100)),
    seed=st.integers(0, 2**16),
)


@needs_compiler
@pytest.mark.parametrize("name", CODES)
def test_equals_float64(name: str) -> None:
    """Any number of rows, any weight, any number of thread blocks, in any order of what happens."""
    code = CODES[name]
    assert not wgmma.obstacle(code.problem, code.schedule, "sm_90a")
    source = translate(code.problem, code.schedule, SM_90A)

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(WORK, st.integers(1, 5), st.sampled_from(emulate.HASTE))
    @example(Work(1, 0.0), 2, "late")
    @example(Work(65, 0.3, dense_row=0), 1, "late")
    @example(Work(700, 0.5), 2, "soon")
    @example(Work(384, 1.0), 3, "late")
    def property_(work: Work, blocks: int, haste: str) -> None:
        data = Data.random(code, work)
        check_sums(data, code.epilogue, run_emulated(source, arrays_of(data), blocks, haste, work.seed))

    property_()


@needs_compiler
@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_groups_of_tiles(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a group has, and a last group that is not full."""
    code = CODES["two panels"]
    monkeypatch.setattr(wgmma, "_GROUP_BYTES", 2 * 64 * 208 * 2)
    source = translate(code.problem, code.schedule, SM_90A)
    data = Data.random(code, Work(height=270, density=0.2, dense_row=1))
    check_sums(data, code.epilogue, run_emulated(source, arrays_of(data), blocks, "random", 1))


@needs_compiler
def test_rows_stay_apart() -> None:
    """A NaN in a row of X stays in that row of Y."""
    code = CODES["two panels"]
    source = translate(code.problem, code.schedule, SM_90A)
    data = Data.random(code, Work(height=70, density=0.5))
    right = run_emulated(source, arrays_of(data), 1, "late", 0)
    data.x[69] = np.nan
    y = run_emulated(source, arrays_of(data), 1, "late", 0)
    assert y[:69].tobytes() == right[:69].tobytes()
    assert np.isnan(y[69].astype(np.float32)).all()


@needs_gpu
@pytest.mark.parametrize("rows", [1, 64, 1000, 4096])
@pytest.mark.parametrize("name", CODES)
def test_equals_float64_on_a_gpu(name: str, rows: int) -> None:
    code, (target, *_) = CODES[name], parse_cuda()
    if target.arch != "sm_90a":
        pytest.skip("needs a Hopper GPU")
    data = Data.random(code, Work(rows, 0.3, dense_row=0))
    variant = generate(code.problem, code.schedule, target)
    check_sums(data, code.epilogue, run_variant(variant, arrays_of(data), rows))


# ---- Wrong kernels are noticed ----

HELPER = "tvm_builtin_(?:ptx|cuda)_"
# What is done to the source, as regular expression and replacement, and what notices it: a message of the emulation, or
# "wrong" results.
MUTATIONS = {
    "no wait for an empty stage": (rf"{HELPER}mbarrier_wait_raw_u32\([^;]*\^ 1\)\);", ";", "barrier|wrong"),
    "parity of an empty stage": (r" \^ 1\)\);", "));", "deadlock"),
    "no wait for a full stage": (rf"{HELPER}mbarrier_wait_raw_u32\((?!unsigned)[^;]*\[0\]\);", ";", "fence|wrong"),
    "a stage given back before it is used up": (rf"{HELPER}wgmma_wait_group_\w*_1\(\);", ";", "wrong"),
    "sums read before they are ready": (rf"{HELPER}wgmma_wait_group_\w*_0\(\);", ";", "wrong|ends before"),
    "no fence between the proxies": (rf"{HELPER}fence_proxy_\w*\(\);", ";", "no fence between"),
    "no fence of the sums": (rf"{HELPER}wgmma_fence_\w*\(\);", ";", "no wgmma.fence"),
    "an arrival too few": (r"\(uint\)129\)", "(uint)130)", "deadlock"),
    "an arrival too many": (r"\(uint\)8\)", "(uint)7)", "too many|wrong"),
    "bytes of one panel": (r"\* \(uint\)2\)", "* (uint)1)", "more bytes|wrong"),
    "X not swizzled": (
        re.escape("(((((int)threadIdx.x) % 8) ^ ((((int)threadIdx.x) % 64) / 8)) * 16)") + r"(?=\) \+ 16384)",
        "((((int)threadIdx.x) % 8) * 16)",
        "wrong",
    ),
    "distance of atoms": (r"4611686293305360384", "4611686568183267328", "wrong"),
    "no barrier around the transposition": (rf"{HELPER}warpgroup_sync\((?!int)[^;]*\);", ";", "wrong"),
    "rows beyond the end": (r"_ptr_\d+\[0\] < _ptr_9\[0\]", "true", "outside the arrays"),
}


@pytest.fixture(scope="module")
def correct() -> tuple[Source, Data]:
    code = CODES["two panels"]
    return translate(code.problem, code.schedule, SM_90A), Data.random(code, Work(height=330, density=0.6, dense_row=0))


@needs_compiler
@pytest.mark.parametrize("name", MUTATIONS)
def test_emulation_notices(name: str, correct: tuple[Source, Data]) -> None:
    source, data = correct
    pattern, replacement, message = MUTATIONS[name]
    # Only in the kernel, not in the helpers before it.
    head, kernel, body = source.text.rpartition('extern "C" __global__')
    changed, count = re.subn(pattern, replacement, body)
    assert count, "the source has changed: so must the pattern"
    wrong = replace(source, text=head + kernel + changed)

    def all_orders() -> None:
        for seed in range(6):
            for haste in emulate.HASTE:
                check_sums(data, BOTH, run_emulated(wrong, arrays_of(data), 1, haste, seed))

    with pytest.raises(AssertionError, match=message):
        all_orders()


# ---- Machine code ----


def large(block: tuple[int, int], dtype: str, epilogue: Epilogue = BOTH, out: int = 8192) -> Problem:
    return Problem(8192, out, block, 64, 0.3, epilogue, dtype)


@needs_nvrtc
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_instructions(dtype: str) -> None:
    source = translate(large((128, 16), dtype), simple(256, 4), SM_90A)
    ptx = compile_cuda(source.text, "compute_90a", "ptx").decode()
    name = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    assert f"wgmma.mma_async.sync.aligned.m64n256k16.f32.{name}.{name}" in ptx
    # Scales of 1, A transposed, B not.
    assert set(re.findall(r"ps0, ([-\d, ]+); }", ptx)) == {"1, 1, 1, 0"}
    for instruction in (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
        "cp.async.cg.shared.global.L2::128B",
        "cp.async.mbarrier.arrive.noinc.shared.b64",
        "mbarrier.try_wait.parity",
        "fence.proxy.async.shared::cta",
        "setmaxnreg.dec.sync.aligned.u32 40",
        "setmaxnreg.inc.sync.aligned.u32 232",
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    ):
        assert instruction in ptx


LARGE = [
    (large((128, 16), "float16"), simple(256, 4)),
    (large((128, 64), "bfloat16", Epilogue(Activation.GELU, bias=True), 8200), simple(256, 4)),
    (large((64, 16), "float16", Epilogue(Activation.SILU, 1.0)), simple(384)),
]


@needs_nvrtc
@pytest.mark.parametrize(("problem", "schedule"), LARGE)
def test_nothing_is_spilled(problem: Problem, schedule: GpuSchedule) -> None:
    assert not wgmma.obstacle(problem, schedule, "sm_90a")
    source = translate(problem, schedule, SM_90A)
    (used,) = resources(compile_cuda(source.text, "sm_90a", "cubin")).values()
    assert used.stack_bytes == 0
    # The threads start with equal shares of the 65,536 registers.
    assert used.registers == 168


@pytest.mark.skipif(NVCC is None, reason="needs nvcc, which says what ptxas does to wgmma")
@pytest.mark.parametrize(("problem", "schedule"), LARGE)
def test_products_are_not_serialised(problem: Problem, schedule: GpuSchedule, tmp_path: Path) -> None:
    """No C7508 (setmaxnreg ignored), C7510 (wgmma serialised), C7519 (synchronisation added), nor any other warning."""
    (tmp_path / "kernel.cu").write_text(translate(problem, schedule, SM_90A).text)
    done = subprocess.run(
        [str(NVCC), "-arch=sm_90a", "--prec-div=false", "-w", "-Xptxas=-v", "-cubin", "kernel.cu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Used 168 registers" in done.stderr
    assert "(C7" not in done.stderr
    assert "warning" not in done.stderr


def test_obstacles_say_why() -> None:
    fits, schedule = large((128, 16), "float16"), simple(256, 4)

    def obstacle(problem: Problem = fits, schedule: GpuSchedule = schedule, arch: str = "sm_90a") -> str:
        return wgmma.obstacle(problem, schedule, arch)

    assert not obstacle()
    assert not obstacle(replace(fits, block=(64, 16)), simple(384))
    assert "sm_80 has no wgmma" in obstacle(arch="sm_80")
    assert "compute_90 has no wgmma" in obstacle(arch="compute_90")
    assert "16-bit values, not float32" in obstacle(replace(fits, dtype="float32", panel=32))
    assert "not 32x16" in obstacle(replace(fits, block=(32, 16), panel=32))
    assert "not 128x8" in obstacle(replace(fits, block=(128, 8)))
    assert "8188 inputs" in obstacle(replace(fits, in_features=8188))
    assert "12 warps" in obstacle(schedule=replace(schedule, warps=8))
    assert "persistent" in obstacle(schedule=replace(schedule, blocks_per_sm=0))
    assert "512 rows of X a warpgroup" in obstacle(schedule=simple(512))
    assert "32 rows of X a warpgroup" in obstacle(replace(fits, block=(64, 16)), simple(64))
    assert "2 stages" in obstacle(schedule=simple(128, 2))
    assert "bytes of shared memory" in obstacle(schedule=simple(256, 5))
