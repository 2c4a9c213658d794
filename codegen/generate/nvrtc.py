"""CUDA C++ to machine code for NVIDIA GPUs, by NVRTC or else by nvcc; needs neither a GPU nor its driver.

NVRTC and CUDA's headers come with `pip install 'sparsec[cuda]'`, nvcc with a CUDA toolkit. NVRTC goes first, because it
takes 0.1 seconds a kernel and nvcc takes 1.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ir.errors import SparsecError

if TYPE_CHECKING:
    from collections.abc import Callable

INSTALL = "pip install 'sparsec[cuda]', or install a CUDA toolkit and put its nvcc on PATH"

# `--prec-div=false` makes a division one reciprocal with a correction, right to 2 units in the last place for all
# float32, without the branch that exact rounding takes: 360 instead of 496 instructions for the GELU of eight values,
# whose own error is larger. The rest of `--use_fast_math` stays off: it flushes denormals, which CPUs do not, turns
# x / y into 0 for y above 2^126, and gains nothing where nearly all instructions are multiply-adds.
# ptxas keeps its default for register use: its manual promises nothing for other levels.
_FLAGS = ("--prec-div=false", "--disable-warnings")


@dataclass(frozen=True, slots=True)
class CudaCompiler:
    """A compiler for CUDA C++.

    Attributes:
        name: with its version, such as "NVRTC 13.5".
        run: takes a source, an architecture and "cubin" or "ptx"; returns the image, empty after an error, and the log.
    """

    name: str
    run: Callable[[str, str, str], tuple[bytes, str]]


def compile_cuda(source: str, arch: str, form: str) -> bytes:
    """Compile CUDA C++; the same arguments give the same bytes with the same compiler.

    Args:
        source: must not depend on headers other than CUDA's own.
        arch: such as "sm_80" or "sm_90a" for a cubin, "compute_90" for PTX.
        form: "cubin" for machine code, "ptx" for text that the driver compiles, which ends with a zero byte.

    Raises:
        SparsecError: there is no compiler, it does not know the architecture, or it fails.
    """
    compilers = find_cuda_compilers()
    if not compilers:
        raise SparsecError(f"no CUDA compiler was found, which kernels for GPUs need: {INSTALL}")
    compiler = compilers[0]
    image, log = compiler.run(source, arch, form)
    if image:
        return image
    if re.search(r"gpu[- ]architecture", log):
        raise SparsecError(
            f"{compiler.name} cannot compile for {arch}: choose another architecture, or another version of the "
            f"compiler ({INSTALL})"
        )
    last = "\n".join(log.strip().splitlines()[-8:])
    raise SparsecError(
        f"{compiler.name} cannot compile a kernel for {arch}, which is a bug of sparsec; its last lines:\n{last}"
    )


def find_cuda_compilers() -> tuple[CudaCompiler, ...]:
    """The compilers that are installed, the one to use first; may be empty."""
    return tuple(compiler for compiler in (_find_nvrtc(), _find_nvcc()) if compiler)


def _find_nvrtc() -> CudaCompiler | None:
    try:
        from cuda.bindings import nvrtc
        from cuda.pathfinder import find_nvidia_header_directory

        # Where the library itself is missing, the first call fails.
        _, major, minor = nvrtc.nvrtcVersion()
        headers = [find_nvidia_header_directory(name) for name in ("cudart", "cccl")]
    except (ImportError, RuntimeError):
        return None
    if None in headers:
        return None

    def run(source: str, arch: str, form: str) -> tuple[bytes, str]:
        options = [f"--gpu-architecture={arch}", *_FLAGS, *(f"--include-path={folder}" for folder in headers)]
        return _run_nvrtc(nvrtc, source, options, form)

    return CudaCompiler(f"NVRTC {major}.{minor}", run)


def _run_nvrtc(nvrtc: Any, source: str, options: list[str], form: str) -> tuple[bytes, str]:
    def call(function: str, *arguments: Any) -> Any:
        status, *results = getattr(nvrtc, f"nvrtc{function}")(*arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise SparsecError(f"NVRTC fails: {status.name} in nvrtc{function}")
        return results[0] if results else None

    def text(what: str) -> bytes:
        buffer = bytearray(call(f"Get{what}Size", program))
        call(f"Get{what}", program, buffer)
        return bytes(buffer)

    program = call("CreateProgram", source.encode(), b"kernel.cu", 0, None, None)
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        failed = status != nvrtc.nvrtcResult.NVRTC_SUCCESS
        return b"" if failed else text(form.upper()), text("ProgramLog").rstrip(b"\0").decode(errors="replace")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _find_nvcc() -> CudaCompiler | None:
    command = shutil.which("nvcc")
    if command is None:
        return None
    try:
        done = subprocess.run(
            [command, "--version"], capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    version = re.search(r"release (\d+\.\d+)", done.stdout)
    if version is None:
        return None

    def run(source: str, arch: str, form: str) -> tuple[bytes, str]:
        return _run_nvcc(command, source, [f"--gpu-architecture={arch}", *_FLAGS], form)

    return CudaCompiler(f"nvcc {version[1]}", run)


def _run_nvcc(command: str, source: str, options: list[str], form: str) -> tuple[bytes, str]:
    # The names of the files are relative, so that no path reaches the image.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kernel.cu").write_text(source, encoding="utf-8")
        done = subprocess.run(
            [command, f"--{form}", *options, "--output-file", "image", "kernel.cu"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode:
            return b"", done.stdout
        end = b"\0" if form == "ptx" else b""
        return (folder / "image").read_bytes() + end, done.stdout


@dataclass(frozen=True, slots=True)
class Resources:
    """What a device function takes of a multiprocessor.

    Attributes:
        registers: a thread.
        stack_bytes: a thread, in local memory: registers that were spilled, and arrays that are indexed at run time.
    """

    registers: int
    stack_bytes: int


# Attributes of a symbol in the section .nv.info: EIATTR_REGCOUNT and EIATTR_FRAME_SIZE, as cuobjdump names them.
_REGISTERS, _FRAME_BYTES = 0x2F, 0x11


def resources(cubin: bytes) -> dict[str, Resources]:
    """What each device function in a cubin takes, by its name."""
    sections = _sections(cubin)
    names, symbols = sections[".strtab"], sections[".symtab"]
    numbers: dict[str, dict[int, int]] = {}
    info, at = sections[".nv.info"], 0
    while at < len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, at)
        # Only kind 4 has a value of `size` bytes; the others have theirs in place of the size.
        if kind == 4 and attribute in (_REGISTERS, _FRAME_BYTES):
            symbol, number = struct.unpack_from("<II", info, at + 4)
            (name,) = struct.unpack_from("<I", symbols, 24 * symbol)
            numbers.setdefault(_string(names, name), {})[attribute] = number
        at += 4 + (size if kind == 4 else 0)
    return {name: Resources(found[_REGISTERS], found.get(_FRAME_BYTES, 0)) for name, found in numbers.items()}


def _sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit ELF file by name."""
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, count, names_index = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    names = elf[headers[names_index][4] :]
    return {_string(names, header[0]): elf[header[4] : header[4] + header[5]] for header in headers}


def _string(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode()
