"""Tensors of few bits around a layer, as quantizers write them: in QDQ form, around operators of float32.

    A = DequantizeLinear(codes of X)         `x_grid`, `x_codes`
    V = DequantizeLinear(codes of W)         `stored`, `values`, `table`
    H = MatMul(A, V)
    Y = QuantizeLinear(H)                    `y_grid`, `y_codes`; see `fuse.fuse_quantizer`

What a layer covers stays floats in its own view, and exact: scale * (code - zero point) is what the weight is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from ...ir import Grid, Layer, LayerKind, SparsecError
from ...ir.values import Int8
from .nodes import attribute, operand
from .structure import node_label
from .weights import to_matrix, weight_index

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .constants import Constants

# Codes of which a float32 of their own makes a weight that can be compiled; of fewer bits are other formats.
_WHOLE = ("INT8", "UINT8", "INT16", "UINT16", "INT32")
# Signed codes are unsigned ones, shifted.
_SHIFT = {"UINT8": 0, "INT8": 128}
# Weights that are looked at together: rounding takes several times their memory.
_PART = 1 << 22


@dataclass(frozen=True, eq=False)
class Coding:
    """What a QuantizeLinear or DequantizeLinear says of its codes.

    Attributes:
        node: the node.
        kind: of the codes.
        scale: float32, of one element, one a channel or one a block.
        zero_point: of one element or as `scale`.
        name: of the scale.
    """

    node: onnx_ir.Node
    kind: onnx_ir.DataType
    scale: NDArray[np.float32]
    zero_point: NDArray[Any]
    name: str

    @classmethod
    def of(cls, node: onnx_ir.Node | None, constants: Constants) -> Coding | None:
        """The coding of `node`; None where it is another operator, its scale varies or is no float32.

        Raises:
            SparsecError: its zero point has another type than its codes.
        """
        if node is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear") or not constants.foldable(node):
            return None
        scale, zero_point = constants.array(operand(node, 1)), constants.array(operand(node, 2))
        kind, named = _kind(node, constants), operand(node, 1)
        known = zero_point is not None or operand(node, 2) is None
        if scale is None or scale.dtype != np.float32 or kind is None or not known:
            return None
        zero_point = np.zeros((), dtype=np.int32) if zero_point is None else zero_point
        return cls(node, kind, scale, zero_point, "" if named is None else named.name or "")

    def fault(self, what: str) -> str:
        """What is wrong with the scale of the layer's `what`, in words; "" for nothing."""
        return fault_of(self.scale, what, self.name)

    @property
    def grid(self) -> Grid | None:
        """That of a whole tensor, in codes of 0 to 255; None where channels have their own, or the codes are no 8 bits.

        The scale is without fault.
        """
        if self.scale.size != 1 or self.zero_point.size != 1 or self.kind.name not in _SHIFT:
            return None
        return Grid(float(self.scale.item()), int(self.zero_point.item()) + _SHIFT[self.kind.name])

    def encode(self, array: NDArray[Any]) -> NDArray[Any] | None:
        """The codes of 8 bits that a DequantizeLinear makes `array` of; None where there are none."""
        if self.node.op_type != "DequantizeLinear" or self.kind.name not in _SHIFT or self.scale.ndim > 1:
            return None
        along = [1] * array.ndim
        if self.scale.size > 1:
            along[attribute(self.node, "axis", 1)] = -1
        scale = self.scale.reshape(along)
        zero_point = np.broadcast_to(self.zero_point, self.scale.shape).reshape(along).astype(np.int64)
        limits = np.iinfo(self.kind.numpy())
        with np.errstate(all="ignore"):  # a scale of zero is not exact
            codes = np.clip(np.rint(array / scale.astype(np.float64)) + zero_point, limits.min, limits.max)
            exact = np.array_equal((codes - zero_point).astype(np.float32) * scale, array)
        return codes.astype(self.kind.numpy()) if exact else None


def fault_of(scale: NDArray[np.float32], what: str, name: str = "") -> str:
    """What is wrong with a scale, in words; "" for nothing."""
    wrong = scale[~((scale >= np.finfo(np.float32).tiny) & np.isfinite(scale))]
    if not wrong.size:
        return ""
    called = f" '{name}'" if name else ""
    return f"the scale{called} of its {what} is {wrong[0]:g}, expected a positive finite number"


