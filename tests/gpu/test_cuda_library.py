"""The custom-op library's nodes of the CUDA provider, without a GPU: `libcuda_double.c` stands for NVIDIA's driver.

`cuda_node_harness.c` stands for ONNX Runtime where a test is about what the node asks of the two; where it is about
results, ONNX Runtime itself runs the node, on its CPU provider, and the double multiplies.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from sparsec.codegen.kernel import ANY_ROWS, CUDA_ARGUMENTS, CpuVariant, CudaVariant, Kernel, Launch
from sparsec.codegen.ort import library
from sparsec.codegen.ort.library import build_library, find_compiler
from sparsec.ir import Activation, BlockPattern, Epilogue, SparseMatrix

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent
SOURCES = Path(library.__file__).parent

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
ANY_DEVICE = {"FAKE_CUDA_ARCH": "90"}

# The harness's addresses.
X, VALUES, BIAS, RESIDUAL, Y, SCRATCH = (i * 0x10000 for i in range(2, 8))
STREAM = "0x10000"

IMAGE = b"small 9\nlarge 10\nreduce 3\nproduct 10\n\0"
# The CPU variant of kernels that run on the CUDA provider only.
UNUSED = "int __tvm_ffi_unused(void *self, const void *a, int count, void *result) { return 1; }"
# y [rows, 50] = relu(x [rows, 40] W + bias), W in blocks of 8x3 of one panel each, whatever panels are asked for.
PRODUCT = """
#include <stdint.h>
typedef struct { int64_t type; union { int64_t integer; void *pointer; } as; } Value;
int __tvm_ffi_product(void *self, const Value *a, int32_t count, Value *result) {
    const float *x = a[0].as.pointer, *values = a[1].as.pointer, *bias = a[6].as.pointer;
    const int32_t *indices = a[2].as.pointer, *indptr = a[3].as.pointer;
    float *y = a[8].as.pointer;
    for (int64_t row = a[11].as.integer; row < a[12].as.integer; row++)
        for (int64_t i = 0; i < 50; i++) {
            float sum = bias[i];
            for (int32_t t = indptr[i / 8]; t < indptr[i / 8 + 1]; t++)
                for (int64_t c = 0; c < 3; c++)
                    sum += x[row * 40 + indices[t] + c] * values[(t * 3 + c) * PANEL + i % 8];
            y[row * 50 + i] = sum > 0 ? sum : 0;
        }
    return 0;
}
"""


def launch(entry: str = "product", **changes: Any) -> Launch:
    return replace(Launch(entry, CUDA_ARGUMENTS, units=3, tile_rows=8, threads=128), **changes)


def variant(arch: str = "sm_90", *launches: Launch, **changes: Any) -> CudaVariant:
    symbol = changes.pop("symbol", f"plain_{arch}")
    return replace(CudaVariant(symbol, arch, ANY_ROWS, launches or (launch(),), 0, IMAGE), **changes)


def c_object(source: str, folder: Path) -> bytes:
    command = [*find_compiler(), "-c", "-O1", "-fPIC", "-x", "c", "-", "-o", str(folder / "code.o")]
    subprocess.run(command, input=source, text=True, check=True)
    return (folder / "code.o").read_bytes()


@cache
def unused() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return c_object(UNUSED, Path(folder))


def kernel(*cuda: CudaVariant, dtype: str = "float32", residual: bool = False) -> Kernel:
    """The kernel of the harness's weight."""
    cpu = (CpuVariant("unused", ANY_ROWS, 1, 0, 1, unused()),) if dtype == "float32" else ()
    epilogue = Epilogue(Activation.RELU, bias=True, residual=residual)
    return Kernel("plain", 8, 6, (2, 2), 2, epilogue, cpu, cuda or (variant(),), dtype)


# ---- The doubles ----


@cache
def sanitizers() -> tuple[str, ...]:
    """Flags, where the compiler has what they need."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    source = "int main(void) { return 0; }"
    command = [*find_compiler(), *flags, "-x", "c", "-", "-o", "/dev/null"]
    return () if subprocess.run(command, input=source, text=True, capture_output=True).returncode else flags


def compile_c(source: str, out: Path, *flags: str) -> None:
    command = [*find_compiler(), "-g", "-O1", "-Wall", "-Wextra", "-Werror", *flags, str(HERE / source), "-o", str(out)]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def doubles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the harness and, in `driver`, the double of the driver."""
    folder = tmp_path_factory.mktemp("doubles")
    (folder / "driver").mkdir()
    compile_c("libcuda_double.c", folder / "driver" / "libcuda.so.1", "-shared", "-fPIC", *sanitizers())
    compile_c("cuda_node_harness.c", folder / "harness", f"-I{SOURCES}", "-pthread", "-ldl", *sanitizers())
    return folder


