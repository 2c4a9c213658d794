"""Leave channels out of a model: `remove`.

    A: [8, 6], b: [8], C: [3, 8]                A: [5, 6], b: [5], C: [3, 5]
    h = Gemm<transB=1>(x, A, b)           ->    h = Gemm<transB=1>(x, A, b)
    r = Sigmoid(h)                              r = Sigmoid(h)
    y = Gemm<transB=1>(r, C)                    y = Gemm<transB=1>(r, C)

A channel is left out as if what reads it were zero there (the column of C), whatever its value: so neither the bias nor
Sigmoid(0) leaves anything behind. What the mean of such a channel did is made good by refitting C and its bias
(`passes/solve`), before channels go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from ...ir import LayerKind, SparsecError
from ...ir.values.floats import DTYPES
from ..channels.axes import extent
from .masks import axis_mask
from .sizes import resize

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...ir import Program
    from ..channels import Channels, Dimension
    from ..channels.axes import Axis, Segment
    from .masks import Keep

    # Of each dimension the channels that stay, [kept] int64, rising.
    Kept = Mapping[Dimension, NDArray[np.int64]]

# Which input of a recurrent node holds the weights between its units.
_R = 2


def remove(program: Program, channels: Channels, kept: Kept) -> onnx_ir.Model:
    """A smaller model, which computes what the program does with the weights of `mask_weights`.

    Args:
        program: whose model it is; it is not changed.
        channels: of that program.
        kept: which channels stay, of `removable` dimensions; those that are not named stay whole.

    Returns:
        A clone that shares every tensor from which nothing is left out.

    Raises:
        SparsecError: the channels that stay are none, or no rising numbers of a removable dimension.
    """
    keep = _masks(channels, kept)
    model = program.model.clone()
    before = [*program.model.graph.initializers.values()]
    after = [*model.graph.initializers.values()]
    for source, value in zip(before, after, strict=True):
        masks = [axis_mask(axis, keep) for axis in channels.axes.get(source) or ()]
        if any(mask is not None for mask in masks):
            _slice(value, masks)
    for old, node in zip(program.model.graph, [*model.graph], strict=True):
        resize(old, node, model, channels.axes, keep)
        for source, value in zip(old.outputs, node.outputs, strict=True):
            _describe(value, channels.axes.get(source) or [], keep)
    return model


def mask_weights(program: Program, channels: Channels, kept: Kept) -> dict[str, NDArray[np.float32]]:
    """The weights [out, in] of the layers that read channels which go, zero there; by layer name."""
    masked = {}
    for name, (_, columns) in layer_indices(program, channels, kept).items():
        weight = next(layer.weight for layer in program.layers if layer.name == name)
        if len(columns) < weight.shape[1]:
            masked[name] = np.zeros_like(weight)
            masked[name][:, columns] = weight[:, columns]
    return masked


def mask_recurrence(program: Program, channels: Channels, kept: Kept) -> onnx_ir.Model:
    """The model with zeros in R, which is no layer's weight, where recurrent layers read units of theirs that go.

    Y = LSTM(X, W, R)   ->   M = Mul(R, [1, 0, 1]), Y = LSTM(X, W, M)
    """
    keep, model = _masks(channels, kept), program.model.clone()
    copies = dict(zip(program.model.graph, [*model.graph], strict=True))
    for layer in program.layers:
        weight = layer.nodes[0].inputs[_R] if layer.kind is LayerKind.RECURRENT else None
        axes = None if weight is None else channels.axes.get(weight)
        mask = None if axes is None else axis_mask(axes[-1], keep)
        if mask is not None:
            node = copies[layer.nodes[0]]
            name = f"{node.outputs[0].name}.units"
            ones = onnx_ir.Tensor(mask.astype(DTYPES.get(layer.dtype, layer.dtype)), name=name)
            value = onnx_ir.Value(name=name, const_value=ones)
            model.graph.register_initializer(value)
            masked = onnx_ir.node("Mul", [node.inputs[_R], value])
            masked.outputs[0].name = f"{name}.masked"
            model.graph.insert_before(node, masked)
            node.replace_input_with(_R, masked.outputs[0])
    return model


def layer_indices(
    program: Program, channels: Channels, kept: Kept
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """By the name of each layer that shrinks its outputs and inputs that stay: the weight becomes w[out][:, in]."""
    keep, found = _masks(channels, kept), {}
    for layer in program.layers:
        masks = [axis_mask(axis, keep) for axis in channels.layers[layer.name]]
        if any(mask is not None for mask in masks):
            rows, columns = (
                np.arange(size) if mask is None else np.flatnonzero(mask)
                for mask, size in zip(masks, layer.weight.shape, strict=True)
            )
            found[layer.name] = rows, columns
    return found


def _masks(channels: Channels, kept: Kept) -> dict[Segment, NDArray[np.bool_]]:
    """By segment, of those from which channels go."""
    segments = {dimension: segment for segment, dimension in channels.dimensions.items() if not segment.whole}
    masks = {}
    for dimension, stay in kept.items():
        where = ", ".join(dict.fromkeys(place.name for place in (*dimension.rows, *dimension.columns)))
        rising = stay.ndim == 1 and (np.diff(stay) > 0).all()
        if dimension not in segments or not len(stay) or not rising or stay[0] < 0 or stay[-1] >= dimension.size:
            raise SparsecError(
                f"the channels of {where} that stay must be one or more of {dimension.size}, each once and in their "
                "order, of a dimension from which channels can go"
            )
        if len(stay) < dimension.size:
            masks[segments[dimension]] = np.isin(np.arange(dimension.size), stay)
    return masks


def _slice(value: onnx_ir.Value, masks: list[NDArray[np.bool_] | None]) -> None:
    """Leave places of an initialiser out."""
    tensor = value.const_value
    assert tensor is not None, "find_channels read its shape"
    array = tensor.numpy()
    for axis, mask in enumerate(masks):
        if mask is not None:
            array = np.compress(mask, array, axis=axis)
    value.const_value = onnx_ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=tensor.name)
    if value.shape is not None:
        value.shape = onnx_ir.Shape(array.shape)


def _describe(value: onnx_ir.Value, axes: list[Axis], keep: Keep) -> None:
    """The new sizes in what the model says of a value."""
    if value.shape is None or len(value.shape) != len(axes):
        return
    sizes = list(value.shape)
    for i, axis in enumerate(axes):
        mask = axis_mask(axis, keep)
        if mask is not None and extent(axis) is not None:
            sizes[i] = int(mask.sum())
    value.shape = onnx_ir.Shape(sizes)
