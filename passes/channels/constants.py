"""Small constants that say what an operator does: shapes, axes, pads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_ELEMENTS = 64
_MOST_NODES = 16


def small_constant(value: onnx_ir.Value | None, nodes: int = _MOST_NODES) -> NDArray[Any] | None:
    """What `value` is, computed where PyTorch's exporter spells it out (the pads of F.pad); None where it may vary.

    An initialiser that is a graph input counts as varying, whatever the IR version.
    """
    if value is None or nodes == 0 or value.is_graph_input():
        return None
    node = value.producer()
    try:
        if node is None:
            tensor = value.const_value
            return tensor.numpy() if tensor is not None and tensor.size <= _MOST_ELEMENTS else None
        if node.domain or any(found.is_ref() for found in node.attributes.values()):
            return None
        inputs = [small_constant(source, nodes - 1) for source in node.inputs]
        if node.op_type not in _OPERATORS or any(array is None for array in inputs):
            return None
        result = _OPERATORS[node.op_type](node, *inputs)
    except Exception:  # whatever a malformed node or tensor provokes: it is then nothing that is known
        return None
    return result if result.size <= _MOST_ELEMENTS else None


def _constant(node: onnx_ir.Node) -> NDArray[Any]:
    (found,) = node.attributes.values()
    return found.as_tensor().numpy() if found.name == "value" else np.asarray(found.value)


def _filled(node: onnx_ir.Node, shape: NDArray[Any]) -> NDArray[Any]:
    found = node.attributes.get("value")
    content = np.zeros(1, np.float32) if found is None else found.as_tensor().numpy()
    if np.prod(shape) > _MOST_ELEMENTS:
        raise ValueError
    return np.full(shape, content)


def _reshaped(node: onnx_ir.Node, data: NDArray[Any], shape: NDArray[Any]) -> NDArray[Any]:
    if 0 in shape:
        raise ValueError
    return np.reshape(data, tuple(shape))


def _sliced(node: onnx_ir.Node, data: NDArray[Any], *ranges: NDArray[Any]) -> NDArray[Any]:
    starts, ends, axes, steps = ranges
    at = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # Towards the front the smallest integer means "from the first on", which is no index of Python's.
        at[axis] = slice(int(start), None if step < 0 and end < -data.shape[axis] else int(end), int(step))
    return data[tuple(at)]


def _transposed(node: onnx_ir.Node, data: NDArray[Any]) -> NDArray[Any]:
    found = node.attributes.get("perm")
    return np.transpose(data, None if found is None else found.value)


def _joined(node: onnx_ir.Node, *arrays: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate(arrays, axis=int(node.attributes["axis"].value))


def _cast(node: onnx_ir.Node, data: NDArray[Any]) -> NDArray[Any]:
    types = (onnx_ir.DataType.INT32, onnx_ir.DataType.INT64)
    if data.dtype.kind not in "iu" or node.attributes["to"].value not in types:
        raise ValueError
    return data  # what counts places fits either


def _same(node: onnx_ir.Node, data: NDArray[Any]) -> NDArray[Any]:
    return data


_OPERATORS: dict[str, Callable[..., NDArray[Any]]] = {
    "Cast": _cast,
    "Concat": _joined,
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Identity": _same,
    "Reshape": _reshaped,
    "Slice": _sliced,
    "Transpose": _transposed,
}
