"""The machine that kernels are compiled for: a CPU, and on request NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir import UsageError
from .cpu import CpuTarget, parse_cpu
from .cuda import CudaTarget, parse_cuda


@dataclass(frozen=True, slots=True)
class Target:
    """What one library holds kernels for.

    Attributes:
        cpu: always there, so that the library also runs where no GPU is.
        cuda: architectures of NVIDIA GPUs, oldest first; empty for a CPU target.
    """

    cpu: CpuTarget
    cuda: tuple[CudaTarget, ...] = ()

    def __str__(self) -> str:
        return "cuda:" + "+".join(gpu.arch for gpu in self.cuda) if self.cuda else str(self.cpu)


def parse_target(text: str) -> Target:
    """`cpu` or `auto`, `cpu:NAME` with LLVM's name of one, `cuda`, or `cuda:sm_XY` with one or more architectures.

    Raises:
        UsageError: no such target.
    """
    kind, _, name = text.partition(":")
    if text in ("auto", "cpu") or (kind == "cpu" and name):
        return Target(parse_cpu(name))
    if text == "cuda" or (kind == "cuda" and name):
        return Target(parse_cpu(), parse_cuda(name))
    raise UsageError(
        f"target '{text}': expected auto, cpu, cpu:NAME such as cpu:x86-64-v3 or cpu:neoverse-n1, cuda, "
        "or cuda:ARCH such as cuda:sm_90 or cuda:sm_80+sm_90"
    )


__all__ = ["CpuTarget", "CudaTarget", "Target", "parse_cpu", "parse_cuda", "parse_target"]
