"""Grow a layer over the nodes after it: bias, activation, residual, quantizer. `STEPS` is the order, and so the policy.

    Y = MatMul(X, W)
    B = Add(Y, bias)
    A = Relu(B)            ->    one layer: relu(X W + bias) + R
    Z = Add(A, R)

Every covered value but the last is read by covered nodes only, so the layer has one way out. Hence nothing that the
layer reads can depend on it, and an operator in the last node's place comes after all that it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ...ir import Activation, Epilogue, Layer
from .activation import OPERATORS, POINTS, identify, number
from .constants import is_scalar
from .quantized import Coding, unsigned

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from .constants import Constants
    from .shapes import Shapes

# The longest known form of Gelu has ten nodes.
_MAX_REGION = 16


@dataclass(frozen=True)
class Context:
    """What the steps look things up in, and the nodes that layers have taken so far."""

    model: onnx_ir.Model
    constants: Constants
    shapes: Shapes
    taken: set[onnx_ir.Node] = field(default_factory=set)

    def free(self, node: onnx_ir.Node) -> bool:
        """Whether `node` is a node of the main graph that no layer covers, and no call of a model-local function."""
        return (
            node not in self.taken
            and node.graph is self.model.graph
            and len(node.outputs) == 1
            and node.op_identifier() not in self.model.functions
        )

    def only_reader(self, value: onnx_ir.Value) -> onnx_ir.Node | None:
        """The one free node that reads `value`, once; None where there is another use, in a subgraph or as output."""
        uses = tuple(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            return None
        return uses[0].node if self.free(uses[0].node) else None


Step = Callable[[Layer, Context], Layer | None]


def fuse(layer: Layer, context: Context) -> Layer:
    """The layer, grown as far as the steps take it; its nodes are taken."""
    # Where codes come out nothing more can be computed with them.
    for step in STEPS if layer.y_codes is None else ():
        layer = step(layer, context) or layer
    context.taken.update(layer.nodes)
    return layer


def fuse_bias(layer: Layer, context: Context) -> Layer | None:
    """`Add(Y, b)` or `Add(b, Y)` with one constant for each output, or one for all, becomes the bias."""
    output = layer.nodes[-1].outputs[0]
    node = context.only_reader(output)
    if layer.bias is not None or layer.epilogue != Epilogue() or node is None or not _is(node, "Add"):
        return None
    constant = context.constants.array(_other(node, output))
    if constant is None or not fits_rank(constant, layer.rank):
        return None
    bias = as_bias(constant, layer.out_features, axis=-2 if layer.transpose_y else -1)
    if bias is None:
        return None
    return replace(layer, bias=bias, epilogue=replace(layer.epilogue, bias=True), nodes=(*layer.nodes, node))


def fuse_activation(layer: Layer, context: Context) -> Layer | None:
    """The longest run of element-wise nodes that together compute an activation; see activation.py."""
    if layer.epilogue.residual or layer.epilogue.activation != Activation.NONE:
        return None
    start = layer.nodes[-1].outputs[0]
    region: list[onnx_ir.Node] = []
    values = {start: POINTS}
    best: Layer | None = None
    while len(region) < _MAX_REGION and (node := _next(values, region, layer, context)) is not None:
        region.append(node)
        values[node.outputs[0]] = _evaluate(node, values, context)
        result = node.outputs[0]
        closed = all(_is_inside(value, region) for value in values if value is not result)
        found = identify(values[result]) if closed else None
        if found is not None:
            activation, alpha, beta = found
            epilogue = replace(layer.epilogue, activation=activation, alpha=alpha, beta=beta)
            best = replace(layer, epilogue=epilogue, nodes=(*layer.nodes, *region))
    return best


def fuse_residual(layer: Layer, context: Context) -> Layer | None:
    """`Add(Y, R)` or `Add(R, Y)` with a tensor R that does not make Y larger by broadcasting."""
    output = layer.nodes[-1].outputs[0]
    node = context.only_reader(output)
    if layer.epilogue.residual or layer.transpose_y or node is None or not _is(node, "Add"):
        return None
    residual = _other(node, output)
    if residual is None or context.constants.known(residual) or not _fits_residual(layer, residual, context):
        return None
    epilogue = replace(layer.epilogue, residual=True)
    return replace(layer, residual=residual, epilogue=epilogue, nodes=(*layer.nodes, node))


def fuse_quantizer(layer: Layer, context: Context) -> Layer | None:
    """`QuantizeLinear(Y)` to 8 bits by one scale, after a weight that is dequantised; covered where uint8 will do."""
    output = layer.nodes[-1].outputs[0]
    node = context.only_reader(output)
    # A residual may have any shape that broadcasts, which only floats do.
    if not layer.stored or layer.epilogue.residual or node is None or node.inputs[0] is not output:
        return None
    coding = Coding.of(node, context.constants)
    if coding is None or coding.node.op_type != "QuantizeLinear":
        return None
    if coding.fault("output"):
        return replace(layer, obstacle=coding.fault("output"))
    codes = unsigned(node.outputs[0], coding, context.constants)
    if codes is None:
        return replace(layer, y_grid=coding.grid)
    return replace(layer, y_grid=coding.grid, y_codes=codes, nodes=(*layer.nodes, node))


STEPS: tuple[Step, ...] = (fuse_bias, fuse_activation, fuse_residual, fuse_quantizer)


def as_bias(constant: NDArray[np.generic], outputs: int, axis: int = -1) -> NDArray[np.float32] | None:
    """`constant` as [outputs], where it varies along `axis` only; None where it does not fit."""
    shape = constant.shape
    if constant.size == 1:
        return np.full(outputs, constant.reshape(-1)[0], dtype=np.float32)
    if constant.size == outputs and constant.ndim >= -axis and shape[axis] == outputs:
        return np.asarray(constant.reshape(outputs), dtype=np.float32)
    return None


def fits_rank(constant: NDArray[np.generic], rank: int | None) -> bool:
    """Whether `constant` adds no axis to a tensor of this rank; a layer's output has at least one."""
    return constant.ndim <= (1 if rank is None else rank)


