"""Runs the CUDA C++ that TVM generates for the kernel "wgmma" on a CPU, so that it is executed without a GPU.

The source itself is compiled by the C++ compiler, with emulate_wgmma.h instead of CUDA's headers: what is executed has
gone through every pass of TVM. Each helper of one PTX instruction (`asm volatile("cp.async... [%0], [%1], 16;" ...)`)
becomes a call of the function of that name in the header's namespace `ptx`, which is written from the PTX ISA: matrix
descriptors become addresses by its layouts and swizzle.

Covered: indices, masks, layouts, alignment, accesses outside arrays and shared memory, the barriers' phases and
transaction bytes, deadlocks, copies and products that nothing waits for, stages given back too early, missing fences.
Warps take turns at random; copies and tensor cores work at once, at random, or as late as the kernel lets them (then
what they are to write is poison, NaN, before). Not covered: timing, and the order in which tensor cores add.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

COMPILER = shutil.which("g++")
HERE = Path(__file__).parent
HASTE = ("late", "soon", "random")

# Helpers that are not one instruction.
_BODIES = {
    "tvm_builtin_cuda_mbarrier_wait_raw_u32": "ptx::mbarrier_wait(barrier, phase);",
    "tvm_builtin_ptx_fetch_register_nctaid_x": "return machine::grid.x;",
    "sparsec_keep": "",
}


def translate(source: str, entry: str) -> str:
    """The C++ program that runs the device function `entry` of the CUDA source `source`."""
    # What stands before the last of TVM's own definitions is CUDA's headers and work-arounds for them.
    source = source.rpartition("#define ushort unsigned short\n#endif\n")[2]
    source = re.sub(
        r"extern __shared__ __align__\(1024\) uchar (\w+)\[\];",
        r"uchar* \1 = (uchar*)machine::dynamic_shared();",
        source,
    )
    source = re.sub(
        r"(__forceinline__ __device__ [^;{}]*?(\w+)\([^{}]*\) )\{\n(.*?)\n\}", _helper, source, flags=re.DOTALL
    )
    if "asm" in re.findall(r"\w+", source):
        raise ValueError("the emulation knows assembly only in helper functions of one statement")
    parameters = re.search(rf"\b{entry}\((.*?)\)", source)
    assert parameters, f"no device function {entry}"
    types = [re.sub(r"__restrict__|\w+$", "", part).strip() for part in parameters[1].split(",")]
    values = ", ".join(f"({kind})a[{i}]" for i, kind in enumerate(types))
    return f"""#include "emulate_wgmma.h"
{source}
int main() {{ return machine::serve({len(types)}, [](const uint64_t* a) {{ {entry}({values}); }}); }}
"""


def _helper(match: re.Match[str]) -> str:
    """A helper function with its assembly replaced by a call."""
    head, name, body = match[1], match[2], match[3]
    if name in _BODIES:
        return f"{head}{{ {_BODIES[name]} }}"
    statement = re.search(r'asm volatile\("([^"]*)"(.*)\);', body, flags=re.DOTALL)
    return f"{head}{{ {_call(statement[1], statement[2])} }}" if statement else match[0]


def _call(text: str, operands: str) -> str:
    """`text`, one instruction with operands %0, %1 ... as `operands` binds them, as a call of its emulation."""
    bound = re.findall(r'"[=+]?\w"\((\w+)\)', operands)
    text = re.sub(r"%(\d+)", lambda i: bound[int(i[1])], text)
    wgmma = re.search(
        r"setp\.ne\.b32 ps0, (\w+), 0; wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(\w+)\.\3 "
        r"\{(.*?)\}, (\w+), (\w+), ps0, (.*?); \}",
        text,
    )
    if wgmma:
        scale, n, kind, sums, a, b, rest = wgmma.groups()
        registers = ", ".join(f"&{name}" for name in sums.split(", "))
        return f'float* d[{n} / 2] = {{{registers}}}; ptx::wgmma("{kind}", {n}, d, {a}, {b}, {scale}, {rest});'
    if text.count(";") != 1:
        raise ValueError(f"the emulation takes one instruction at a time, not {text}")
    name, _, rest = text.rstrip("; ").partition(" ")
    arguments = [part for part in re.findall(r"[^\s,{}\[\]]+", rest) if part != "_"]
    return f"ptx::{re.sub(r'[.:]+', '_', name)}({', '.join(arguments)});"


@lru_cache(maxsize=64)
def build(source: str, entry: str) -> Path:
    """The program of `translate`, compiled."""
    stem = Path(_folder().name) / hashlib.sha256(source.encode()).hexdigest()[:16]
    stem.with_suffix(".cc").write_text(translate(source, entry))
    checks = ["-fsanitize=alignment,bounds,signed-integer-overflow,shift", "-fno-sanitize-recover=all"]
    _compile("-O1", *checks, str(stem.with_suffix(".cc")), str(_machine()), "-o", str(stem))
    return stem


@lru_cache(maxsize=1)
def _machine() -> Path:
    """emulate_wgmma.cc, compiled."""
    to = Path(_folder().name) / "machine.o"
    _compile("-O2", "-c", str(HERE / "emulate_wgmma.cc"), "-o", str(to))
    return to


@lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="emulate")


def _compile(*arguments: str) -> None:
    # longjmp between fibres is what the C library's checks take for a broken stack.
    command = [str(COMPILER), "-std=c++17", "-w", "-U_FORTIFY_SOURCE", f"-I{HERE}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)


def run(
    source: str, entry: str, arguments: list[Any], *, grid: int, threads: int, shared_bytes: int, haste: str, seed: int
) -> None:
    """Launch `entry` of `source` on `grid` blocks of `threads` threads, one block after another.

    `arguments` are contiguous numpy arrays, which the kernel may change, and integers, in the order of the device
    function's parameters.

    Raises:
        AssertionError: the kernel did what no kernel may (see the module); the message says what.
    """
    message = [struct.pack("<5q", grid, threads, shared_bytes, HASTE.index(haste), seed)]
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            message += [struct.pack("<q", argument.nbytes), argument.tobytes()]
        else:
            message.append(struct.pack("<2q", -1, argument))
    done = subprocess.run([str(build(source, entry))], input=b"".join(message), capture_output=True, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr.decode()}"
    at = 0
    for array in (a for a in arguments if isinstance(a, np.ndarray)):
        array[...] = np.frombuffer(done.stdout, array.dtype, array.size, at).reshape(array.shape)
        at += array.nbytes