def holds(weight: NDArray[np.float32], table: NDArray[np.float32]) -> bool:
    """Whether signed codes of 8 bits and these scales [out, 1] are exactly `weight` [out, in]."""
    parts = max(1, weight.size // _PART)
    pieces = zip(np.array_split(weight, parts), np.array_split(table, parts), strict=True)
    return all(np.array_equal(Int8().round(one, scales), one) for one, scales in pieces)


def with_weight_coding(layer: Layer, constants: Constants) -> Layer:
    """The layer, with what its weight is dequantised from."""
    source, turns = _through_transposes(layer.nodes[0].inputs[weight_index(layer)], constants)
    coding = Coding.of(source, constants)
    if coding is None or coding.node.op_type != "DequantizeLinear":
        return layer
    whole = coding.kind.name in _WHOLE
    layer = replace(layer, stored=coding.kind.name.lower(), fixed=not whole)
    if layer.obstacle:
        return layer
    if not whole:
        return replace(layer, obstacle=f"weights of {layer.stored}; no sparse operator yet")
    if coding.fault("weight"):
        return replace(layer, obstacle=coding.fault("weight"))
    if layer.kind is not LayerKind.LINEAR:
        return layer
    table = _by_output(layer, coding, turns)
    if table is None:
        return replace(layer, obstacle="its weight has scales along its inputs; no sparse operator yet")
    return replace(layer, values=Int8(), table=table) if holds(layer.weight, table) else layer


def with_input_coding(layer: Layer, constants: Constants) -> Layer:
    """The layer, with the codes that its X is dequantised from; for weights that are dequantised, too."""
    coding = Coding.of(layer.x.producer(), constants) if layer.stored and not layer.obstacle else None
    if coding is None or coding.node.op_type != "DequantizeLinear":
        return layer
    if coding.fault("input"):
        return replace(layer, obstacle=coding.fault("input"))
    return replace(layer, x_grid=coding.grid, x_codes=unsigned(coding.node.inputs[0], coding, constants))


def unsigned(codes: onnx_ir.Value | None, coding: Coding, constants: Constants) -> onnx_ir.Value | None:
    """`codes` as they are uint8 or could be: where one node makes them and all others turn them back by its grid.

    ONNX Runtime shifts such pairs itself on x86-64, where it has no fast products of two signed numbers.
    """
    if codes is None or coding.grid is None or coding.kind.name == "UINT8":
        return codes if coding.grid is not None else None
    maker, readers = codes.producer(), [use.node for use in codes.uses()]
    around = [Coding.of(node, constants) for node in (maker, *readers)]
    agree = all(one is not None and one.grid == coding.grid and operand(one.node, 2) is not None for one in around)
    if maker is None or maker.op_type != "QuantizeLinear" or "output_dtype" in maker.attributes or not agree:
        return None
    turned = all(node.op_type == "DequantizeLinear" and node.graph is maker.graph for node in readers)
    return codes if turned and not codes.is_graph_output() else None


def check_zero_points(value: onnx_ir.Value | None, constants: Constants) -> None:
    """Refuse a weight that no runtime can compute.

    Raises:
        SparsecError: it is dequantised by a zero point of another type than its codes.
    """
    Coding.of(_through_transposes(value, constants)[0], constants)


def _kind(node: onnx_ir.Node, constants: Constants) -> onnx_ir.DataType | None:
    """Of the codes: by the zero point, which must agree with what else says it."""
    zero_point = constants.array(operand(node, 2))
    stated = None if zero_point is None else onnx_ir.DataType.from_numpy(zero_point.dtype)
    if node.op_type == "QuantizeLinear":
        wanted = attribute(node, "output_dtype", 0)
        return stated or (onnx_ir.DataType(wanted) if wanted else onnx_ir.DataType.UINT8)
    codes, zero = operand(node, 0), operand(node, 2)
    found = None if codes is None else _stated(codes, constants)
    if codes is not None and found is not None and zero is not None and stated is not None and found != stated:
        raise SparsecError(
            f"{node_label(node)}: the zero point '{zero.name}' is {stated.name.lower()}, but the codes '{codes.name}' "
            f"are {found.name.lower()}; they must be of one type. Quantise the model again."
        )
    return stated or found


def _stated(codes: onnx_ir.Value, constants: Constants) -> onnx_ir.DataType | None:
    """The type of a value, as far as it or what makes it says so."""
    producer = codes.producer()
    if producer is not None and producer.op_type == "QuantizeLinear" and constants.foldable(producer):
        return _kind(producer, constants)
    return codes.dtype or (None if codes.const_value is None else codes.const_value.dtype)


def _through_transposes(
    value: onnx_ir.Value | None, constants: Constants
) -> tuple[onnx_ir.Node | None, list[onnx_ir.Node]]:
    """What a weight comes from, and the nodes that turn it, the last first."""
    turns: list[onnx_ir.Node] = []
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Transpose", "Identity") and constants.foldable(node):
        turns.append(node)
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return node, turns


def _by_output(layer: Layer, coding: Coding, turns: list[onnx_ir.Node]) -> NDArray[np.float32] | None:
    """The scales as [out, 1]; None where they differ along the inputs."""
    scale = coding.scale
    if scale.size == 1:
        scale = scale.reshape(1, 1)
    elif scale.ndim == 1:
        axis = attribute(coding.node, "axis", 1)
        scale = scale.reshape((1, -1) if axis % 2 else (-1, 1))
        for node in reversed(turns):
            if node.op_type == "Transpose" and tuple(attribute(node, "perm", (1, 0))) == (1, 0):
                scale = scale.T
    else:
        return None
    matrix = to_matrix(layer.nodes[0], weight_index(layer), scale)
    return np.ascontiguousarray(np.broadcast_to(matrix, (layer.out_features, 1))) if matrix.shape[1] == 1 else None
