"""Kernels to `libsparsec_ops.so`, the custom-op library that ONNX Runtime loads: it needs nothing else at run time.

    kernels ─▶ table.c (names, sizes, variants) ┐
    CPU variants' object files ─────────────────┤
    CUDA variants' images ─▶ images.s ──────────┼─ C compiler ─▶ one shared library, exporting RegisterCustomOps
    the operator's C files in this folder ──────┘

It is linked once and runs with any ONNX Runtime from 1.17 on, on GPUs from 1.18 on. It finds NVIDIA's driver when a
session with the CUDA provider creates its first node, and needs none before.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ...ir.errors import SparsecError
from ...ir.values import Floats
from ...ir.values.floats import DTYPES
from ..kernel import ANY_ROWS, CUDA_ARGUMENTS
from ..problem import INTEGERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..kernel import CpuVariant, CudaVariant, Kernel, Launch

LIBRARY_NAME = "libsparsec_ops.so"

_SOURCES = (
    "sparse_linear.c", "node.c", "cpu_node.c", "cuda_node.c", "cuda_driver.c", "tensor.c", "tvm_runtime.c",
)  # fmt: skip

_HERE = Path(__file__).resolve().parent

# No path, time or random number may reach the file, so that equal kernels give equal bytes: hence -s and no build id.
_COMPILE = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden")
_LINK = (
    "-shared", "-s",
    "-Wl,--version-script=exports.map", "-Wl,--build-id=none", "-Wl,--no-undefined", "-Wl,--as-needed",
)  # fmt: skip

# dlopen is there in glibc before 2.34. Linkers for later ones would leave the file out: see cuda_driver.c.
_LIBRARIES = ("-lm", "-Wl,--no-as-needed", "-l:libdl.so.2", "-Wl,--as-needed")

# TVM's objects export their own symbols; hiding them lets several libraries live in one process.
_EXPORTS = "{ global: RegisterCustomOps; local: *; };\n"

# As in `sparse_linear.h`.
_TYPES = {
    "float32": "ORT_TENSOR_FLOAT", "float16": "ORT_TENSOR_FLOAT16", "bfloat16": "ORT_TENSOR_BFLOAT16",
    "int8": "ORT_TENSOR_INT8", "uint8": "ORT_TENSOR_UINT8",
}  # fmt: skip
_MAX_LAUNCHES = 4

# Machine code or PTX, compute capability without its dot, "a" where the code is for that one alone.
_ARCH = r"(sm|compute)_(\d{2,3})(a?)"

_INSTALL = "apt install gcc libc6-dev on Debian or Ubuntu, dnf install gcc on Fedora, xcode-select --install on macOS"


def build_library(kernels: Sequence[Kernel], out: Path, requires: Sequence[str] = ()) -> None:
    """Link `kernels`, which may be none, into the shared library `out`; the same arguments give the same bytes.

    A library that a running process has loaded may be replaced: `out` becomes a new file, the old one stays intact.

    Args:
        kernels: their names must differ; variants of the same symbol must have the same code; either all have variants
            for GPUs or none has.
        out: the file to write; its folder must exist.
        requires: x86 instruction sets that the code uses, such as "avx512f"; registering the library on a processor
            without them is an error of one sentence, not a crash.

    Raises:
        SparsecError: there is no C compiler, or it fails.
        ValueError: the kernels contradict each other or their own description.
    """
    compiler = find_compiler()
    objects, images = _code(kernels)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        folder = Path(name)
        numbers = {symbol: i for i, symbol in enumerate(images)}
        (folder / "table.c").write_text(_table(kernels, objects, numbers, requires), encoding="utf-8")
        (folder / "exports.map").write_text(_EXPORTS, encoding="utf-8")
        for i, code in enumerate(objects.values()):
            (folder / f"{i}.o").write_bytes(code)
        for i, image in enumerate(images.values()):
            (folder / f"{i}.image").write_bytes(image)
        (folder / "images.s").write_text(_assembly(len(images)), encoding="utf-8")
        operator = _operator(compiler)
        for file, code in operator.items():
            (folder / file).write_bytes(code)
        inputs = [*operator, "table.c", "images.s", *(f"{i}.o" for i in range(len(objects)))]
        _run([*compiler, *_COMPILE, *_LINK, f"-I{_HERE}", *inputs, *_LIBRARIES, "-o", LIBRARY_NAME], folder)
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


@lru_cache(maxsize=4)
def _operator(compiler: tuple[str, ...]) -> dict[str, bytes]:
    """The object files of the operator, which every library has: a model is compiled with several."""
    with tempfile.TemporaryDirectory() as name:
        _run([*compiler, *_COMPILE, "-c", *(str(_HERE / source) for source in _SOURCES)], Path(name))
        return {path.name: path.read_bytes() for path in sorted(Path(name).glob("*.o"))}


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
            f"the C compiler '{command[0]}' could not make the operator library "
            f"(exit code {result.returncode}); its last lines:\n{last}"
        )


def _code(kernels: Sequence[Kernel]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The object file of each CPU variant's symbol and the image of each CUDA variant's, in the order of first use."""
    objects: dict[str, bytes] = {}
    images: dict[str, bytes] = {}
    for kernel in kernels:
        _check(kernel)
        code = [(objects, variant.symbol, variant.code) for variant in kernel.cpu]
        code += [(images, variant.symbol, variant.image) for variant in kernel.cuda]
        for found, symbol, content in code:
            if found.setdefault(symbol, content) != content:
                raise ValueError(f"kernel '{kernel.name}': symbol '{symbol}' stands for two different codes")
    if len({kernel.name for kernel in kernels}) < len(kernels):
        raise ValueError("two kernels have the same name")
    if len({bool(kernel.cuda) for kernel in kernels}) > 1:
        raise ValueError("some kernels have variants for GPUs and some have none")
    return objects, images


