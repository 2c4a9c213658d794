"""Runs CUDA C++ as TVM generates it on a CPU, so that kernels with tensor-core instructions are executed without a GPU.

The source itself is compiled by the C++ compiler, with emulate.h instead of CUDA's headers: what is executed has gone
through every pass of TVM. Each helper of one PTX instruction (`asm volatile("mma.sync... {%0, ...}, ...")`) becomes a
call of the function of that name in emulate.h's namespace `ptx`, which is written from the PTX ISA's tables.

Covered: indices, masks, fragment and shared-memory layouts, alignment of vector accesses and copies, accesses outside
arrays and shared memory (pages that trap, NaN where nothing was written), lanes that diverge in front of a warp-wide
instruction, deadlocks, 32-bit overflow. Missing barriers and waits, as far as they show when the warps run one after
another in rising, in falling or in random order (`Order`), and when asynchronous copies are done at once or as late as
allowed. Not covered: memory ordering below that, timing, the order in which tensor cores add, instructions that
emulate.h lacks (they are an error).
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

COMPILER = shutil.which("g++")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Order:
    """How the threads of a block take turns.

    Attributes:
        warps: "rising" (the first warp that can run does), "falling" (the last) or "random".
        late: whether asynchronous copies are done when they are waited for, instead of at once.
        seed: of "random".
    """

    warps: str = "rising"
    late: bool = True
    seed: int = 0


def translate(source: str, entry: str) -> str:
    """The C++ program that runs the device function `entry` of the CUDA source `source`."""
    # What stands before the last of TVM's own definitions is CUDA's headers and work-arounds for them.
    source = source.rpartition("#define ushort unsigned short\n#endif\n")[2]
    source = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];", r"\1* \2 = (\1*)emulate::dynamic_shared();", source
    )
    source = re.sub(
        r"(__forceinline__ __device__ [^;{}]*?\w+\([^{}]*\) )\{\n(.*?)\n\}", _helper, source, flags=re.DOTALL
    )
    if "asm" in re.findall(r"\w+", source):
        raise ValueError(f"the emulation knows assembly only in helper functions of one statement: {source}")
    parameters = re.search(rf"\b{entry}\((.*?)\)", source)
    if parameters is None:
        raise ValueError(f"no device function {entry}")
    types = [re.sub(r"__restrict__|\w+$", "", part).strip() for part in parameters[1].split(",")]
    values = ", ".join(f"({kind})a[{i}]" for i, kind in enumerate(types))
    return f"""#include "emulate.h"
{source}
int main() {{ return emulate::serve({len(types)}, [](const uint64_t* a) {{ {entry}({values}); }}); }}
"""


def _helper(match: re.Match[str]) -> str:
    """A helper function with its assembly replaced by a call."""
    head, body = match[1], match[2]
    statement = re.search(r'asm volatile\("([^"]*)"(.*)\);', body, flags=re.DOTALL)
    return f"{head}{{ {_call(statement[1], statement[2])} }}" if statement else match[0]


def _call(text: str, operands: str) -> str:
    """`text`, one instruction with operands %0, %1 ... as `operands` binds them, as a call of its emulation."""
    if text.count(";") != 1:
        raise ValueError(f"the emulation takes one instruction at a time, not {text}")
    bound = re.findall(r'"[=+]?\w"\(((?:[^()]|\([^()]*\))*)\)', operands)
    name, _, rest = text.rstrip("; ").partition(" ")
    arguments = [re.sub(r"%(\d+)", lambda i: bound[int(i[1])], part) for part in re.findall(r"[^\s,{}\[\]]+", rest)]
    return f"ptx::{re.sub(r'[.:]+', '_', name)}({', '.join(arguments)});"


@lru_cache(maxsize=256)
def build(source: str, entry: str) -> Path:
    """The program of `translate`, compiled; takes about a second."""
    folder = Path(_folder().name)
    stem = folder / f"{entry}-{len(list(folder.iterdir()))}"
    stem.with_suffix(".cc").write_text(translate(source, entry))
    checks = ["-fsanitize=alignment,bounds,signed-integer-overflow,shift", "-fno-sanitize-recover=all"]
    _compile(*checks, str(stem.with_suffix(".cc")), str(_runtime()), "-o", str(stem))
    return stem


@lru_cache(maxsize=1)
def _runtime() -> Path:
    """emulate.cc, compiled."""
    to = Path(_folder().name) / "emulate.o"
    _compile("-O2", "-c", str(HERE / "emulate.cc"), "-o", str(to))
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
    source: str, entry: str, arguments: list[Any], *, grid: int, threads: int, shared_bytes: int, order: Order = Order()
) -> None:
    """Launch `entry` of `source` on `grid` blocks of `threads` threads, one block after another.

    `arguments` are contiguous numpy arrays, which the kernel may change, and integers, in the order of the device
    function's parameters.

    Raises:
        AssertionError: the kernel did what no kernel may (see the module); the message says what.
    """
    head = [grid, threads, shared_bytes, ("rising", "falling", "random").index(order.warps), order.late, order.seed]
    message = [struct.pack("<7q", *head, len(arguments))]
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
