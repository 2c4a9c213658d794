"""Where sessions run and are timed: this machine's processor, or one of its GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..ir import SparsecError
from . import runtime
from .runtime import Comparison, Runner, open_session, run_session

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnxruntime
    from numpy.typing import NDArray

    from ..codegen.target import Target

    Feeds = Mapping[str, NDArray[Any]]


class Machine(Protocol):
    """Opens sessions, and times one against another."""

    def open(self, source: str | Path | bytes, library: Path | None = None) -> onnxruntime.InferenceSession:
        """A session with all of ONNX Runtime's optimisations on."""

    def compare(
        self, dense: onnxruntime.InferenceSession, sparse: onnxruntime.InferenceSession, feeds: Feeds, pairs: int = 7
    ) -> Comparison:
        """Both on the same inputs, alternately, `pairs` times each."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """This machine's processor.

    Attributes:
        threads: intra-op threads of every session.
    """

    threads: int

    def __str__(self) -> str:
        return "CPU"

    def open(self, source: str | Path | bytes, library: Path | None = None) -> onnxruntime.InferenceSession:
        """As `Machine.open`."""
        return open_session(source, self.threads, library)

    def compare(
        self, dense: onnxruntime.InferenceSession, sparse: onnxruntime.InferenceSession, feeds: Feeds, pairs: int = 7
    ) -> Comparison:
        """As `Machine.compare`, by the wall clock."""
        return runtime.compare(Runner(dense, feeds), Runner(sparse, feeds), pairs)


@dataclass(frozen=True, slots=True)
class Cuda:
    """One NVIDIA GPU of this machine, through ONNX Runtime's CUDA provider.

    Attributes:
        number: as CUDA counts.
    """

    number: int

    def __str__(self) -> str:
        return f"GPU {self.number}"

    def open(self, source: str | Path | bytes, library: Path | None = None) -> onnxruntime.InferenceSession:
        """As `Machine.open`; its runs go to the stream that the device's events are on, in a CUDA graph if it can be.

        Raises:
            SparsecError: the provider does not start, or refuses the model.
        """
        from ..codegen.tune.gpu.device import open_device

        stream = open_device(self.number).stream
        options = {"device_id": str(self.number), "user_compute_stream": str(stream)}
        try:
            session = open_session(source, 1, library, {**options, "enable_cuda_graph": "1"})
        except SparsecError:
            # A graph wants every node on the GPU; a model with some on the CPU runs without one.
            session = open_session(source, 1, library, options)
        if "CUDAExecutionProvider" not in session.get_providers():
            raise SparsecError(
                "ONNX Runtime's CUDA provider does not start on this machine: install onnxruntime-gpu and the versions "
                "of CUDA and cuDNN that it names, or compile on a machine without a GPU, where nothing is measured"
            )
        return session

    def compare(
        self, dense: onnxruntime.InferenceSession, sparse: onnxruntime.InferenceSession, feeds: Feeds, pairs: int = 7
    ) -> Comparison:
        """As `Machine.compare`, by the GPU's events, its second-level cache swept before each run."""
        from ..codegen.tune.gpu.device import open_device
        from ..codegen.tune.gpu.measure import alternate

        device = open_device(self.number)
        calls = [_DeviceRunner(session, feeds, self.number) for session in (dense, sparse)]
        times = alternate(device, calls)
        ratios = times[:, 0] / times[:, 1]
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        dense_us, sparse_us = np.median(times, axis=0) * 1e6
        return Comparison(float(dense_us), float(sparse_us), float(middle), (float(low), float(high)))


class _DeviceRunner:
    """One session, its inputs and outputs bound to the device; calling it enqueues a run and does not wait."""

    def __init__(self, session: onnxruntime.InferenceSession, feeds: Feeds, number: int) -> None:
        import onnxruntime

        shapes = [np.shape(output) for output in run_session(session, feeds)]
        self._session = session
        self._binding = session.io_binding()
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        # A captured graph replays on the addresses it has seen: all of them stay.
        self._kept = [onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", number) for array in feeds.values()]
        for name, value in zip(feeds, self._kept, strict=True):
            self._binding.bind_ortvalue_input(name, value)
        for output, shape in zip(session.get_outputs(), shapes, strict=True):
            dtype = runtime.numpy_dtype(output.type)
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", number)
            self._binding.bind_ortvalue_output(output.name, value)
            self._kept.append(value)

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)


def find_machine(target: Target, threads: int) -> Machine | None:
    """What of this machine the target is; None where it is another machine."""
    if not target.cuda:
        return Cpu(threads) if target.cpu.host else None
    number = next((gpu.device for gpu in target.cuda if gpu.device is not None), None)
    return None if number is None else Cuda(number)


def machine_of(manifest: Mapping[str, Any], threads: int) -> Machine:
    """Where an artifact runs on this machine: on a GPU if it was made for GPUs and one is here, else on the CPU."""
    made_for_gpu = str(manifest.get("target", "")).startswith("cuda")
    return Cuda(0) if made_for_gpu and has_gpu() else Cpu(threads)


def has_gpu() -> bool:
    """Whether this machine has a GPU that sparsec has kernels for, and an ONNX Runtime with the CUDA provider."""
    import onnxruntime

    from ..codegen.target.cuda import find_devices

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers() and bool(find_devices())