def _is(node: onnx_ir.Node, op_type: str) -> bool:
    return node.domain == "" and node.op_type == op_type and len(node.inputs) == 2


def _other(node: onnx_ir.Node, value: onnx_ir.Value) -> onnx_ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _is_inside(value: onnx_ir.Value, region: list[onnx_ir.Node]) -> bool:
    """Whether nothing outside `region` reads `value`."""
    return not value.is_graph_output() and all(use.node in region for use in value.uses())


def _next(
    values: dict[onnx_ir.Value, NDArray[np.float64]], region: list[onnx_ir.Node], layer: Layer, context: Context
) -> onnx_ir.Node | None:
    """A node that reads nothing but `values` and scalars, or None."""
    for node in dict.fromkeys(use.node for value in values for use in value.uses()):
        operator = OPERATORS.get((node.domain, node.op_type))
        if node in region or operator is None or not operator.takes(node.inputs) or not context.free(node):
            continue
        others = [value for value in node.inputs if value is not None and value not in values]
        scalars = [context.constants.array(value) for value in others]
        if all(scalar is not None and is_scalar(scalar) and fits_rank(scalar, layer.rank) for scalar in scalars):
            return node
    return None


def _evaluate(
    node: onnx_ir.Node, values: dict[onnx_ir.Value, NDArray[np.float64]], context: Context
) -> NDArray[np.float64]:
    """`node` at the points."""
    arguments = [None if value is None else _argument(value, values, context) for value in node.inputs]
    with np.errstate(all="ignore"):
        result = OPERATORS[node.domain, node.op_type].function(node, arguments)
    return np.asarray(np.broadcast_to(result, POINTS.shape), dtype=np.float64)


def _argument(
    value: onnx_ir.Value, values: dict[onnx_ir.Value, NDArray[np.float64]], context: Context
) -> NDArray[np.float64] | float:
    if value in values:
        return values[value]
    scalar = context.constants.array(value)
    assert scalar is not None, "_next looked"
    return number(scalar)


def _fits_residual(layer: Layer, residual: onnx_ir.Value, context: Context) -> bool:
    """Whether shape inference finds nothing against adding `residual` to the layer's output [.., out].

    What it leaves open the operator settles when it runs: it broadcasts as ONNX does.
    """
    shape = context.shapes.of(residual)
    if shape is None or layer.rank is None:
        return True
    if len(shape) != layer.rank:
        return False
    x = context.shapes.of(layer.x)
    leading = [None] * (layer.rank - 1) if x is None or layer.transpose_x else list(x[:-1])
    # A dimension of 1 that the residual would stretch.
    pairs = zip([*leading, layer.out_features], shape, strict=True)
    return not any(mine == 1 and other != 1 for mine, other in pairs)
