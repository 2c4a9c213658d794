"""One layer as a model of its own, for timing it dense and sparse on the same inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir

from ...ir import LayerKind, Program
from ..frontend.constants import Constants
from .rewrite import SparseOp, data_type, export

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
    output's shape, both of the layer's dtype; they keep their names. Dense and sparse models have the same inputs and
    output.

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
    alone, copy = _isolate(program, replace(layer, rank=len(rows) + 1))
    _set_shapes(alone, copy, rows)
    ops = {} if op is None else {copy.name: op}
    weights = {} if weight is None or op is not None else {copy.name: weight}
    return export(Program(alone, (copy,)), ops, weights)


def _isolate(program: Program, layer: Layer) -> tuple[onnx_ir.Model, Layer]:
    """A model of the layer's nodes and the constants they read, and the layer in terms of it."""
    constants = Constants(program.model)
    # Step 1. Everything constant above the layer's nodes comes along; what else they read is an input.
    nodes = set(layer.nodes)
    inputs: dict[onnx_ir.Value, None] = {layer.x: None}
    initializers: dict[onnx_ir.Value, None] = {}
    pending = [value for node in layer.nodes for value in node.inputs if value is not None]
    while pending:
        value = pending.pop()
        node = value.producer()
        if node in nodes or value in inputs or value in initializers:
            continue
        if not constants.known(value):
            inputs[value] = None
        elif node is None:
            initializers[value] = None
        else:
            nodes.add(node)
            pending.extend(source for source in node.inputs if source is not None)
    # Step 2. The nodes in their order, cloned.
    ordered = [node for node in program.model.graph if node in nodes]
    view = onnx_ir.GraphView(
        tuple(inputs),
        (layer.nodes[-1].outputs[0],),
        nodes=ordered,
        initializers=tuple(initializers),
        opset_imports=program.model.graph.opset_imports,
        name="layer",
    )
    graph = view.clone()
    # Step 3. The layer's nodes and values in the clone.
    cloned = dict(zip(ordered, graph, strict=True))
    values = dict(zip(inputs, graph.inputs, strict=True))
    copy = replace(
        layer,
        nodes=tuple(cloned[node] for node in layer.nodes),
        x=values[layer.x],
        residual=None if layer.residual is None else values.get(layer.residual, _cloned_residual(layer, cloned)),
    )
    return onnx_ir.Model(graph, ir_version=program.model.ir_version), copy


def _cloned_residual(layer: Layer, cloned: dict[onnx_ir.Node, onnx_ir.Node]) -> onnx_ir.Value | None:
    """A constant residual, found at the place where the original reads it."""
    node = layer.nodes[-1]
    index = next(i for i, value in enumerate(node.inputs) if value is layer.residual)
    return cloned[node].inputs[index]


def _set_shapes(model: onnx_ir.Model, layer: Layer, rows: tuple[int, ...]) -> None:
    """Give inputs and output their sizes."""

    def turned(shape: tuple[int, ...], swap: bool) -> onnx_ir.Shape:
        return onnx_ir.Shape((*shape[:-2], shape[-1], shape[-2]) if swap else shape)

    y = turned((*rows, layer.out_features), layer.transpose_y)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.type, value.shape = onnx_ir.TensorType(data_type(layer)), y
    layer.x.shape = turned((*rows, layer.in_features), layer.transpose_x)
