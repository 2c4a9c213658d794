"""Kernels to `libsparsec_ops.so`, the custom-op library that ONNX Runtime loads: it needs nothing else at run time.

    kernels ─▶ table.c (names, sizes, variants) ┐
    variants' object files ─────────────────────┼─ C compiler ─▶ one shared library, exporting RegisterCustomOps
    the operator's C files in this folder ──────┘

It is linked once and runs with any ONNX Runtime from 1.17 on.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ...ir.errors import SparsecError
from ..kernel import ANY_ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..kernel import CpuVariant, Kernel

LIBRARY_NAME = "libsparsec_ops.so"

_SOURCES = ("sparse_linear.c", "node.c", "compute.c", "tensor.c", "tvm_runtime.c")

# No path, time or random number may reach the file, so that equal kernels give equal bytes: hence -s and no build id.
_FLAGS = (
    "-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-shared", "-s",
    "-Wl,--version-script=exports.map", "-Wl,--build-id=none", "-Wl,--no-undefined", "-Wl,--as-needed",
)  # fmt: skip

# TVM's objects export their own symbols; hiding them lets several libraries live in one process.
_EXPORTS = "{ global: RegisterCustomOps; local: *; };\n"

_INSTALL = "apt install gcc libc6-dev on Debian or Ubuntu, dnf install gcc on Fedora, xcode-select --install on macOS"


def build_library(kernels: Sequence[Kernel], out: Path, requires: Sequence[str] = ()) -> None:
    """Link `kernels`, which may be none, into the shared library `out`; the same arguments give the same bytes.

    A library that a running process has loaded may be replaced: `out` becomes a new file, the old one stays intact.

    Args:
        kernels: their names must differ; variants of the same symbol must have the same code.
        out: the file to write; its folder must exist.
        requires: x86 instruction sets that the code uses, such as "avx512f"; registering the library on a processor
            without them is an error of one sentence, not a crash.

    Raises:
        SparsecError: there is no C compiler, or it fails.
        ValueError: the kernels contradict each other or their own description.
    """
    compiler = find_compiler()
    objects = _objects(kernels)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        folder = Path(name)
        (folder / "table.c").write_text(_table(kernels, requires), encoding="utf-8")
        (folder / "exports.map").write_text(_EXPORTS, encoding="utf-8")
        for i, code in enumerate(objects.values()):
            (folder / f"{i}.o").write_bytes(code)
        here = Path(__file__).resolve().parent
        sources = [str(here / source) for source in _SOURCES]
        inputs = [*sources, "table.c", *(f"{i}.o" for i in range(len(objects)))]
        _run([*compiler, *_FLAGS, f"-I{here}", *inputs, "-lm", "-o", LIBRARY_NAME], folder)
        (folder / LIBRARY_NAME).replace(out)


def find_compiler() -> tuple[str, ...]:
    """The C compiler's command: $CC, which may have arguments, or the first of cc, gcc and clang that is installed.

    Raises:
        SparsecError: there is none.
    """
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise SparsecError(
                f"the environment variable CC names '{chosen[0]}', which is not an installed program: "
                f"unset it or install a C compiler ({_INSTALL})"
            )
        return tuple(chosen)
    for command in ("cc", "gcc", "clang"):
        if shutil.which(command) is not None:
            return (command,)
    raise SparsecError(
        "no C compiler was found (cc, gcc or clang), which linking the operator library needs: "
        f"install one ({_INSTALL}) or name it in the environment variable CC"
    )


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if result.returncode:
        last = "\n".join(result.stdout.strip().splitlines()[-8:])
        raise SparsecError(
            f"the C compiler '{command[0]}' could not link the operator library "
            f"(exit code {result.returncode}); its last lines:\n{last}"
        )


def _objects(kernels: Sequence[Kernel]) -> dict[str, bytes]:
    """The object file of each symbol, once, in the order of first use."""
    objects: dict[str, bytes] = {}
    for kernel in kernels:
        _check(kernel)
        for variant in kernel.cpu:
            if objects.setdefault(variant.symbol, variant.code) != variant.code:
                raise ValueError(f"kernel '{kernel.name}': symbol '{variant.symbol}' stands for two different codes")
    if len({kernel.name for kernel in kernels}) < len(kernels):
        raise ValueError("two kernels have the same name")
    return objects


def _check(kernel: Kernel) -> None:
    """The operator relies on its table and does not check it."""
    rows, cols = kernel.block
    if not (1 <= rows <= kernel.out_features and 1 <= cols <= kernel.in_features and kernel.panel >= 1):
        raise ValueError(f"kernel '{kernel.name}': blocks of {rows}x{cols} do not fit its weight")
    limits = [variant.max_rows for variant in kernel.cpu]
    if not limits or limits != sorted(set(limits)) or limits[-1] != ANY_ROWS:
        raise ValueError(f"kernel '{kernel.name}': max_rows must rise from variant to variant and end with ANY_ROWS")
    for variant in kernel.cpu:
        if min(variant.row_grain, variant.parts_per_thread) < 1 or variant.workspace < 0:
            raise ValueError(f"kernel '{kernel.name}': variant '{variant.symbol}' has an impossible size")
        if not re.fullmatch(r"[A-Za-z_]\w*", variant.symbol, re.ASCII):
            raise ValueError(f"kernel '{kernel.name}': '{variant.symbol}' is not a C identifier")


def _table(kernels: Sequence[Kernel], requires: Sequence[str]) -> str:
    """`table.c`: what `sparse_linear.h` declares and each library has its own of."""
    symbols = dict.fromkeys(variant.symbol for kernel in kernels for variant in kernel.cpu)
    lines = ['#include "sparse_linear.h"', ""]
    lines += [f"extern TvmFunction __tvm_ffi_{symbol};" for symbol in symbols]
    for i, kernel in enumerate(kernels):
        lines += ["", f"static const Variant variants_{i}[] = {{"]
        lines += [f"    {_variant_row(variant)}," for variant in kernel.cpu]
        lines += ["};"]
    lines += ["", "const Kernel sparsec_kernels[] = {"]
    lines += [f"    {_kernel_row(kernel, i)}," for i, kernel in enumerate(kernels)]
    lines += ["    {0},", "};", "", "const char *sparsec_missing_instructions(void) {"]
    if requires:
        lines += ["    __builtin_cpu_init();"]
    for name in requires:
        literal = _c_string(name)
        lines += [f"    if (!__builtin_cpu_supports({literal}))", f"        return {literal};"]
    lines += ["    return NULL;", "}", ""]
    return "\n".join(lines)


def _variant_row(variant: CpuVariant) -> str:
    limit = "INT64_MAX" if variant.max_rows == ANY_ROWS else str(variant.max_rows)
    sizes = f"{variant.row_grain}, {variant.workspace}, {variant.parts_per_thread}"
    return f"{{__tvm_ffi_{variant.symbol}, {limit}, {sizes}}}"


def _kernel_row(kernel: Kernel, index: int) -> str:
    rows, cols = kernel.block
    sizes = f"{kernel.in_features}, {kernel.out_features}, {rows}, {cols}, {kernel.panel}"
    epilogue = f"{int(kernel.epilogue.bias)}, {int(kernel.epilogue.residual)}"
    return f"{{{_c_string(kernel.name)}, {sizes}, {epilogue}, variants_{index}}}"


def _c_string(text: str) -> str:
    """A C string literal. Bytes that are not plain are written in octal, which unlike hexadecimal ends by itself."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\?' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'