class Harness:
    """Runs the harness; the operator is compiled once, and libraries are linked once a kernel."""

    def __init__(self, doubles: Path, folder: Path) -> None:
        self._doubles = doubles
        self._folder = folder
        self._built: dict[Kernel, Path] = {}
        self._objects = [folder / f"{Path(source).stem}.o" for source in library._SOURCES]
        for source, out in zip(library._SOURCES, self._objects, strict=True):
            flags = ["-g", "-O1", "-std=c11", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wshadow"]
            command = [*find_compiler(), *flags, *sanitizers(), "-c", str(SOURCES / source), "-o", str(out)]
            subprocess.run(command, check=True)

    def library(self, kernel: Kernel) -> Path:
        if kernel not in self._built:
            out = self._folder / f"{len(self._built)}.so"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CC", " ".join([*find_compiler(), *sanitizers()]))
                patch.setattr(
                    library, "_operator", lambda compiler: {file.name: file.read_bytes() for file in self._objects}
                )
                library.build_library([kernel], out)
            self._built[kernel] = out
        return self._built[kernel]

    def __call__(
        self,
        kernel: Kernel,
        shapes: str = "2",
        residual: str = "-",
        devices: str = "0",
        threads: bool = False,
        **env: str,
    ) -> list[str]:
        """What was printed, a line an event; nothing that was handed out may be left at the end."""
        command = [str(self._doubles / "harness"), str(self.library(kernel)), str(TYPES[kernel.dtype])]
        command += [devices, shapes, residual, *(["threads"] if threads else [])]
        environment = {**ANY_DEVICE, "LD_LIBRARY_PATH": str(self._doubles / "driver"), **env}
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stdout + run.stderr
        lines = run.stdout.splitlines()
        check_nothing_is_left(lines)
        return lines


@pytest.fixture(scope="module")
def harness(doubles: Path, tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(doubles, tmp_path_factory.mktemp("libraries"))


def calls(lines: Sequence[str], name: str) -> list[str]:
    """What follows `name` in the lines that begin with it and did not fail."""
    return [line[len(name) :].strip() for line in lines if line.split(" ")[0] == name and not line.endswith(" fails")]


# Calls whose errors nobody could act on.
GIVING = ("cuCtxPopCurrent_v2", "cuMemFree_v2", "cuModuleUnload", "cuDevicePrimaryCtxRelease_v2")


def check_nothing_is_left(lines: Sequence[str]) -> None:
    assert lines[-1] == "held 0"
    failed = [line.split(" ")[0] for line in lines if line.endswith(" fails")]
    if set(failed) & set(GIVING) or any(line.endswith(" fails") for line in lines[lines.index("destroy") :]):
        return
    for take, give in [
        ("cuMemAlloc_v2", "cuMemFree_v2"),
        ("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease_v2"),
        ("cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"),
    ]:
        assert Counter(calls(lines, take)) == Counter(calls(lines, give)), take
    assert len(calls(lines, "cuModuleLoadData")) >= len(calls(lines, "cuModuleUnload"))


def errors(lines: Sequence[str]) -> list[str]:
    return calls(lines, "error:")


def launches(lines: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for line in calls(lines, "cuLaunchKernel"):
        match = re.fullmatch(r"(\w+) on (\d) grid (\d+) 1 1 block (\d+) 1 1 shared (\d+) stream (\w+) args(.*)", line)
        assert match is not None, line
        entry, device, grid, block, shared, stream, arguments = match.groups()
        assert stream == STREAM
        values = [int(value, 16) for value in arguments.split()]
        found.append(
            {"entry": entry, "device": int(device), "grid": int(grid), "block": int(block), "shared": int(shared)}
            | {"arguments": values}
        )
    return found


# ---- Runs ----


def test_one_run(harness: Harness) -> None:
    """Creation does all but the launch: found by what a run calls."""
    lines = harness(kernel(), "2,3")
    assert not errors(lines)
    [structure] = calls(lines, "cuMemAlloc_v2")
    base = int(structure, 16)
    [launched] = launches(lines)
    # Indices, indptr and order lie in one allocation, each from a multiple of 256 bytes on.
    expected = [X, VALUES, base, base + 256, base + 512, BIAS, 0, Y, 0, 6]
    assert launched["arguments"] == expected
    assert (launched["grid"], launched["block"], launched["shared"]) == (3, 128, 0)
    # What is not zero, by its number: the block rows have 2, 2 and 3 blocks.
    words = {0: 2, 1: 4, 3: 2, 4: 1, 5: 4, 6: 6} | {65: 2, 66: 4, 67: 7} | {128: 2, 130: 1}
    assert calls(lines, "cuMemcpyHtoD_v2") == [" ".join(f"{at}:{word}" for at, word in words.items())]
    run = lines[lines.index("run") + 1 : lines.index("destroy")]
    assert [line.split(" ")[0] for line in run] == [
        "output",
        "cuCtxPushCurrent_v2",
        "cuLaunchKernel",
        "cuCtxPopCurrent_v2",
    ]
    assert run[0] == "output 0 of 2 3 6"
    assert calls(lines, "cuStreamSynchronize") == ["(nil)"]
    # The code is aligned, whatever the images before it.
    assert calls(lines, "cuModuleLoadData") == ["on 0 at 0"]
    assert len(calls(lines, "cuModuleUnload")) == 1


def test_arguments_have_the_places_of_the_device_function(harness: Harness) -> None:
    lines = harness(kernel(variant("sm_90", launch("reduce", arguments=("rows", "y", "x")))), "5")
    assert launches(lines)[0]["arguments"] == [5, Y, X]


@pytest.mark.parametrize(("rows", "tiles"), [(1, 1), (8, 1), (9, 2), (1000, 125)])
def test_grid(harness: Harness, rows: int, tiles: int) -> None:
    """`units` a tile; a persistent kernel has at most `blocks_per_sm` on each of the four multiprocessors."""
    plain, persistent = launch("small"), launch("large", units=5, blocks_per_sm=2)
    lines = harness(kernel(variant("sm_90", plain, persistent, workspace=1)), str(rows))
    assert [one["grid"] for one in launches(lines)] == [3 * tiles, min(5 * tiles, 8)]


def test_variant_by_rows(harness: Harness) -> None:
    small = variant("sm_90", launch("small"), max_rows=4, symbol="a")
    middle = variant("sm_90", launch("large"), max_rows=16, symbol="b")
    last = variant("sm_90", launch("product"), symbol="c")
    lines = harness(kernel(small, middle, last), "1;4;5;16;17;0")
    assert [one["entry"] for one in launches(lines)] == ["small", "small", "large", "large", "product"]
    # One image that they share would have one symbol; these are three.
    assert len(calls(lines, "cuModuleLoadData")) == 3


def test_workspace(harness: Harness) -> None:
    """Whole tiles of the first launch, for all launches, given back behind them."""
    first, second = launch("large", tile_rows=8), launch("reduce", arguments=("workspace", "y", "rows"), tile_rows=1)
    lines = harness(kernel(variant("sm_90", first, second, workspace=5)), "9;0")
    product, reduce = launches(lines)
    assert (product["grid"], reduce["grid"]) == (6, 27)
    assert product["arguments"][8] == reduce["arguments"][0] == SCRATCH
    run = lines[lines.index("run") + 1 : lines.index("destroy")]
    assert run[2] == f"scratch {SCRATCH:#x} of {5 * 16 * 4} bytes on 0"
    assert run.index(f"free {SCRATCH:#x} on 0") == 5
    # Nothing is taken for no rows.
    assert run[-2:] == ["run", "output 0 of 0 6"]


def test_large_shared_memory_is_asked_for(harness: Harness) -> None:
    lines = harness(
        kernel(variant("sm_90", launch("small", shared_bytes=48 << 10), launch("large", shared_bytes=50000)))
    )
    assert calls(lines, "cuFuncSetAttribute") == ["large 8 50000"]
    assert [one["shared"] for one in launches(lines)] == [48 << 10, 50000]


def test_module_is_loaded_once_a_device(harness: Harness) -> None:
    lines = harness(kernel(), devices="0,1,0,1", FAKE_CUDA_ARCH="90,90")
    assert calls(lines, "cuModuleLoadData") == ["on 0 at 0", "on 1 at 0"]
    assert calls(lines, "cuModuleUnload") == ["on 0", "on 1"]
    assert lines.count("cuInit") == 1
    assert [one["device"] for one in launches(lines)] == [0, 1, 0, 1]
    assert calls(lines, "cuDevicePrimaryCtxRetain") == ["0", "1", "0", "1"]


def test_variants_share_a_module(harness: Harness) -> None:
    """The same symbol for two limits."""
    one, two = (variant("sm_90", launch(entry), symbol="same") for entry in ("small", "large"))
    lines = harness(kernel(replace(one, max_rows=4), two), "1;5")
    assert len(calls(lines, "cuModuleLoadData")) == 1
    assert [one["entry"] for one in launches(lines)] == ["small", "large"]


def test_nodes_in_threads(harness: Harness) -> None:
    devices = "0,1,0,1,0,1,0,1"
    for _ in range(5):
        lines = harness(kernel(), "1;5;9", devices=devices, threads=True, FAKE_CUDA_ARCH="90,90")
        assert not errors(lines)
        assert sorted(calls(lines, "cuModuleLoadData")) == ["on 0 at 0", "on 1 at 0"]
        assert Counter(one["device"] for one in launches(lines)) == {0: 12, 1: 12}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_residual(harness: Harness, dtype: str) -> None:
    lines = harness(kernel(dtype=dtype, residual=True), "2,3", "2,3,6")
    assert launches(lines)[0]["arguments"][6] == RESIDUAL
    assert not any(line.startswith(("scratch", "add", "cuMemset")) for line in lines)


@pytest.mark.parametrize(
    ("x", "residual", "total"),
    [("2,3", "6", "2 3 6"), ("2,3", "1,3,6", "2 3 6"), ("2,3", "1", "2 3 6"), ("1,3", "4,1,6", "4 3 6")],
)
@pytest.mark.parametrize(("dtype", "fill"), [("float32", "32"), ("float16", "16"), ("bfloat16", "16")])
def test_residual_that_broadcasts(harness: Harness, x: str, residual: str, total: str, dtype: str, fill: str) -> None:
    """y is the residual -0 of the product in scratch memory, to which ONNX Runtime adds the true one."""
    lines = harness(kernel(dtype=dtype, residual=True), x, residual)
    assert not errors(lines)
    count = int(np.prod([int(size) for size in x.split(",")])) * 6
    run = lines[lines.index("run") + 1 : lines.index("destroy")]
    assert run[0] == f"output 0 of {total}"
    assert run[2] == f"scratch {SCRATCH:#x} of {count * int(fill) // 8} bytes on 0"
    zero = 1 << (int(fill) - 1)
    assert run[3] == f"cuMemsetD{fill}Async {Y:#x} {zero:#x} {count} {STREAM}"
    [launched] = launches(lines)
    assert (launched["arguments"][6], launched["arguments"][7]) == (Y, SCRATCH)
    assert run[5:8] == [
        f"tensor {SCRATCH:#x} of {count * int(fill) // 8} bytes",
        f"add {SCRATCH:#x} and {RESIDUAL:#x} to {Y:#x}",
        f"free {SCRATCH:#x} on 0",
    ]


@pytest.mark.parametrize(("x", "residual"), [("0", "0,6"), ("0", "6"), ("1", "0,6")])
def test_nothing_to_do(harness: Harness, x: str, residual: str) -> None:
    lines = harness(kernel(residual=True), x, residual)
    assert not errors(lines)
    assert lines[lines.index("run") + 1 : lines.index("destroy")] == ["output 0 of 0 6"]


# ---- The code for the device ----


@pytest.mark.parametrize(
    ("device", "archs", "chosen"),
    [
        ("80", ["sm_80", "sm_86", "sm_90a"], "sm_80"),
        ("86", ["sm_80", "sm_86", "sm_90a"], "sm_86"),
        # Newer minor versions run what was compiled for older ones.
        ("89", ["sm_80", "sm_86", "sm_90a"], "sm_86"),
        ("90", ["sm_80", "sm_90", "sm_90a"], "sm_90a"),
        ("90", ["sm_90a", "sm_90"], "sm_90a"),
        ("103", ["sm_90a", "sm_100"], "sm_100"),
        # "a" is for that version alone; machine code is better than PTX.
        ("103", ["sm_100a", "compute_90"], "compute_90"),
        ("120", ["compute_80", "compute_90", "sm_100"], "compute_90"),
        ("121", ["compute_90", "sm_120"], "sm_120"),
        ("90", ["compute_90", "sm_90"], "sm_90"),
        ("90", ["compute_90a"], "compute_90a"),
    ],
)
def test_code_for_the_device(harness: Harness, device: str, archs: list[str], chosen: str) -> None:
    images = [
        replace(variant(arch, launch(f"on_{arch}")), image=f"on_{arch} 10\n\0".encode(), symbol=arch) for arch in archs
    ]
    lines = harness(kernel(*images), FAKE_CUDA_ARCH=device)
    assert [one["entry"] for one in launches(lines)] == [f"on_{chosen}"]
    assert len(calls(lines, "cuModuleLoadData")) == 1


def test_code_needs_the_devices_shared_memory(harness: Harness) -> None:
    """sm_86 runs code for sm_80, but not with all the shared memory that an sm_80 has."""
    large = variant("sm_80", launch(shared_bytes=160 << 10))
    lines = harness(kernel(large, variant("compute_80", launch("small"))), FAKE_CUDA_ARCH="86")
    assert [one["entry"] for one in launches(lines)] == ["small"]
    [sentence] = errors(harness(kernel(large), FAKE_CUDA_ARCH="86"))
    assert "this GPU is sm_86, the library has code for sm_80:" in sentence


@pytest.mark.parametrize(
    ("device", "archs", "printed"),
    [
        ("75", ["sm_80"], "sm_80"),
        ("75", ["sm_80", "sm_90a"], "sm_80 and sm_90a"),
        ("75", ["sm_80", "sm_90a", "compute_90"], "sm_80, sm_90a and compute_90"),
        ("100", ["sm_90"], "sm_90"),
        ("80", ["sm_86"], "sm_86"),
        ("103", ["sm_90a", "compute_100a"], "sm_90a and compute_100a"),
    ],
)
def test_no_code_for_the_device(harness: Harness, device: str, archs: list[str], printed: str) -> None:
    lines = harness(kernel(*(variant(arch) for arch in archs)), FAKE_CUDA_ARCH=device)
    assert errors(lines) == [
        f"SparseLinear 'fc1': this GPU is sm_{device}, the library has code for {printed}: compile again with "
        f"--target cuda:sm_{device} or auto"
    ]


# ---- What goes wrong is said, and nothing is left ----


FULL = kernel(
    variant(
        "sm_90",
        launch("large", shared_bytes=50000),
        launch("reduce", arguments=("workspace", "y", "rows")),
        workspace=1,
    ),
    residual=True,
)


OUT_OF_DATE = "update the NVIDIA driver, which is made for CUDA 12\\.4"
UNWELL = (
    "if nvidia-smi shows the GPU to be well, an operator that ran before may have failed, which CUDA_LAUNCH_BLOCKING=1 "
    "shows"
)


@pytest.mark.parametrize(
    ("fail", "sentence"),
    [
        (
            "cuMemAlloc_v2 2",
            "allocating 768 bytes of GPU memory failed with CUDA_ERROR_OUT_OF_MEMORY; free memory of the GPU or open "
            "fewer sessions on it",
        ),
        ("cuModuleLoadData 200", f"loading the code for sm_90 failed with CUDA_ERROR_INVALID_IMAGE; {OUT_OF_DATE}"),
        ("cuModuleLoadData 209", f"loading the code for sm_90 failed with CUDA_ERROR_NO_BINARY_FOR_GPU; {OUT_OF_DATE}"),
        ("cuModuleLoadData 222", f"loading .* failed with CUDA_ERROR_UNSUPPORTED_PTX_VERSION; {OUT_OF_DATE}"),
        (
            "cuLaunchKernel 700",
            f"launching 'large' of kernel 'plain' failed with CUDA_ERROR_ILLEGAL_ADDRESS; {UNWELL}",
        ),
        ("cuInit 100", f"cuInit failed with CUDA_ERROR_NO_DEVICE; {UNWELL}"),
        ("cuDeviceGet 12345", f"cuDeviceGet failed with an unknown error; {UNWELL}"),
    ],
)
def test_driver_fails(harness: Harness, fail: str, sentence: str) -> None:
    [error] = errors(harness(FULL, "2,3", "2,3,6", FAKE_CUDA_FAIL=fail))
    assert re.fullmatch(f"SparseLinear 'fc1': {sentence}", error)


def test_no_driver(harness: Harness) -> None:
    [error] = errors(harness(kernel(), LD_LIBRARY_PATH="/nowhere"))
    assert re.fullmatch(
        r"SparseLinear 'fc1': this session uses the CUDA provider, but the NVIDIA driver cannot be loaded "
        r"\(libcuda.so.1: .*\): install it, or start the container with its GPUs",
        error,
    )


def test_no_scratch_memory(harness: Harness) -> None:
    """ONNX Runtime's own words are handed on."""
    for residual in ("2,3,6", "6"):
        assert errors(harness(FULL, "2,3", residual, NO_SCRATCH="1")) == ["the arena is exhausted"]


def test_scratch_memory_that_is_not_taken_back(harness: Harness) -> None:
    """The first error counts."""
    assert errors(harness(FULL, "2,3", "2,3,6", BAD_FREE="1")) == ["not of this arena"]
    [error] = errors(harness(FULL, "2,3", "2,3,6", BAD_FREE="1", FAKE_CUDA_FAIL="cuLaunchKernel 700"))
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in error


def test_address_that_is_not_aligned(harness: Harness) -> None:
    lines = harness(kernel(), MISALIGNED="1")
    assert errors(lines) == [
        "SparseLinear 'fc1': X starts at address 0x20004, expected a multiple of 16; bind another buffer"
    ]
    assert not launches(lines)


def test_entry_that_is_not_in_the_image(harness: Harness) -> None:
    [error] = errors(harness(kernel(variant("sm_90", launch("missing")))))
    assert "cuModuleGetFunction failed with CUDA_ERROR_NOT_FOUND" in error


def test_batch_that_is_too_large(harness: Harness) -> None:
    lines = harness(kernel(variant("sm_90", launch(units=2**20, tile_rows=4))), "8188;8189")
    [error] = errors(lines)
    assert error == "SparseLinear 'fc1': X has 8189 rows, expected at most 8188; split the batch"
    assert [one["grid"] for one in launches(lines)] == [2047 * 2**20]


def test_runtime_that_is_too_old(harness: Harness) -> None:
    lines = harness(kernel(), ORT_VERSION="1.17.3")
    assert errors(lines) == ["SparseLinear: on GPUs ONNX Runtime 1.18 or later is needed; update onnxruntime-gpu"]
    assert not any(line.startswith("cu") for line in lines)


@pytest.mark.parametrize("residual", ["2,3,6", "6"])
def test_every_call_may_fail(harness: Harness, residual: str) -> None:
    """The n-th call of the driver fails, for every n: one error at most, and nothing is left (see `Harness`)."""
    all_calls = sum(line.startswith("cu") for line in harness(FULL, "2,3", residual))
    assert all_calls > 20
    for n in range(1, all_calls + 1):
        lines = harness(FULL, "2,3", residual, FAKE_CUDA_FAIL_AT=str(n))
        [failed] = [line for line in lines if line.endswith(" fails")]
        destroyed = lines.index("destroy") < lines.index(failed)
        assert len(errors(lines)) == int(not destroyed and failed.split(" ")[0] not in GIVING), failed
        if errors(lines):
            modules = [len(calls(lines, name)) for name in ("cuModuleLoadData", "cuModuleUnload")]
            assert modules[0] == modules[1]


# ---- Right results, in ONNX Runtime ----

# A session on the CPU provider, in a process of its own because LD_LIBRARY_PATH is read when one starts.
RUN = """
import pathlib
import sys
import numpy as np
import onnxruntime as ort
folder = pathlib.Path(sys.argv[1])
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 4
options.register_custom_ops_library(str(folder / "ops.so"))
session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
for i in range(int(sys.argv[2])):
    feeds = {one.name: np.load(folder / f"{one.name}_{i}.npy") for one in session.get_inputs()}
    np.save(folder / f"y_{i}.npy", session.run(None, feeds)[0])
"""

# The double of the driver works in ONNX Runtime's CPU memory, but scratch memory without a stream, as the CPU provider
# has none, ends the process in older releases.
HAS_SCRATCH = tuple(int(part) for part in ort.__version__.split(".")[:2]) >= (1, 24)


def interchange_providers(path: Path) -> None:
    """Let the library's CUDA nodes run on the CPU provider, whose memory is the double's device memory."""
    code = path.read_bytes()
    assert code.count(b"CPUExecutionProvider\0") == code.count(b"CUDAExecutionProvider\0") == 1
    code = code.replace(b"CPUExecutionProvider\0", b"XYZExecutionProvider\0")
    path.write_bytes(code.replace(b"CUDAExecutionProvider\0", b"CPUExecutionProvider\0\0"))


def make_matrix(block: tuple[int, int], dtype: str = "float32") -> SparseMatrix:
    rng = np.random.default_rng(block)
    pattern = BlockPattern(*block)
    weight = rng.standard_normal((50, 40)) * pattern.project(rng.random((50, 40)), 0.4)
    return SparseMatrix.from_dense(weight.astype(np.float32), pattern, dtype)


def make_kernel(matrix: SparseMatrix, residual: bool, workspace: int = 0) -> Kernel:
    """A kernel that the double runs."""
    image = f"product 10 40 50 {matrix.block[0]} {matrix.block[1]} {matrix.panel}\n\0".encode()
    gpu = replace(variant(), image=image, workspace=workspace)
    epilogue = Epilogue(Activation.RELU, bias=True, residual=residual)
    cpu = (CpuVariant("unused", ANY_ROWS, 1, 0, 1, unused()),) if matrix.dtype == "float32" else ()
    return Kernel("plain", 40, 50, matrix.block, matrix.panel, epilogue, cpu, (gpu,), matrix.dtype)


def one_node(matrix: SparseMatrix, bias: Any, residual: bool) -> onnx.ModelProto:
    arrays = {"values": matrix.values, "indices": matrix.indices, "indptr": matrix.indptr, "bias": bias}
    attributes = {"in_features": 40, "out_features": 50, "threads": 1, "kernel": "plain"}
    attributes |= {"block_rows": matrix.block[0], "block_cols": matrix.block[1]}
    feeds = ["x", "residual"] if residual else ["x"]
    node = helper.make_node(
        "SparseLinear", ["x", *arrays, *feeds[1:]], ["y"], name="fc1", domain="ai.sparsec", **attributes
    )
    types = {"int32": TensorProto.INT32, **TYPES}
    constants = [
        helper.make_tensor(name, types[value.dtype.name], value.shape, value.tobytes(), raw=True)
        for name, value in arrays.items()
    ]
    inputs = [helper.make_tensor_value_info(name, TYPES[matrix.dtype], None) for name in feeds]
    outputs = [helper.make_tensor_value_info("y", TYPES[matrix.dtype], None)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.sparsec", 1)]
    graph = helper.make_graph([node], "test", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the driver's double without sanitizers, which would have to be in the interpreter, too."""
    folder = tmp_path_factory.mktemp("driver")
    compile_c("libcuda_double.c", folder / "libcuda.so.1", "-shared", "-fPIC")
    return folder


def run_session(folder: Path, driver: Path, feeds: Sequence[dict[str, Any]]) -> tuple[list[Any], list[str]]:
    """The results, and what the double printed."""
    for i, feed in enumerate(feeds):
        for name, value in feed.items():
            np.save(folder / f"{name}_{i}.npy", value)
    environment = {**os.environ, **ANY_DEVICE, "LD_LIBRARY_PATH": str(driver)}
    command = [sys.executable, "-c", RUN, str(folder), str(len(feeds))]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return [np.load(folder / f"y_{i}.npy") for i in range(len(feeds))], run.stdout.splitlines()


def check_results(
    folder: Path, driver: Path, block: tuple[int, int], shapes: Sequence[tuple[Any, Any]], workspace: int
) -> None:
    """Each slot of ONNX Runtime's table is the function that we take it for, or this would not run."""
    matrix, rng = make_matrix(block), np.random.default_rng(0)
    bias = rng.standard_normal(50).astype(np.float32)
    build_library([make_kernel(matrix, residual=True, workspace=workspace)], folder / "ops.so")
    interchange_providers(folder / "ops.so")
    (folder / "model.onnx").write_bytes(one_node(matrix, bias, residual=True).SerializeToString())
    feeds = [
        {"x": np.asarray(rng.standard_normal((*x, 40)), "f"), "residual": np.asarray(rng.standard_normal(r), "f")}
        for x, r in shapes
    ]
    results, lines = run_session(folder, driver, feeds)
    for feed, got in zip(feeds, results, strict=True):
        product = np.maximum(feed["x"].astype(np.float64) @ matrix.to_dense().T.astype(np.float64) + bias, 0)
        expected = product + feed["residual"]
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert len(calls(lines, "cuLaunchKernel")) == sum(got.size > 0 for got in results)
    # The session's end has given everything back.
    assert len(calls(lines, "cuMemFree_v2")) == len(calls(lines, "cuModuleUnload")) == 1
    assert calls(lines, "cuDevicePrimaryCtxRelease_v2") == ["0"]


@pytest.mark.parametrize("block", [(8, 3), (1, 1), (20, 7), (64, 64)])
def test_results(driver: Path, tmp_path: Path, block: tuple[int, int]) -> None:
    shapes = [((1,), (1, 50)), ((7,), (7, 50)), ((2, 3), (2, 3, 50)), ((0,), (0, 50)), ((), (50,))]
    check_results(tmp_path, driver, block, shapes, workspace=0)


@pytest.mark.skipif(not HAS_SCRATCH, reason="ONNX Runtime before 1.24 has scratch memory for GPUs alone")
def test_results_with_scratch_memory(driver: Path, tmp_path: Path) -> None:
    """A workspace, and residuals that broadcast."""
    shapes = [
        ((2, 3), (2, 3, 50)),
        ((3,), (50,)),
        ((3,), ()),
        ((2, 3), (3, 1)),
        ((2, 3), (2, 1, 50)),
        ((2, 3), (1, 2, 3, 50)),
        ((), (4, 50)),
        ((2, 1), (5, 1, 4, 1)),
        ((1,), (0, 50)),
    ]
    check_results(tmp_path, driver, (8, 3), shapes, workspace=3)


# ---- On the CPU ----


def open_on_cpu(folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(folder / "ops.so"))
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def test_cpu_node_needs_no_driver(driver: Path, tmp_path: Path) -> None:
    """A library with code for GPUs of all three types: the CPU provider runs float32, and the driver is not touched."""
    matrix = make_matrix((8, 3))
    source = PRODUCT.replace("PANEL", str(matrix.panel))
    cpu = (CpuVariant("product", ANY_ROWS, 1, 0, 1, c_object(source, tmp_path)),)
    kernels = [replace(make_kernel(matrix, residual=False), cpu=cpu)]
    kernels += [replace(kernels[0], name=dtype, dtype=dtype, cpu=()) for dtype in ("float16", "bfloat16")]
    build_library(kernels, tmp_path / "ops.so")
    bias = np.arange(50, dtype=np.float32)
    (tmp_path / "model.onnx").write_bytes(one_node(matrix, bias, residual=False).SerializeToString())
    x = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    results, lines = run_session(tmp_path, driver, [{"x": x}])
    assert lines == []
    expected = np.maximum(x @ matrix.to_dense().T + bias, 0)
    np.testing.assert_allclose(results[0], expected, rtol=1e-5, atol=1e-5)
    # Nor is one missed where it is not.
    np.testing.assert_array_equal(open_on_cpu(tmp_path).run(None, {"x": x})[0], results[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_on_the_cpu(tmp_path: Path, dtype: str) -> None:
    matrix = make_matrix((8, 3), dtype)
    build_library([make_kernel(matrix, residual=False)], tmp_path / "ops.so")
    bias = np.zeros(50, matrix.values.dtype)
    (tmp_path / "model.onnx").write_bytes(one_node(matrix, bias, residual=False).SerializeToString())
    sentence = (
        f"SparseLinear 'fc1': {dtype} weights need ONNX Runtime's CUDA provider; this session runs on the CPU: open it "
        "with CUDAExecutionProvider, which onnxruntime-gpu has"
    )
    with pytest.raises(Exception, match=sentence):
        open_on_cpu(tmp_path)


# ---- The file ----


def test_images_are_stored_once_as_they_are(tmp_path: Path) -> None:
    image = np.random.default_rng(0).bytes(100_000)
    one = kernel(replace(variant(), image=image))
    for name, kernels in [("a.so", [one]), ("b.so", [one]), ("c.so", [one, replace(one, name="again")])]:
        build_library(kernels, tmp_path / name)
    content = (tmp_path / "a.so").read_bytes()
    assert content == (tmp_path / "b.so").read_bytes()
    assert content.count(image) == (tmp_path / "c.so").read_bytes().count(image) == 1
    other = kernel(replace(variant(), image=b"other"))
    with pytest.raises(ValueError, match="'again': symbol 'plain_sm_90' stands for two different codes"):
        build_library([one, replace(other, name="again")], tmp_path / "bad.so")


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ((variant(max_rows=5),), "max_rows must rise"),
        ((variant("sm_80"), variant("sm_90", max_rows=5)), "max_rows must rise"),
        ((variant("sm_80"), variant("sm_90"), variant("sm_80", symbol="c")), "must stand together"),
        ((variant("gfx90a"),), "'gfx90a' is no architecture such as sm_80"),
        ((variant("sm_90", *[launch()] * 5),), "has 5 launches, expected 1 to 4"),
        ((variant("sm_90", launch(units=0)),), "launch 'product' has an impossible size"),
        ((variant("sm_90", launch(arguments=("x", "z"))),), "has an unknown argument, or one twice"),
        ((variant("sm_90", launch(arguments=("x", "x"))),), "has an unknown argument, or one twice"),
        ((variant(workspace=-1),), "has an impossible size"),
    ],
)
def test_impossible_variants(tmp_path: Path, bad: tuple[CudaVariant, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_library([kernel(*bad)], tmp_path / "ops.so")


def test_impossible_kernels(tmp_path: Path) -> None:
    for bad, sentence in [
        (replace(kernel(), cpu=()), "'plain' has no variants for CPUs"),
        (replace(kernel(), cuda=(), cpu=(), dtype="float16"), "'plain' has no variants for CPUs"),
        (replace(kernel(), dtype="float64"), "dtype 'float64', expected one of float32, float16, bfloat16"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            build_library([bad], tmp_path / "ops.so")


def test_all_kernels_have_code_for_gpus_or_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="some kernels have variants for GPUs and some have none"):
        build_library([kernel(), replace(kernel(), name="other", cuda=())], tmp_path / "ops.so")
