"""CPUs, by LLVM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...ir import UsageError

# Instruction sets that LLVM may use for a CPU and that a library can ask the processor for, under names that LLVM and
# C compilers share.
_X86_SETS = (
    "sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "avx", "avx2", "fma", "bmi", "bmi2", "avx512f", "avx512cd",
    "avx512vl", "avx512bw", "avx512dq", "avx512vnni", "avx512bf16", "avx512vbmi", "avx512vbmi2", "avx512bitalg",
    "avx512vpopcntdq", "avxvnni", "gfni", "vaes", "vpclmulqdq",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CpuTarget:
    """A CPU.

    Attributes:
        cpu: LLVM's name for it, such as "znver4", "x86-64-v3" or "neoverse-n1".
        arch: "x86_64" or "aarch64".
        lanes: float32 of its widest vector.
        requires: instruction sets that the code may use; the library asks the processor for them before it runs.
        host: True when it is the machine that sparsec runs on, so that kernels can be measured.
    """

    cpu: str
    arch: str
    lanes: int
    requires: tuple[str, ...]
    host: bool

    def __str__(self) -> str:
        return f"cpu:{self.cpu}"

    @property
    def tvm(self) -> dict[str, Any]:
        """The target as TVM wants it."""
        return _llvm(self.arch, self.cpu)


def parse_cpu(name: str = "") -> CpuTarget:
    """The CPU with LLVM's name `name`; without one the processor of this machine.

    Raises:
        UsageError: LLVM knows no such CPU.
    """
    from tvm.target import codegen

    host = str(codegen.llvm_get_system_cpu())
    name = name or host
    host_arch = _host_arch()
    for arch in sorted(("x86_64", "aarch64"), key=lambda arch: arch != host_arch):
        if (name == host and arch == host_arch) or _exists(arch, name):
            return _describe(arch, name, host=name == host and arch == host_arch)
    raise UsageError(
        f"target 'cpu:{name}': LLVM knows no 64-bit CPU '{name}'; examples: x86-64-v3, znver4, sapphirerapids, "
        "neoverse-n1"
    )


def _host_arch() -> str:
    import platform

    return {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())


def _llvm(arch: str, cpu: str) -> dict[str, Any]:
    return {"kind": "llvm", "mtriple": f"{arch}-unknown-linux-gnu", "mcpu": cpu}


def _exists(arch: str, cpu: str) -> bool:
    """Whether LLVM has 64-bit code for `cpu`; asked for it for a processor without, LLVM would end the process."""
    from tvm.target import Target as TvmTarget
    from tvm.target import codegen

    feature = "64bit" if arch == "x86_64" else "neon"
    return cpu in _names(arch) and bool(codegen.llvm_cpu_has_features(feature, TvmTarget(_llvm(arch, cpu))))


def _names(arch: str) -> set[str]:
    from tvm.target import Target as TvmTarget
    from tvm.target import codegen

    return {str(name) for name in codegen.llvm_get_cpu_archlist(TvmTarget(_llvm(arch, "generic")))}


def _describe(arch: str, cpu: str, host: bool) -> CpuTarget:
    from tvm.target import Target as TvmTarget
    from tvm.target import codegen

    if arch == "aarch64":
        return CpuTarget(cpu, arch, 4, (), host)
    target = TvmTarget(_llvm(arch, cpu))
    sets = tuple(name for name in _X86_SETS if codegen.llvm_cpu_has_features(name, target))
    lanes = 16 if "avx512f" in sets else 8 if "avx2" in sets else 4
    return CpuTarget(cpu, arch, lanes, sets, host)