def _check(kernel: Kernel) -> None:
    """The operator relies on its table and does not check it."""
    rows, cols = kernel.block
    if not (1 <= rows <= kernel.out_features and 1 <= cols <= kernel.in_features and kernel.panel >= 1):
        raise ValueError(f"kernel '{kernel.name}': blocks of {rows}x{cols} do not fit its weight")
    if kernel.dtype not in DTYPES:
        raise ValueError(f"kernel '{kernel.name}': dtype '{kernel.dtype}', expected one of {', '.join(DTYPES)}")
    if kernel.y == "uint8" and kernel.epilogue.residual:
        raise ValueError(f"kernel '{kernel.name}': a result of uint8 with a residual, which nothing can broadcast")
    if not kernel.cpu and (kernel.dtype == "float32" or not kernel.cuda):
        raise ValueError(f"kernel '{kernel.name}' has no variants for CPUs")
    _check_limits(kernel, kernel.cpu)
    for variant in kernel.cpu:
        if min(variant.row_grain, variant.parts_per_thread) < 1 or variant.workspace < 0:
            raise ValueError(f"kernel '{kernel.name}': variant '{variant.symbol}' has an impossible size")
        if not re.fullmatch(r"[A-Za-z_]\w*", variant.symbol, re.ASCII):
            raise ValueError(f"kernel '{kernel.name}': '{variant.symbol}' is not a C identifier")
    architectures = [(arch, tuple(group)) for arch, group in groupby(kernel.cuda, lambda variant: variant.arch)]
    if len({arch for arch, _ in architectures}) < len(architectures):
        raise ValueError(f"kernel '{kernel.name}': the variants of an architecture must stand together")
    for arch, group in architectures:
        if not re.fullmatch(_ARCH, arch):
            raise ValueError(f"kernel '{kernel.name}': '{arch}' is no architecture such as sm_80, sm_90a or compute_90")
        _check_limits(kernel, group)
        for gpu_variant in group:
            _check_launches(kernel, gpu_variant)


def _check_limits(kernel: Kernel, variants: Sequence[CpuVariant | CudaVariant]) -> None:
    limits = [variant.max_rows for variant in variants]
    if limits and (limits != sorted(set(limits)) or limits[-1] != ANY_ROWS):
        raise ValueError(f"kernel '{kernel.name}': max_rows must rise from variant to variant and end with ANY_ROWS")


def _check_launches(kernel: Kernel, variant: CudaVariant) -> None:
    where = f"kernel '{kernel.name}': variant '{variant.symbol}'"
    if not 1 <= len(variant.launches) <= _MAX_LAUNCHES:
        raise ValueError(f"{where} has {len(variant.launches)} launches, expected 1 to {_MAX_LAUNCHES}")
    if variant.workspace < 0:
        raise ValueError(f"{where} has an impossible size")
    for launch in variant.launches:
        sizes = (launch.units, launch.tile_rows, launch.threads)
        if min(sizes) < 1 or max(sizes) >= 2**31 or not 0 <= launch.shared_bytes < 2**31 or launch.blocks_per_sm < 0:
            raise ValueError(f"{where}: launch '{launch.entry}' has an impossible size")
        if not set(launch.arguments) <= set(CUDA_ARGUMENTS) or len(set(launch.arguments)) < len(launch.arguments):
            raise ValueError(f"{where}: launch '{launch.entry}' has an unknown argument, or one twice")


