"""Signed 8-bit codes said in uint8: the same numbers, shifted.

C = QuantizeLinear(X, s, z)                    C = QuantizeLinear(X, s, z + 128)
Y = DequantizeLinear(C, s, z)      int8 ->     Y = DequantizeLinear(C, s, z + 128)      uint8
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from ..frontend.constants import OVERRIDABLE_FROM_IR, Constants
from ..frontend.nodes import operand

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_SHIFT = 128


def make_unsigned(model: onnx_ir.Model, codes: onnx_ir.Value, unique: Callable[[str], str]) -> None:
    """Shift the zero points of all nodes around `codes`, of which `frontend.quantized.unsigned` said that they can be.

    Args:
        model: is changed; initialisers that nobody reads any more stay.
        codes: uint8 ones stay as they are.
        unique: makes a name that the model does not have.
    """
    constants = Constants(model)
    new: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for node in (codes.producer(), *(use.node for use in codes.uses())):
        if node is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero_point = operand(node, 2)
        array = constants.array(zero_point)
        if zero_point is None or array is None or array.dtype != np.int8:
            continue
        if zero_point not in new:
            shifted = (array.astype(np.int16) + _SHIFT).astype(np.uint8)
            new[zero_point] = add_initializer(model, unique(f"{zero_point.name}.unsigned"), shifted)
        node.replace_input_with(2, new[zero_point])
        codes.type = onnx_ir.TensorType(onnx_ir.DataType.UINT8)


def add_initializer(model: onnx_ir.Model, name: str, array: NDArray[np.generic]) -> onnx_ir.Value:
    """A new initialiser of the main graph."""
    value = onnx_ir.Value(name=name, const_value=onnx_ir.Tensor(array, name=name))
    model.graph.register_initializer(value)
    if model.ir_version < OVERRIDABLE_FROM_IR:  # there an initialiser has to be a graph input too
        value.type = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype))
        value.shape = onnx_ir.Shape(array.shape)
        model.graph.inputs.append(value)
    return value
