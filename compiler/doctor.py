"""What this machine has of what sparsec needs, and what is wrong with it."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..ir import SparsecError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Packages by the name to install and the name to import.
_PACKAGES = (("apache-tvm", "tvm"), ("onnx", "onnx"), ("onnx-ir", "onnx_ir"), ("numpy", "numpy"))
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_VECTORS = {16: "AVX-512", 8: "AVX2", 4: "128-bit"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: such as "C compiler".
        value: what is there, "" for nothing.
        problem: a sentence that says what is wrong and what to do, or "". sparsec cannot work with a problem.
    """

    name: str
    value: str
    problem: str = ""


def examine(cache: Path | None = None) -> tuple[Finding, ...]:
    """Look at everything. `cache` is the folder of the tuning database, None for the user's."""
    checks: list[Callable[[], Finding]] = [
        lambda: Finding("sparsec", __version__),
        lambda: Finding("Python", f"{platform.python_version()} ({sys.executable})"),
        lambda: Finding("system", f"{platform.system()} {platform.machine()}, {platform.libc_ver()[1] or 'no glibc'}"),
        *(lambda name=name, module=module: _package(name, module) for name, module in _PACKAGES),
        _onnxruntime,
        _processor,
        _cores,
        _compiler,
        _gpu,
        _cuda_compiler,
        lambda: _database(cache),
    ]
    return tuple(check() for check in checks)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _import_failure(module: str) -> str:
    """Why `module` cannot be imported, or "". A broken installation can raise anything."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


def _package(package: str, module: str) -> Finding:
    version = _version(package)
    if not version:
        return Finding(package, "", f"it is not installed: pip install {package}")
    failure = _import_failure(module)
    problem = f"it cannot be imported ({failure}): pip install --force-reinstall {package}" if failure else ""
    return Finding(package, version, problem)


def _onnxruntime() -> Finding:
    found = {package: _version(package) for package in _RUNTIMES}
    value = ", ".join(f"{package} {version}" for package, version in found.items() if version)
    if not value:
        return Finding("ONNX Runtime", "", "it is not installed: pip install onnxruntime")
    if all(found.values()):
        problem = (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            f"pip uninstall {' '.join(_RUNTIMES)}, then install one of them again"
        )
        return Finding("ONNX Runtime", value, problem)
    failure = _import_failure("onnxruntime")
    return Finding("ONNX Runtime", value, f"it cannot be imported ({failure}): install it again" if failure else "")


def _processor() -> Finding:
    try:
        from ..codegen.target import parse_cpu

        target = parse_cpu()
    except (ImportError, OSError, AttributeError, SparsecError) as error:
        return Finding("processor", platform.machine(), f"its kind cannot be found without TVM ({error})")
    vectors = _VECTORS.get(target.lanes, f"{32 * target.lanes}-bit")
    return Finding("processor", f"{target}, {vectors} ({target.lanes} float32 a vector)")


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    value = f"{usable} usable of {os.cpu_count()}"
    quota = _quota()
    if quota is not None and quota < usable:
        value += f", limited to the time of {quota:g} by this container: use --threads {max(1, int(quota))}"
    return Finding("cores", value)


def _quota() -> float | None:
    """Cores' worth of time that the container may use, where it is limited."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def _compiler() -> Finding:
    from ..codegen.ort.library import find_compiler

    try:
        command = find_compiler()
        done = subprocess.run(
            [*command, "--version"], capture_output=True, encoding="utf-8", errors="replace", timeout=10
        )
    except (SparsecError, OSError, subprocess.SubprocessError) as error:
        return Finding("C compiler", "", str(error))
    first = (done.stdout.splitlines() or [""])[0]
    problem = f"'{' '.join(command)} --version' fails with exit code {done.returncode}" if done.returncode else ""
    return Finding("C compiler", f"{' '.join(command)}: {first}", problem)


def _gpu() -> Finding:
    """Without a GPU sparsec works too: it compiles for CPUs, and for GPUs without measuring."""
    from ..codegen.target.cuda import find_driver, target_of

    driver = find_driver()
    if driver is None:
        return Finding("GPU", "none: no NVIDIA driver")
    about = f"driver for CUDA {driver.cuda}"
    if not driver.gpus:
        reason = f" (CUDA error {driver.failure})" if driver.failure else ""
        return Finding("GPU", f"none that CUDA can use{reason}, {about}")
    words = [
        f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        + ("" if target_of(gpu) else " (no kernels for it)")
        for gpu in driver.gpus
    ]
    return Finding("GPU", "; ".join([*dict.fromkeys(words), about]))


def _cuda_compiler() -> Finding:
    """Nothing but kernels for GPUs needs one."""
    from ..codegen.generate.nvrtc import INSTALL, find_cuda_compilers

    names = ", ".join(compiler.name for compiler in find_cuda_compilers())
    return Finding("CUDA compiler", names or f"none, which kernels for GPUs need: {INSTALL}")


def _database(cache: Path | None) -> Finding:
    from ..codegen.tune.database import Database, default_path

    path = default_path() if cache is None else cache / default_path().name
    if not path.exists():  # looking must not create it
        return Finding("tuning database", f"{path} (none yet)")
    return Finding("tuning database", f"{path}: {Database(path).count():,} records")


def to_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """Plain data, ready for JSON."""
    return {"ok": not any(finding.problem for finding in findings), "findings": [asdict(f) for f in findings]}
