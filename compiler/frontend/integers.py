"""Operators that multiply integers themselves: found and reported, and left as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from ...ir import Epilogue, Layer, LayerKind
from .nodes import attribute, operand

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .constants import Constants


@dataclass(frozen=True, slots=True)
class Form:
    """Where an operator has its weight.

    Attributes:
        kind: what it computes.
        weight, scale, zero_point: numbers of inputs; no scale where the operator leaves it to others.
    """

    kind: LayerKind
    weight: int
    scale: int | None
    zero_point: int


FORMS: Mapping[tuple[str, str], Form] = {
    ("", "ConvInteger"): Form(LayerKind.CONV, 1, None, 3),
    ("", "MatMulInteger"): Form(LayerKind.LINEAR, 1, None, 3),
    ("", "QLinearConv"): Form(LayerKind.CONV, 3, 4, 5),
    ("", "QLinearMatMul"): Form(LayerKind.LINEAR, 3, 4, 5),
    ("com.microsoft", "DynamicQuantizeMatMul"): Form(LayerKind.LINEAR, 1, 2, 3),
    ("com.microsoft", "MatMulIntegerToFloat"): Form(LayerKind.LINEAR, 1, 3, 5),
    ("com.microsoft", "QGemm"): Form(LayerKind.LINEAR, 3, 4, 5),
}


def find_integer(node: onnx_ir.Node, constants: Constants) -> Layer | None:
    """The layer of such a node, with an obstacle; None where its weight is not constant.

    The weight is what the codes stand for, or code - zero point where the scale is elsewhere or varies.

    Raises:
        SparsecError: the weight cannot be read.
    """
    form = FORMS[node.domain, node.op_type]
    x, codes = operand(node, 0), constants.array(operand(node, form.weight))
    least = 2 if form.kind is LayerKind.LINEAR else 3
    if x is None or codes is None or codes.dtype.kind not in "iu" or codes.ndim < least or len(node.outputs) != 1:
        return None
    if form.kind is LayerKind.CONV:
        matrix = codes.reshape(len(codes), int(np.prod(codes.shape[1:], dtype=np.int64)))
    else:
        turned = codes if attribute(node, "transB", 0) else np.swapaxes(codes, -1, -2)
        matrix = turned.reshape(int(np.prod(turned.shape[:-1], dtype=np.int64)), turned.shape[-1])
    zero_point = _by_output(node, form.zero_point, len(matrix), constants, default=0)
    scale = _by_output(node, form.scale, len(matrix), constants, default=1)
    words = "a convolution of integers" if form.kind is LayerKind.CONV else "a product of integers"
    advice = "" if form.kind is LayerKind.CONV else " but for models in QDQ form"
    return Layer(
        name=node.name or node.outputs[0].name or node.op_type,
        kind=form.kind,
        op_type=node.op_type,
        weight=(matrix.astype(np.float32) - zero_point) * scale,
        bias=None,
        epilogue=Epilogue(),
        nodes=(node,),
        x=x,
        obstacle=f"{words}; no sparse operator yet{advice}",
        stored=onnx_ir.DataType.from_numpy(codes.dtype).name.lower(),
        fixed=True,
    )


def _by_output(
    node: onnx_ir.Node, index: int | None, outputs: int, constants: Constants, default: int
) -> NDArray[np.float32]:
    """An input with a number for all outputs, or one for each, as [1 or out, 1]; `default` where it is neither."""
    array = None if index is None else constants.array(operand(node, index))
    if array is None or array.size not in (1, outputs):
        array = np.array(default)
    return array.reshape(-1, 1).astype(np.float32)
