"""NVIDIA GPUs, by architecture: what their kernels may use, and what a prediction reckons with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...ir import UsageError


@dataclass(frozen=True, slots=True)
class CudaTarget:
    """One architecture, with the limits of a device that has it.

    Attributes:
        arch: as NVRTC wants it, such as "sm_80" or "sm_90a".
        capability: compute capability, major and minor.
        shared_bytes: shared memory that one thread block may have.
        sms: multiprocessors.
        l2_bytes: second-level cache.
        bandwidth: of its memory, bytes a second.
        flops: operations a second by the dtype of the operands: "float32" on the plain cores, "tfloat32", "float16"
            and "bfloat16" on the tensor cores with float32 sums.
        model: the device that the last four are of, by its datasheet where `device` is None.
        device: number of the device in this machine that has this architecture; None where there is none.
    """

    arch: str
    capability: tuple[int, int]
    shared_bytes: int
    sms: int
    l2_bytes: int
    bandwidth: float
    flops: tuple[tuple[str, float], ...]
    model: str
    device: int | None = None

    def __str__(self) -> str:
        return f"cuda:{self.arch}"

    @property
    def tvm(self) -> dict[str, Any]:
        """The target as TVM wants it."""
        return {
            "kind": "cuda",
            "arch": self.arch,
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": self.shared_bytes,
            "thread_warp_size": 32,
        }

    def rate(self, dtype: str) -> float:
        """Operations a second with operands of `dtype`."""
        return dict(self.flops)[dtype]


def _row(
    arch: str, model: str, shared: int, sms: int, l2: int, terabytes: float, fp32: float, tf32: float, fp16: float
) -> CudaTarget:
    digits = arch.removeprefix("sm_").rstrip("a")
    rates = {"float32": fp32, "tfloat32": tf32, "float16": fp16, "bfloat16": fp16}
    return CudaTarget(
        arch=arch,
        capability=(int(digits[:-1]), int(digits[-1])),
        shared_bytes=shared << 10,
        sms=sms,
        l2_bytes=l2 << 20,
        bandwidth=terabytes * 1e12,
        flops=tuple((dtype, rate * 1e12) for dtype, rate in rates.items()),
        model=model,
    )


# Shared memory a block (KiB): CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". The rest
# are datasheet rates, without structured sparsity.
TABLE = {
    row.arch: row
    for row in (
        _row("sm_80", "NVIDIA A100 80GB", 163, 108, 40, 1.94, 19.5, 156, 312),
        _row("sm_86", "NVIDIA A40", 99, 84, 6, 0.696, 37.4, 74.8, 149.7),
        _row("sm_89", "NVIDIA L40S", 99, 142, 96, 0.864, 91.6, 183, 362),
        _row("sm_90a", "NVIDIA H200", 227, 132, 50, 4.8, 67, 494, 989),
        _row("sm_100", "NVIDIA B200", 227, 148, 126, 8.0, 75, 1125, 2250),
    )
}


def parse_cuda(name: str = "") -> tuple[CudaTarget, ...]:
    """Architectures joined by "+", such as "sm_80+sm_90"; without any, those of this machine's GPUs.

    Raises:
        UsageError: an architecture that sparsec has no kernels for, or no GPU to ask.
    """
    found = _devices()
    if not name:
        if not found:
            raise UsageError(
                "target 'cuda': this machine has no NVIDIA GPU or no driver for it; name the architecture to compile "
                "for, such as cuda:sm_90"
            )
        return tuple(found[arch] for arch in TABLE if arch in found)
    wanted = {_full_name(part): part for part in name.split("+")}
    for arch, part in wanted.items():
        if arch not in TABLE:
            known = ", ".join(arch.rstrip("a") for arch in TABLE)
            raise UsageError(f"target 'cuda:{name}': sparsec has no kernels for '{part}'; it has them for {known}")
    return tuple(found.get(arch, TABLE[arch]) for arch in TABLE if arch in wanted)


def _full_name(text: str) -> str:
    """`sm_90` means `sm_90a`: its tensor cores are reached by instructions of that architecture alone."""
    return "sm_90a" if text == "sm_90" else text


def _devices() -> dict[str, CudaTarget]:
    """The architectures of this machine's GPUs, each with the numbers of its first device."""
    return {}
