"""One layer as a model of its own, for timing it dense and sparse on the same inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir

from ...ir import LayerKind, Program
from ..frontend.constants import Constants
from ..frontend.quantized import Coding
from .rewrite import SparseOp, data_type, export
from .unsigned import make_unsigned

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...ir import Layer

Rows = int | tuple[int, ...]


def layer_model(
    program: Program,
    layer: Layer,
    rows: Rows,
    op: SparseOp | None = None,
    weight: NDArray[np.float32] | None = None,
) -> onnx_ir.Model:
    """A model of `layer` alone: its own nodes, or `op` in their place.

    Its inputs are X [*rows, in] (the last two swapped where the layer reads X transposed), and the residual, of the
    output's shape, both of the layer's dtype; they keep their names. Where X comes of 8-bit codes, and Y becomes such,
    the codes are input and output: ONNX Runtime then multiplies integers, as it does in the whole model. Dense and
    sparse models have the same inputs and output.

    Args:
        program: what the layer was found in; it is not changed.
        layer: one of its linear layers.
        rows: the leading sizes of X as the product sees it: a number for [rows, in], a tuple for more axes.
        op: the sparse operator; None for the layer as it came.
        weight: [out, in], instead of the layer's own where it stays dense.

    Raises:
        ValueError: the layer is not linear.
    """
    if layer.kind is not LayerKind.LINEAR:
        raise ValueError(f"layer '{layer.name}' is {layer.kind.value}: a model of one layer needs a linear one")
    rows = (rows,) if isinstance(rows, int) else rows
    alone, copy = _isolate(program, replace(layer, rank=len(rows) + 1), rows)
    ops = {} if op is None else {copy.name: op}
    weights = {} if weight is None or op is not None else {copy.name: weight}
    return export(Program(alone, (copy,)), ops, weights)


def _isolate(program: Program, layer: Layer, rows: tuple[int, ...]) -> tuple[onnx_ir.Model, Layer]:
    """A model of the layer's nodes and the constants they read, and the layer in terms of it."""
    constants = Constants(program.model)
    # Step 1. What makes X of codes and codes of Y comes along.
    nodes, x, y = list(layer.nodes), layer.x, layer.nodes[-1].outputs[0]
    head = Coding.of(x.producer(), constants) if layer.x_grid is not None and not layer.fixed else None
    rounding = x.producer() if layer.fixed and layer.dynamic else None
    apart = layer.y_grid is not None and layer.y_codes is None
    tail = Coding.of(next(iter(y.uses())).node, constants) if apart else None
    if head is not None and head.node.inputs[0] is not None:
        nodes.append(head.node)
        x = head.node.inputs[0]
    if rounding is not None and rounding.op_type == "DynamicQuantizeLinear" and rounding.inputs[0] is not None:
        nodes.append(rounding)
        x = rounding.inputs[0]
    if tail is not None:
        nodes.append(tail.node)
        y = tail.node.outputs[0]
    # Step 2. And everything constant above; the nodes in their order, cloned.
    above, initializers, inputs = _sources(nodes, x, constants)
    ordered = [node for node in program.model.graph if node in above]
    opsets = program.model.graph.opset_imports
    view = onnx_ir.GraphView(inputs, (y,), nodes=ordered, initializers=initializers, opset_imports=opsets, name="layer")
    graph = view.clone()
    # Step 3. The layer's nodes and values in the clone.
    cloned = dict(zip(ordered, graph, strict=True))
    values = dict(zip(inputs, graph.inputs, strict=True))
    read = cloned[layer.nodes[0]].inputs[layer.nodes[0].inputs.index(layer.x)]
    assert read is not None, "it was found there"
    copy = replace(
        layer,
        nodes=tuple(cloned[node] for node in layer.nodes),
        x=read,
        x_codes=None if layer.x_codes is None else values[x],
        y_codes=None if layer.y_codes is None else graph.outputs[0],
        residual=None if layer.residual is None else values.get(layer.residual, _cloned_residual(layer, cloned)),
    )
    # Step 4. Types and sizes of inputs and output; codes in uint8 where the whole model could have them so.
    floats, y_shape = data_type(layer), _turned((*rows, layer.out_features), layer.transpose_y)
    for value in graph.inputs:
        _set(value, floats, y_shape)
    kind = head.kind if head is not None else onnx_ir.DataType.UINT8 if layer.x is layer.x_codes else floats
    _set(values[x], kind, _turned((*rows, layer.in_features), layer.transpose_x))
    _set(graph.outputs[0], floats if tail is None else tail.kind, y_shape)
    model = onnx_ir.Model(graph, ir_version=program.model.ir_version)
    for side, codes in (("x", copy.x_codes), ("y", copy.y_codes)):
        if codes is not None:
            make_unsigned(model, codes, f"{{}}.{side}".format)
            codes.type = onnx_ir.TensorType(onnx_ir.DataType.UINT8)
    return model, copy


def _sources(
    nodes: list[onnx_ir.Node], x: onnx_ir.Value, constants: Constants
) -> tuple[set[onnx_ir.Node], tuple[onnx_ir.Value, ...], tuple[onnx_ir.Value, ...]]:
    """The nodes with those that make their constants, their initialisers, and what else they read: `x` first."""
    found = set(nodes)
    inputs: dict[onnx_ir.Value, None] = {x: None}
    initializers: dict[onnx_ir.Value, None] = {}
    pending = [value for node in nodes for value in node.inputs if value is not None]
    while pending:
        value = pending.pop()
        node = value.producer()
        if node in found or value in inputs or value in initializers:
            continue
        if not constants.known(value):
            inputs[value] = None
        elif node is None:
            initializers[value] = None
        else:
            found.add(node)
            pending.extend(source for source in node.inputs if source is not None)
    return found, tuple(initializers), tuple(inputs)


def _set(value: onnx_ir.Value, kind: onnx_ir.DataType, shape: onnx_ir.Shape) -> None:
    value.type, value.shape = onnx_ir.TensorType(kind), shape


def _turned(shape: tuple[int, ...], swap: bool) -> onnx_ir.Shape:
    return onnx_ir.Shape((*shape[:-2], shape[-1], shape[-2]) if swap else shape)


def _cloned_residual(layer: Layer, cloned: dict[onnx_ir.Node, onnx_ir.Node]) -> onnx_ir.Value | None:
    """A constant residual, found at the place where the original reads it."""
    node = layer.nodes[-1]
    index = next(i for i, value in enumerate(node.inputs) if value is layer.residual)
    return cloned[node].inputs[index]