def _assembly(images: int) -> str:
    """`images.s`: the images as they are; as C arrays they would take the compiler a second a megabyte."""
    # The note says that the code needs no executable stack.
    lines = ['.section .note.GNU-stack,"",%progbits', '.section .rodata.images,"a",%progbits']
    for i in range(images):
        symbol = f"sparsec_image_{i}"
        lines += ["", ".balign 64", f".globl {symbol}", f".hidden {symbol}", f"{symbol}:", f'.incbin "{i}.image"']
    return "\n".join([*lines, ""])


def _table(
    kernels: Sequence[Kernel], symbols: Iterable[str], images: Mapping[str, int], requires: Sequence[str]
) -> str:
    """`table.c`: what `sparse_linear.h` declares and each library has its own of.

    Args:
        kernels: in the table's order.
        symbols: of the CPU variants.
        images: number of the image of each symbol of the CUDA variants.
        requires: as for `build_library`.
    """
    lines = ['#include "sparse_linear.h"', ""]
    lines += [f"extern TvmFunction __tvm_ffi_{symbol};" for symbol in symbols]
    lines += [f"HIDDEN extern const char sparsec_image_{i}[];" for i in images.values()]
    for i, kernel in enumerate(kernels):
        if kernel.cpu:
            lines += ["", f"static const CpuVariant cpu_{i}[] = {{"]
            lines += [f"    {_cpu_row(variant)}," for variant in kernel.cpu]
            lines += ["};"]
        if kernel.cuda:
            lines += ["", f"static const CudaVariant cuda_{i}[] = {{"]
            lines += [f"    {_cuda_row(variant, images[variant.symbol])}," for variant in kernel.cuda]
            lines += ["    {0},", "};"]
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


def _rows(limit: int) -> str:
    return "INT64_MAX" if limit == ANY_ROWS else str(limit)


def _cpu_row(variant: CpuVariant) -> str:
    sizes = f"{variant.row_grain}, {variant.workspace}, {variant.parts_per_thread}"
    return f"{{__tvm_ffi_{variant.symbol}, {_rows(variant.max_rows)}, {sizes}}}"


def _cuda_row(variant: CudaVariant, image: int) -> str:
    match = re.fullmatch(_ARCH, variant.arch)
    assert match is not None, "the kernel was checked"
    kind, capability, exact = match.groups()
    flags = f"{capability}, {int(bool(exact))}, {int(kind == 'compute')}"
    sizes = f"{_rows(variant.max_rows)}, {variant.workspace}"
    launches = ", ".join(_launch_row(launch) for launch in variant.launches)
    code = f"sparsec_image_{image}, {len(variant.launches)}, {{{launches}}}"
    return f"{{{_c_string(variant.arch)}, {flags}, {sizes}, {code}}}"


def _launch_row(launch: Launch) -> str:
    # A C array cannot be initialised with nothing.
    arguments = ", ".join(f"CUDA_{name.upper()}" for name in launch.arguments) or "0"
    sizes = f"{launch.units}, {launch.tile_rows}, {launch.threads}, {launch.shared_bytes}, {launch.blocks_per_sm}"
    return f"{{{_c_string(launch.entry)}, {len(launch.arguments)}, {{{arguments}}}, {sizes}}}"


def _kernel_row(kernel: Kernel, index: int) -> str:
    rows, cols = kernel.block
    sizes = f"{kernel.in_features}, {kernel.out_features}, {rows}, {cols}, {kernel.panel}"
    values = kernel.kind or Floats(kernel.dtype)
    x, y = ("uint8" if name == "uint8" else kernel.dtype for name in (kernel.x, kernel.y))
    types = ", ".join(_TYPES[name] for name in (kernel.dtype, x, values.dtype.name, y))
    table = values.table_size((kernel.out_features, kernel.in_features), -(-rows // kernel.panel) * kernel.panel)
    formats = f"{values.bits}, {table}, {int(kernel.x in INTEGERS)}, {int(kernel.x in ('static', 'uint8'))}"
    epilogue = f"{int(kernel.epilogue.bias)}, {int(kernel.epilogue.residual)}"
    variants = f"{f'cpu_{index}' if kernel.cpu else 'NULL'}, {f'cuda_{index}' if kernel.cuda else 'NULL'}"
    return f"{{{_c_string(kernel.name)}, {sizes}, {types}, {formats}, {epilogue}, {variants}}}"


def _c_string(text: str) -> str:
    """A C string literal. Bytes that are not plain are written in octal, which unlike hexadecimal ends by itself."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\?' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'
