"""Operators that multiply integers themselves, and what quantizers write around them.

    Y = QLinearMatMul(X, .., W, .., ..)            codes in, codes out: `x_codes`, `y_codes`

    Q, s, z = DynamicQuantizeLinear(X)             `dynamic`: X is rounded by a scale of its own when the model runs
    P = MatMulInteger(Q, W, z)
    Y = Mul(Cast(P), Mul(s, scale of W))

X of such a layer is what its first node reads: codes. What the codes of W stand for is the weight, as in QDQ form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from ...ir import Epilogue, Grid, Layer, LayerKind
from ...ir.values import Int8
from .forms import FORMS, Form
from .fuse import as_bias
from .nodes import attribute, operand
from .quantized import fault_of, holds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .constants import Constants
    from .fuse import Context


def find_integer(node: onnx_ir.Node, context: Context) -> Layer | None:
    """The layer of such a node; None where its weight is not constant.

    The weight is what the codes stand for, or code - zero point where the scale is elsewhere or varies.

    Raises:
        SparsecError: the weight cannot be read.
    """
    form, constants = FORMS[node.domain, node.op_type], context.constants
    x, codes = operand(node, 0), constants.array(operand(node, form.weight))
    least = 2 if form.kind is LayerKind.LINEAR else 3
    if x is None or codes is None or codes.dtype.kind not in "iu" or codes.ndim < least or len(node.outputs) != 1:
        return None
    matrix = _matrix(node, codes, form.kind)
    zero_point = _by_output(node, form.zero_point, len(matrix), constants, default=0)
    scale = _by_output(node, form.scale, len(matrix), constants, default=1)
    words = "a convolution of integers" if form.kind is LayerKind.CONV else "a product of integers"
    layer = Layer(
        name=node.name or node.outputs[0].name or node.op_type,
        kind=form.kind,
        op_type=node.op_type,
        weight=(matrix.astype(np.float32) - zero_point) * scale,
        bias=None,
        epilogue=Epilogue(),
        nodes=(node,),
        x=x,
        obstacle=f"{words}; no sparse operator yet",
        stored=onnx_ir.DataType.from_numpy(codes.dtype).name.lower(),
        fixed=True,
    )
    if form.kind is LayerKind.CONV or codes.ndim > 2 or not matrix.size:
        return layer
    grown = _Growth(layer, form, context).grow()
    return replace(layer, obstacle=f"{words} {grown}; no sparse operator yet") if isinstance(grown, str) else grown


def integer_codes(layer: Layer, matrix: NDArray[np.float32], constants: Constants) -> NDArray[Any]:
    """The codes of `matrix` [out, in] as the layer's first node holds its weight, each the nearest."""
    node = layer.nodes[0]
    form = FORMS[node.domain, node.op_type]
    old = constants.array(operand(node, form.weight))
    assert old is not None, "the layer was found by reading it"
    zero_point = _by_output(node, form.zero_point, len(matrix), constants, default=0)
    scale = np.ones((1, 1), np.float32) if layer.table is None else layer.table
    limits = np.iinfo(old.dtype)
    codes = np.clip(np.rint(matrix / scale.astype(np.float64)) + zero_point, limits.min, limits.max)
    turned = codes if attribute(node, "transB", 0) else codes.T
    return np.ascontiguousarray(turned, dtype=old.dtype)


def _matrix(node: onnx_ir.Node, codes: NDArray[Any], kind: LayerKind) -> NDArray[Any]:
    """[out, in] of the codes."""
    if kind is LayerKind.CONV:
        return codes.reshape(len(codes), int(np.prod(codes.shape[1:], dtype=np.int64)))
    turned = codes if attribute(node, "transB", 0) else np.swapaxes(codes, -1, -2)
    return turned.reshape(int(np.prod(turned.shape[:-1], dtype=np.int64)), turned.shape[-1])


