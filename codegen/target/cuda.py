"""NVIDIA GPUs, by architecture: what their kernels may use, and what a prediction reckons with."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
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
        remote: number of the device of another machine that kernels are measured on; None where there is none.
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
    remote: int | None = None

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
    found = find_devices()
    if not name:
        if not found:
            raise UsageError(
                "target 'cuda': this machine has no NVIDIA GPU that sparsec has kernels for, or no driver for it; name "
                "the architecture to compile for, such as cuda:sm_90"
            )
        return tuple(found[arch] for arch in TABLE if arch in found)
    known = ", ".join(arch.rstrip("a") for arch in TABLE)
    wanted: set[str] = set()
    for part in name.split("+"):
        arch = _full_name(part)
        if not part:
            raise UsageError(f"target 'cuda:{name}': '+' stands between two architectures out of {known}")
        if arch not in TABLE:
            raise UsageError(f"target 'cuda:{name}': sparsec has no kernels for '{part}'; it has them for {known}")
        if arch in wanted:
            raise UsageError(f"target 'cuda:{name}': '{part}' is named twice; once is enough")
        wanted.add(arch)
    return tuple(found.get(arch, TABLE[arch]) for arch in TABLE if arch in wanted)


def _full_name(text: str) -> str:
    """`sm_90` means `sm_90a`: its tensor cores are reached by instructions of that architecture alone."""
    return "sm_90a" if text == "sm_90" else text


def find_devices() -> dict[str, CudaTarget]:
    """The architectures of this machine's GPUs, each with the numbers of its first device."""
    driver = find_driver()
    found: dict[str, CudaTarget] = {}
    for gpu in driver.gpus if driver else ():
        target = target_of(gpu)
        if target is not None:
            found.setdefault(target.arch, target)
    return found


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU of this machine, as the driver describes it; a number is 0 where it does not say.

    Attributes:
        number: as CUDA counts.
        name: such as "NVIDIA H200".
        capability: compute capability, major and minor.
        sms: multiprocessors.
        clock: of the multiprocessors, at most, in Hz.
        l2_bytes: second-level cache.
        shared_bytes: shared memory that one thread block may have.
        bandwidth: of its memory, bytes a second.
    """

    number: int
    name: str
    capability: tuple[int, int]
    sms: int
    clock: float
    l2_bytes: int
    shared_bytes: int
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Driver:
    """NVIDIA's driver.

    Attributes:
        cuda: the newest version of CUDA that it runs, such as "13.0".
        gpus: those that CUDA can use.
        failure: CUDA's number for the reason why it does not start; 0 where it does, 100 where it finds no GPU.
    """

    cuda: str
    gpus: tuple[Gpu, ...]
    failure: int = 0


# Of the enumeration CUdevice_attribute in cuda.h.
_CLOCK_KHZ, _SMS, _MEMORY_KHZ, _BUS_BITS, _L2_BYTES, _MAJOR, _MINOR, _SHARED_BYTES = 13, 16, 36, 37, 38, 75, 76, 97


def find_driver() -> Driver | None:
    """Ask NVIDIA's driver what it has; None where it is not installed."""
    library = _load_driver()
    if library is None:
        return None
    version = _number(library.cuDriverGetVersion)
    cuda = f"{version // 1000}.{version % 1000 // 10}"
    failure = int(library.cuInit(0))
    if failure:
        return Driver(cuda, (), failure)
    return Driver(cuda, tuple(_gpu(library, number) for number in range(_number(library.cuDeviceGetCount))))


def _load_driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _gpu(library: Any, number: int) -> Gpu:
    handle = _number(library.cuDeviceGet, number)

    def ask(attribute: int) -> int:
        return _number(library.cuDeviceGetAttribute, attribute, handle)

    name = ctypes.create_string_buffer(256)
    library.cuDeviceGetName(name, len(name), handle)
    return Gpu(
        number=number,
        name=name.value.decode(errors="replace"),
        capability=(ask(_MAJOR), ask(_MINOR)),
        sms=ask(_SMS),
        clock=ask(_CLOCK_KHZ) * 1e3,
        l2_bytes=ask(_L2_BYTES),
        shared_bytes=ask(_SHARED_BYTES),
        bandwidth=2 * ask(_MEMORY_KHZ) * 1e3 * ask(_BUS_BITS) / 8,  # memory moves data on both edges of its clock
    )


def _number(function: Any, *arguments: int) -> int:
    """The number that a function of the driver writes to its first argument, or 0 after an error."""
    value = ctypes.c_int()
    return 0 if function(ctypes.byref(value), *arguments) else value.value


def target_of(gpu: Gpu) -> CudaTarget | None:
    """The target that `gpu` is: the newest architecture whose code it runs, with its own numbers; None without one."""
    rows = [row for row in TABLE.values() if _runs(gpu.capability, row)]
    if not rows:
        return None
    row = max(rows, key=lambda row: row.capability)
    # float32 multiply-adds a cycle of one multiprocessor, two operations each.
    cores = 64 if row.capability == (8, 0) else 128
    clock = row.rate("float32") / (row.sms * cores * 2)
    scale = (gpu.sms or row.sms) / row.sms * (gpu.clock or clock) / clock
    return replace(
        row,
        shared_bytes=min(gpu.shared_bytes or row.shared_bytes, row.shared_bytes),
        sms=gpu.sms or row.sms,
        l2_bytes=gpu.l2_bytes or row.l2_bytes,
        bandwidth=gpu.bandwidth or row.bandwidth,
        flops=tuple((dtype, rate * scale) for dtype, rate in row.flops),
        model=gpu.name,
        device=gpu.number,
    )


def _runs(capability: tuple[int, int], row: CudaTarget) -> bool:
    """Machine code runs on its own generation from its own version on; with an "a" on its own version alone."""
    if row.arch.endswith("a"):
        return capability == row.capability
    return capability[0] == row.capability[0] and capability >= row.capability
