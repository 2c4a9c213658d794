"""Whether PyTorch computes what ONNX Runtime does, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir
import torch

from ...ir import SparsecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .batches import Batch, Function

    Feeds = dict[str, NDArray[Any]]
    Outputs = dict[str, Any]
    Model = Callable[[Feeds], Outputs]

# ONNX Runtime may be so many times as far from the exact result as PyTorch is: both round, in other places.
MARGIN = 16
_EPSILON = {onnx_ir.DataType.FLOAT16: 2.0**-10, onnx_ir.DataType.BFLOAT16: 2.0**-7}


def check(rough: Function, exact: Function, dense: Model, batch: Batch, epsilon: float) -> None:
    """Compare the outputs of floats on some samples.

    PyTorch's float64 stands for the exact result. How far its float32 is from it says how much the model itself
    amplifies rounding: ONNX Runtime has to lie within `MARGIN` times that, or within half of the digits (the root of
    `epsilon`) where that is more.

    Args:
        rough: the dense model as PyTorch computes it in float32.
        exact: the same in float64.
        dense: ONNX Runtime's, from one run's feeds to outputs.
        batch: the samples.
        epsilon: of the narrowest floats in the model.

    Raises:
        SparsecError: an output differs; the message says which, and by how much.
    """
    runs = [dense(feeds) for feeds in batch.feeds()]
    with torch.no_grad():
        found, true = (
            {name: y.double().cpu().numpy() for name, y in batch.run(function).items()} for function in (rough, exact)
        )
    for name, y in true.items():
        expected = np.concatenate([np.atleast_1d(run[name]) for run in runs]).astype(np.float64)
        allowed = max(epsilon**0.5, MARGIN * _distance(found[name], y))
        distance = _distance(expected, y)
        if not distance <= allowed:
            raise SparsecError(
                f"--heal: as PyTorch computes the model, its output '{name}' differs from ONNX Runtime's by "
                f"{distance:.1e} of its largest value, where rounding explains {allowed:.1e}: nothing was trained. "
                "Leave --heal out, and please report the model"
            )


def _distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The largest difference as a share of the largest value of `b`; equal infinities are none."""
    if a.shape != b.shape:
        return float("inf")
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0
    scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    return float(np.abs(a - b)[~same].max() / scale) if scale else float("inf")


def epsilon_of(model: onnx_ir.Model) -> float:
    """Of the narrowest floats that its initialisers and inputs have."""
    values = (value for graph in model.graphs() for value in (*graph.initializers.values(), *graph.inputs))
    return max((_EPSILON.get(value.dtype, 0.0) for value in values if value.dtype), default=0.0) or 2.0**-23
