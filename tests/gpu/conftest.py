"""Runs kernels without tensor-core instructions on a CPU: the same TVM functions as OpenCL C, by PoCL."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sparsec.codegen.generate.cuda import _launches, _lower
from sparsec.codegen.kernels.gpu import EMITTERS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsec.codegen.kernel import Launch
    from sparsec.codegen.kernels.gpu.schedule import GpuSchedule
    from sparsec.codegen.problem import Problem

    Array = NDArray[Any]

# Bytes on either side of a buffer that nothing may be read from or written to: a page, which any device aligns to.
GUARD = 4096
# What is there: a NaN as a float32 and as two 16-bit floats; an index far outside of everything.
UNTOUCHED = np.uint32(0x7FF57FF5)
TARGET = {"kind": "opencl", "max_threads_per_block": 1024, "max_shared_memory_per_block": 48 << 10}
# PoCL has no arithmetic on `half`, but every OpenCL device loads and stores it. What TVM writes as a reinterpreting
# cast to `half` and a conversion becomes a conversion of the bits.
HALF = """
inline float half_to_float(ushort bits) { return vload_half(0, (const __private half*)&bits); }
inline ushort float_to_half(float x) { ushort bits; vstore_half_rte(x, 0, (__private half*)&bits); return bits; }
#define cl_khr_fp16 1
#define half ushort
#define convert_float(x) half_to_float(x)
#define convert_half(x) float_to_half(x)
"""


@dataclass(frozen=True)
class OpenCl:
    """An OpenCL device; `compile` makes kernels for it."""

    queue: Any
    kernels: dict[Any, OpenClKernel] = field(default_factory=dict)

    def compile(self, problem: Problem, schedule: GpuSchedule) -> OpenClKernel:
        import pyopencl
        from tvm.tirx.build import codegen_build

        key = problem, schedule
        if key not in self.kernels:
            emitter = EMITTERS[schedule.kernel]
            host, device = _lower(emitter.emit(problem, schedule, "kernel"), TARGET)
            target = next(iter(device.functions.values())).attrs["target"]
            source = str(codegen_build(device, target).inspect_source("cl"))
            source = HALF + source if problem.dtype == "float16" else source
            program = pyopencl.Program(self.queue.context, source).build(["-w"])
            launches = _launches(host, emitter.grids(problem, schedule))
            entries = {launch.entry: pyopencl.Kernel(program, launch.entry) for launch in launches}
            self.kernels[key] = OpenClKernel(self.queue, entries, launches)
        return self.kernels[key]


@dataclass(frozen=True)
class OpenClKernel:
    """A compiled kernel; launched as `codegen.kernel.Launch` says."""

    queue: Any
    entries: dict[str, Any]
    launches: tuple[Launch, ...]

    def __call__(self, arrays: dict[str, Array], rows: int) -> None:
        """Run on copies of `arrays` and copy them back; fails if anything but the results is written to."""
        import pyopencl

        memory = {name: guarded(array) for name, array in arrays.items()}
        flags = pyopencl.mem_flags.READ_WRITE | pyopencl.mem_flags.COPY_HOST_PTR
        whole = {name: pyopencl.Buffer(self.queue.context, flags, hostbuf=bytes_) for name, bytes_ in memory.items()}
        inner = {name: whole[name].get_sub_region(GUARD, max(array.nbytes, 4)) for name, array in arrays.items()}
        for launch in self.launches:
            arguments = [np.int64(rows) if name == "rows" else inner[name] for name in launch.arguments]
            blocks = launch.units * ceil(rows / launch.tile_rows)
            self.entries[launch.entry](self.queue, (blocks * launch.threads,), (launch.threads,), *arguments)
        for name, array in arrays.items():
            before, after = memory[name], np.empty_like(memory[name])
            pyopencl.enqueue_copy(self.queue, after, whole[name])
            data = slice(GUARD, GUARD + array.nbytes)
            if name not in ("y", "workspace"):
                assert np.array_equal(after, before), f"wrote to {name}"
            array[...] = after[data].view(array.dtype).reshape(array.shape)
            after[data] = before[data]
            assert np.array_equal(after, before), f"wrote beside {name}"


def guarded(array: Array) -> Array:
    """The array's bytes between two pages of `UNTOUCHED`."""
    size = -(-array.nbytes // 4) * 4
    memory = np.full((size + 2 * GUARD) // 4, UNTOUCHED).view(np.uint8)
    memory[GUARD : GUARD + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memory


@pytest.fixture(scope="session")
def opencl(tmp_path_factory: pytest.TempPathFactory) -> OpenCl:
    """PoCL; tests that need it are skipped where it is missing."""
    pyopencl = pytest.importorskip("pyopencl", reason="needs pyopencl, which runs kernels for GPUs on a CPU")
    os.environ["POCL_CACHE_DIR"] = str(tmp_path_factory.mktemp("pocl"))
    try:
        platforms = [p for p in pyopencl.get_platforms() if p.name == "Portable Computing Language"]
    except pyopencl.LogicError:
        platforms = []
    if not platforms:
        pytest.skip("needs PoCL (Debian: pocl-opencl-icd), which runs kernels for GPUs on a CPU")
    return OpenCl(pyopencl.CommandQueue(pyopencl.Context(platforms[0].get_devices()[:1])))
