"""A GPU through the CUDA driver's C interface: enough to load a variant, run it and time it.

Needs NVIDIA's driver and numpy; no CUDA toolkit, TVM or ONNX. All work goes through one stream of the device's primary
context, which PyTorch and ONNX Runtime use too, so their buffers and ours may meet.

A kernel that reads or writes outside its memory makes every later CUDA call of the process fail with the same error
(CUDA calls this "sticky"); only a new process helps.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ....ir.errors import SparsecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from ...kernel import CudaVariant, Launch

_INT, _HANDLE = POINTER(c_int), POINTER(c_void_p)
# What is called, with the types of its arguments; all return an error code. Device addresses are 64-bit integers.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (_INT,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (_INT,),
    "cuDeviceGet": (_INT, c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (_INT, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_HANDLE, c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuStreamCreate": (_HANDLE, c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (_HANDLE, c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuModuleLoadData": (_HANDLE, c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (_HANDLE, c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p),
}

# Of the enumerations CUdevice_attribute, CUfunction_attribute and CUstream_flags in cuda.h.
_SMS, _L2_BYTES, _MAJOR, _MINOR, _SHARED_BYTES = 16, 38, 75, 76, 97
_MAX_DYNAMIC_SHARED = 8
_NON_BLOCKING = 1
# Dynamic shared memory that a kernel may have without asking.
_PLAIN_SHARED_BYTES = 48 << 10


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    """NVIDIA's driver, initialised.

    Raises:
        SparsecError: it is not installed, or finds no GPU.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SparsecError(
            f"this machine has no NVIDIA driver ({error}): a GPU kernel can be compiled here but not run; "
            "install the driver, or run on a machine with a GPU"
        ) from error
    for name, types in _FUNCTIONS.items():
        getattr(library, name).argtypes = types
    _check(library, library.cuInit(0), "starting NVIDIA's driver")
    return library


def _check(library: ctypes.CDLL, code: int, doing: str) -> None:
    """Raise a SparsecError with CUDA's name for `code`, where it is an error."""
    if code:
        texts = c_char_p(), c_char_p()
        library.cuGetErrorName(code, byref(texts[0]))
        library.cuGetErrorString(code, byref(texts[1]))
        name, text = ((t.value or b"unknown error").decode() for t in texts)
        raise SparsecError(f"{doing} failed: {name} ({text})")


def gpu_count() -> int:
    """GPUs in this machine that CUDA can use; 0 where there is no driver."""
    count = c_int()
    try:
        driver = _driver()
        _check(driver, driver.cuDeviceGetCount(byref(count)), "counting GPUs")
    except SparsecError:
        return 0
    return count.value


def open_device(number: int = 0) -> Device:
    """The GPU of that number, opened once a process and made the current one of this thread.

    Raises:
        SparsecError: no driver, or no such GPU.
    """
    device = _opened(number)
    device.check("cuCtxSetCurrent", device.context, doing="choosing the GPU")
    return device


@cache
def _opened(number: int) -> Device:
    return Device(number)