def _by_output(
    node: onnx_ir.Node, index: int | None, outputs: int, constants: Constants, default: int
) -> NDArray[np.float32]:
    """An input with a number for all outputs, or one for each, as [1 or out, 1]; `default` where it is neither."""
    array = None if index is None else constants.array(operand(node, index))
    if array is None or array.size not in (1, outputs):
        array = np.array(default)
    return array.reshape(-1, 1).astype(np.float32)


class _Growth:
    """From a product of integers to the layer that one sparse operator can stand for."""

    def __init__(self, layer: Layer, form: Form, context: Context) -> None:
        self._layer, self._node, self._form, self._context = layer, layer.nodes[0], form, context

    def grow(self) -> Layer | str:
        """The layer, or in words what makes it one that no operator takes."""
        node, constants = self._node, self._context.constants
        steps: tuple[Callable[[Layer], Layer | str], ...] = (self._input, self._scale, self._bias, self._output)
        for name in ("scale", "zero_point"):
            index = getattr(self._form, name)
            value = None if index is None else operand(node, index)
            if value is not None and constants.array(value) is None:
                return f"whose weight has a {name.replace('_', ' ')} that varies"
        if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1:
            return "of a turned or multiplied input"
        layer: Layer | str = replace(self._layer, obstacle="")
        for step in steps:
            if isinstance(layer, str) or layer.obstacle:
                return layer
            layer = step(layer)
        if isinstance(layer, str) or not layer.dynamic:
            return layer
        return replace(layer, product=layer.nodes[-1].outputs[0])

    def _input(self, layer: Layer) -> Layer | str:
        """X: codes on one grid, or rounded when the model runs."""
        rank, source = self._context.shapes.rank(layer.x), layer.x.producer()
        layer = replace(layer, rank=rank)
        if self._form.x_zero_point is None:
            return replace(layer, dynamic=True)
        scale, zero_point = self._input_scale(), operand(self._node, self._form.x_zero_point)
        if source is not None and source.op_type == "DynamicQuantizeLinear" and source.outputs[0] is layer.x:
            known = source.graph is self._node.graph and zero_point is source.outputs[2]
            return replace(layer, dynamic=True) if known and scale in (None, source.outputs[1]) else "of unknown codes"
        grid = self._grid(scale, zero_point)
        if isinstance(grid, str):
            return f"of {grid}"
        if grid is None:
            return "whose input is neither codes of one constant scale nor of DynamicQuantizeLinear"
        return replace(layer, x_grid=grid, x_codes=layer.x)

    def _input_scale(self) -> onnx_ir.Value | None:
        return None if self._form.x_scale is None else operand(self._node, self._form.x_scale)

    def _scale(self, layer: Layer) -> Layer | str:
        """The weight's scale: of the operator, or multiplied in behind it."""
        outputs, constants = layer.out_features, self._context.constants
        if self._form.scale is not None:
            table = _by_output(self._node, self._form.scale, outputs, constants, default=1)
            return self._with_table(layer, table)
        if not layer.dynamic:
            return "whose scale is applied elsewhere"
        source = layer.x.producer()
        assert source is not None, "it makes the codes"
        found = self._multiplied(layer, source.outputs[1])
        if found is None:
            return "whose scale is applied elsewhere"
        nodes, table = found
        return self._with_table(replace(layer, nodes=nodes, weight=layer.weight * table), table)

    def _multiplied(
        self, layer: Layer, x_scale: onnx_ir.Value
    ) -> tuple[tuple[onnx_ir.Node, ...], NDArray[np.float32]] | None:
        """Cast and Mul behind the product, by X's scale and the weight's in either order; and the latter."""
        context, outputs = self._context, layer.out_features
        cast = context.only_reader(layer.nodes[0].outputs[0])
        if cast is None or cast.op_type != "Cast" or attribute(cast, "to", 0) != onnx_ir.DataType.FLOAT:
            return None
        nodes, value = [layer.nodes[0], cast], cast.outputs[0]
        table, by_x, by_weight = np.ones((1, 1), np.float32), False, False
        while not (by_x and by_weight):
            node = context.only_reader(value)
            factor = None if node is None or not _is_mul(node) else _other(node, value)
            if node is None or factor is None:
                break
            parts = self._parts(factor, node, x_scale)
            numbers = [self._number(part, outputs, layer.rank) for part in parts if part is not x_scale]
            if (by_x and x_scale in parts) or any(number is None for number in numbers):
                break
            for number in numbers:
                assert number is not None, "it was looked at"
                table = table * number
            nodes += [*((factor.producer(),) if len(parts) > 1 else ()), node]
            by_x, by_weight, value = by_x or x_scale in parts, by_weight or bool(numbers), node.outputs[0]
        return (tuple(nodes), table) if by_x else None

    def _parts(self, factor: onnx_ir.Value, reader: onnx_ir.Node, x_scale: onnx_ir.Value) -> list[onnx_ir.Value | None]:
        """`factor`, or both sides of the product with `x_scale` that it is for `reader` alone."""
        between, context = factor.producer(), self._context
        if between is None or not _is_mul(between) or x_scale not in between.inputs or not context.free(between):
            return [factor]
        return [*between.inputs] if context.only_reader(factor) is reader else [factor]

    def _number(self, value: onnx_ir.Value | None, outputs: int, rank: int | None) -> NDArray[np.float32] | None:
        """A constant for all outputs or one for each, as [out, 1]."""
        array = self._context.constants.array(value)
        factor = None if array is None or array.ndim > (rank or 1) else as_bias(array, outputs)
        return None if factor is None else factor.reshape(-1, 1)

    def _with_table(self, layer: Layer, table: NDArray[np.float32]) -> Layer | str:
        fault = fault_of(table, "weight")
        if fault:
            return replace(layer, obstacle=fault)
        table = np.ascontiguousarray(np.broadcast_to(table, (layer.out_features, 1)))
        return replace(layer, values=Int8(), table=table) if holds(layer.weight, table) else layer

    def _bias(self, layer: Layer) -> Layer | str:
        value = None if self._form.bias is None else operand(self._node, self._form.bias)
        if value is None:
            return layer
        array = self._context.constants.array(value)
        bias = None if array is None else as_bias(array, layer.out_features)
        if bias is None:
            return "with a bias that varies"
        if array is not None and array.dtype == np.int32:
            if layer.x_grid is None or layer.table is None:
                return "with a bias of unknown scale"
            bias = (bias.astype(np.float64) * layer.x_grid.scale * layer.table[:, 0]).astype(np.float32)
        return replace(layer, bias=bias, epilogue=Epilogue(bias=True))

    def _output(self, layer: Layer) -> Layer | str:
        """Y: floats, or codes on one grid."""
        index = self._form.y_scale
        if index is None or (self._node.op_type == "QGemm" and operand(self._node, index) is None):
            return layer
        grid = self._grid(operand(self._node, index), operand(self._node, index + 1))
        if isinstance(grid, str):
            return f"with {grid}"
        if grid is None:
            return "whose output has no constant scale"
        return replace(layer, y_grid=grid, y_codes=self._node.outputs[0])

    def _grid(self, scale: onnx_ir.Value | None, zero_point: onnx_ir.Value | None) -> Grid | str | None:
        """Of codes of a whole tensor; in words what is the matter with them; None where they have none."""
        constants = self._context.constants
        number, point = constants.array(scale), constants.array(zero_point)
        if number is None or number.size != 1 or number.dtype != np.float32:
            return None
        if point is None or point.size != 1:
            return None
        if point.dtype != np.uint8:
            return "signed codes"
        fault = fault_of(number, "input or output")
        return fault or Grid(float(number.item()), int(point.item()))


def _is_mul(node: onnx_ir.Node) -> bool:
    return node.domain == "" and node.op_type == "Mul" and len(node.inputs) == 2


def _other(node: onnx_ir.Node, value: onnx_ir.Value) -> onnx_ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]
