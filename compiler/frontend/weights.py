"""Between a weight as it lies in the graph and the matrix [out, in] that a `Layer` holds, and back again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir import LayerKind, SparsecError
from ...ir.values.floats import DTYPES
from .forms import FORMS
from .nodes import attribute
from .structure import node_label

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from ...ir import Layer


def weight_index(layer: Layer) -> int:
    """Which input of its first node holds the layer's weight."""
    node = layer.nodes[0]
    form = FORMS.get((node.domain, node.op_type))
    if form is not None:
        return form.weight
    return 0 if layer.kind is LayerKind.LINEAR and node.inputs[0] is not layer.x else 1


def to_matrix(node: onnx_ir.Node, index: int, array: NDArray[Any]) -> NDArray[np.float32]:
    """The weight, input number `index` of `node`, as [out, in] float32. A view of `array` where that is possible.

    | operator | weight | matrix |
    |---|---|---|
    | MatMul, Gemm | B [in, out] (transB: [out, in]) | alpha * B.T |
    | MatMul, Gemm | A [out, in] (transA: [in, out]) | alpha * A |
    | Conv | [out, in/groups, kh, kw] | [out, in/groups * kh * kw] |
    | ConvTranspose | [in, out/groups, kh, kw] | [out, in/groups * kh * kw] |
    | LSTM, GRU, RNN | [directions, gates * hidden, in] | [directions * gates * hidden, in] |
    """
    if node.op_type in ("MatMul", "Gemm"):
        if array.ndim > 2:  # a stack of matrices [.., in, out] or [.., out, in]
            array = np.swapaxes(array, -1, -2) if index == 1 else array
            return _by_row(array)
        matrix = _float32(array.T if _is_transposed(node, index) else array)
        return matrix if alpha(node) == 1 else matrix * np.float32(alpha(node))
    if node.op_type == "ConvTranspose":
        groups, inputs, outputs, size = _transposed_geometry(node, array.shape)
        split = array.reshape(groups, inputs, outputs, size).transpose(0, 2, 1, 3)
        return _float32(split.reshape(groups * outputs, inputs * size))
    if node.op_type == "Conv":
        return _float32(array.reshape(array.shape[0], _size(array.shape[1:])))
    return _by_row(array)


def from_matrix(
    node: onnx_ir.Node, index: int, matrix: NDArray[np.float32], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """The array of `shape` and `dtype` whose `to_matrix` is `matrix`; zeros stay zeros."""
    if node.op_type in ("MatMul", "Gemm"):
        if len(shape) > 2 and index == 1:
            array = np.swapaxes(matrix.reshape(*shape[:-2], shape[-1], shape[-2]), -1, -2)
        elif len(shape) > 2:
            array = matrix.reshape(shape)
        else:
            array = matrix.T if _is_transposed(node, index) else matrix
            array = array if alpha(node) == 1 else array / np.float32(alpha(node))
    elif node.op_type == "ConvTranspose":
        groups, inputs, outputs, size = _transposed_geometry(node, shape)
        array = matrix.reshape(groups, outputs, inputs, size).transpose(0, 2, 1, 3).reshape(shape)
    else:
        array = matrix.reshape(shape)
    return np.ascontiguousarray(array, dtype=dtype)


def is_exact(array: NDArray[np.float32], dtype: str) -> bool:
    """Whether `dtype` can store `array` without rounding."""
    with np.errstate(over="ignore"):
        return dtype == "float32" or bool((array.astype(DTYPES[dtype]) == array).all())


def alpha(node: onnx_ir.Node) -> float:
    """What a linear node multiplies its product by."""
    return float(attribute(node, "alpha", 1.0)) if node.op_type == "Gemm" else 1.0


def _is_transposed(node: onnx_ir.Node, index: int) -> bool:
    """Whether the 2-D weight of a MatMul or Gemm lies as [in, out]."""
    flag = bool(attribute(node, ("transA", "transB")[index], 0)) if node.op_type == "Gemm" else False
    return flag == (index == 0)


def _transposed_geometry(node: onnx_ir.Node, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Groups, inputs a group, outputs a group and kernel size of a ConvTranspose."""
    groups = int(attribute(node, "group", 1))
    if groups < 1 or shape[0] % groups:
        raise SparsecError(f"{node_label(node)}: {groups} groups do not divide {shape[0]} channels. Export it again.")
    return groups, shape[0] // groups, shape[1], _size(shape[2:])


def _by_row(array: NDArray[Any]) -> NDArray[np.float32]:
    return _float32(array.reshape(_size(array.shape[:-1]), array.shape[-1]))


def _size(shape: tuple[int, ...]) -> int:
    # Explicit, because reshape refuses -1 where the array is empty.
    return int(np.prod(shape, dtype=np.int64))


def _float32(array: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(array, dtype=np.float32)