class Device:
    """One GPU; made by `open_device`, and held until the process ends.

    Attributes:
        number: as CUDA counts.
        name: such as "NVIDIA H200".
        capability: compute capability, major and minor.
        sms: multiprocessors.
        l2_bytes: second-level cache.
        shared_bytes: shared memory that one thread block may have.
        driver_version: the CUDA version that the driver offers, major and minor.
        context, stream: handles; PyTorch takes the stream as `torch.cuda.ExternalStream(device.stream)`.
    """

    def __init__(self, number: int) -> None:
        self._driver = _driver()
        self.number, self.name = number, f"GPU {number}"
        device, version, context, stream = c_int(), c_int(), c_void_p(), c_void_p()
        self.check("cuDeviceGet", byref(device), number, doing="opening it")
        name = ctypes.create_string_buffer(256)
        self.check("cuDeviceGetName", name, len(name), device, doing="asking its name")
        self.name = name.value.decode()
        attributes = []
        for attribute in (_MAJOR, _MINOR, _SMS, _L2_BYTES, _SHARED_BYTES):
            value = c_int()
            self.check("cuDeviceGetAttribute", byref(value), attribute, device, doing="asking its limits")
            attributes.append(value.value)
        major, minor, self.sms, self.l2_bytes, self.shared_bytes = attributes
        self.capability = (major, minor)
        self.check("cuDriverGetVersion", byref(version), doing="asking the driver's version")
        self.driver_version = (version.value // 1000, version.value % 1000 // 10)
        self.check("cuDevicePrimaryCtxRetain", byref(context), device, doing="opening its primary context")
        self.context = context.value
        self.check("cuCtxSetCurrent", self.context, doing="choosing the GPU")
        self.check("cuStreamCreate", byref(stream), _NON_BLOCKING, doing="making a stream")
        self.stream = stream.value

    def check(self, function: str, *arguments: Any, doing: str) -> None:
        """Call the driver.

        Raises:
            SparsecError: CUDA says no; the sentence begins with the GPU and `doing`.
        """
        _check(self._driver, getattr(self._driver, function)(*arguments), f"GPU {self.number} ({self.name}): {doing}")

    def allocate(self, nbytes: int) -> Buffer:
        """Memory of the device, at least one byte; what it holds is undefined."""
        return Buffer(self, nbytes)

    def upload(self, array: NDArray[Any]) -> Buffer:
        """A copy of `array` on the device."""
        buffer = self.allocate(array.nbytes)
        buffer.write(array)
        return buffer

    def load(self, variant: CudaVariant) -> Program:
        """The variant's machine code, ready to run."""
        return Program(self, variant)

    def event(self) -> Event:
        """A point in the stream whose time can be asked."""
        return Event(self)

    def synchronize(self) -> None:
        """Wait for all work; an error in a kernel comes to light here."""
        self.check("cuStreamSynchronize", self.stream, doing="running kernels")

    def release(self, owner: object, function: str, handle: Any) -> None:
        """Give `handle` back by `function` when `owner` is gone; errors are ignored, as there may be no driver left."""
        weakref.finalize(owner, getattr(self._driver, function), handle)


class Buffer:
    """Memory of a device; freed with the object.

    Attributes:
        address: in the device's memory, aligned to 256 bytes.
        nbytes: as asked for.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        address = c_uint64()
        device.check("cuMemAlloc_v2", byref(address), max(nbytes, 1), doing=f"allocating {nbytes:,} bytes")
        self.device, self.nbytes, self.address = device, nbytes, address.value
        device.release(self, "cuMemFree_v2", self.address)

    def write(self, array: NDArray[Any]) -> None:
        """Copy `array`, of this buffer's size, to the device, once all work before is done."""
        if array.nbytes != self.nbytes:
            raise ValueError(f"an array of {array.nbytes} bytes for a buffer of {self.nbytes}")
        data = np.ascontiguousarray(array)
        arguments = (self.address, data.ctypes.data, self.nbytes, self.device.stream)
        self.device.check("cuMemcpyHtoDAsync_v2", *arguments, doing="copying to it")
        self.device.synchronize()

    def read(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """A copy of the whole buffer, once all work before is done."""
        array: NDArray[Any] = np.empty(shape, dtype=dtype)
        if array.nbytes != self.nbytes:
            raise ValueError(f"an array of {array.nbytes} bytes from a buffer of {self.nbytes}")
        arguments = (array.ctypes.data, self.address, self.nbytes, self.device.stream)
        self.device.check("cuMemcpyDtoHAsync_v2", *arguments, doing="copying from it")
        self.device.synchronize()
        return array

    def fill(self, byte: int) -> None:
        """Set every byte, in the stream; 0xFF gives NaN in each of the dtypes."""
        self.device.check(
            "cuMemsetD8Async", self.address, byte, self.nbytes, self.device.stream, doing="filling memory"
        )

    def copy(self, source: Buffer) -> None:
        """Copy another buffer of this size, in the stream."""
        arguments = (self.address, source.address, self.nbytes, self.device.stream)
        self.device.check("cuMemcpyDtoDAsync_v2", *arguments, doing="copying inside it")


class Event:
    """A point in the device's stream."""

    def __init__(self, device: Device) -> None:
        handle = c_void_p()
        device.check("cuEventCreate", byref(handle), 0, doing="making an event")
        self.device, self.handle = device, handle.value
        device.release(self, "cuEventDestroy_v2", self.handle)

    def record(self) -> None:
        """Let it mark the end of the work so far."""
        self.device.check("cuEventRecord", self.handle, self.device.stream, doing="recording an event")

    def since(self, start: Event) -> float:
        """Seconds from `start` to this event, both of which must have been reached."""
        milliseconds = c_float()
        self.device.check("cuEventElapsedTime", byref(milliseconds), start.handle, self.handle, doing="timing kernels")
        return milliseconds.value * 1e-3


class Program:
    """A variant on a device; unloaded with the object.

    Attributes:
        variant: what was loaded.
    """

    def __init__(self, device: Device, variant: CudaVariant) -> None:
        module, doing = c_void_p(), f"loading kernel '{variant.symbol}' for {variant.arch}"
        device.check("cuModuleLoadData", byref(module), variant.image, doing=doing)
        device.release(self, "cuModuleUnload", module)
        self.device, self.variant = device, variant
        self._functions = [self._function(module, launch) for launch in variant.launches]

    def _function(self, module: c_void_p, launch: Launch) -> c_void_p:
        function, doing = c_void_p(), f"finding '{launch.entry}' in kernel '{self.variant.symbol}'"
        self.device.check("cuModuleGetFunction", byref(function), module, launch.entry.encode(), doing=doing)
        if launch.shared_bytes > _PLAIN_SHARED_BYTES:
            doing = f"giving kernel '{launch.entry}' {launch.shared_bytes:,} bytes of shared memory a thread block"
            self.device.check("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, launch.shared_bytes, doing=doing)
        return function

    def workspace(self, rows: int) -> int:
        """Bytes that the argument "workspace" must have for `rows` rows of X."""
        tile = self.variant.launches[0].tile_rows
        return 4 * self.variant.workspace * -(-rows // tile) * tile

    def __call__(self, buffers: Mapping[str, Buffer], rows: int) -> None:
        """Enqueue all launches for `rows` rows of X, at least 1; `buffers` are named as in `CUDA_ARGUMENTS`."""
        for launch, function in zip(self.variant.launches, self._functions, strict=True):
            values: list[Any] = [
                c_int64(rows) if name == "rows" else c_uint64(buffers[name].address) for name in launch.arguments
            ]
            # The driver wants the addresses of the arguments.
            addresses = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            shape = (grid(launch, rows, self.device.sms), 1, 1, launch.threads, 1, 1, launch.shared_bytes)
            doing = f"launching '{launch.entry}'"
            self.device.check("cuLaunchKernel", function, *shape, self.device.stream, addresses, None, doing=doing)


def grid(launch: Launch, rows: int, sms: int) -> int:
    """Thread blocks of a launch for `rows` rows of X on a device of `sms` multiprocessors (see `Launch`)."""
    blocks = launch.units * -(-rows // launch.tile_rows)
    return min(blocks, launch.blocks_per_sm * sms) if launch.blocks_per_sm else blocks
