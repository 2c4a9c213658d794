"""Kernels on a GPU in this machine, for tests of what they compute."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernel import CudaVariant
from sparsec.codegen.tune.gpu.device import gpu_count, open_device

Array = np.ndarray[Any, Any]

needs_gpu = pytest.mark.skipif(gpu_count() == 0, reason="needs an NVIDIA GPU and its driver")
# Bytes on either side of what a kernel may write; a multiple of every alignment.
GUARD = 1024
POISON = 0xFF


def run_variant(variant: CudaVariant, arrays: Mapping[str, Array], rows: int) -> Array:
    """Y as the variant computes it on the first GPU, with NaN where it wrote nothing.

    Args:
        variant: compiled for that GPU.
        arrays: by names of `CUDA_ARGUMENTS`; of "y" only dtype and shape count. "order", "workspace" and "rows" are
            made here.
        rows: of X, at least 1.

    Raises:
        AssertionError: it wrote beside Y or the workspace, or into what it may only read.
    """
    gpu = open_device()
    program = gpu.load(variant)
    inputs = {name: array for name, array in arrays.items() if name != "y"}
    inputs["order"] = np.argsort(-np.diff(arrays["indptr"]), kind="stable").astype(np.int32)
    read = {name: gpu.upload(array) for name, array in inputs.items()}
    sizes = {"y": arrays["y"].nbytes, "workspace": program.workspace(rows)}
    written = {name: gpu.allocate(size + 2 * GUARD) for name, size in sizes.items()}
    for buffer in written.values():
        buffer.fill(POISON)
    inner: dict[str, Any] = {name: SimpleNamespace(address=b.address + GUARD) for name, b in written.items()}
    program({**read, **inner}, rows)
    results = {name: buffer.read(np.dtype(np.uint8), (buffer.nbytes,)) for name, buffer in written.items()}
    for name, result in results.items():
        assert (result[:GUARD] == POISON).all(), f"written before {name}"
        assert (result[-GUARD:] == POISON).all(), f"written after {name}"
    for name, buffer in read.items():
        after = buffer.read(np.dtype(np.uint8), (buffer.nbytes,))
        assert after.tobytes() == inputs[name].tobytes(), f"{name} was changed"
    return results["y"][GUARD:-GUARD].view(arrays["y"].dtype).reshape(arrays["y"].shape)
