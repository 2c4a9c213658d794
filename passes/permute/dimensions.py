"""Which channels of a model can be put into another order: `find_dimensions`.

    h = MatMul(x, W1)               the rows of W1 [out, in], the places of b and
    r = Relu(Add(h, b))       ->    the columns of W2 are one dimension: in any one
    y = MatMul(r, W2)               order of all three y is the same

The nodes are walked once, in their order, with the channels along each axis of each value (axes.py). An initialiser's
axes begin free, a graph input's are fixed; each operator ties or freezes what its rule says (operators.py), and what a
graph output, a subgraph or an unknown operator reads is frozen. What is not frozen in the end is a dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from onnx_ir.passes.common import ShapeInferencePass

from ...ir import LayerKind, SparsecError
from .axes import Axis, Segment, extent, fixed, free, freeze, leaves, repeated
from .operators import RULES, Axes, Call, Sizes, UnknownError

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from ...ir import Layer, Program

# Before it Add and others broadcast by attributes.
_OLDEST_OPSET = 7
# From IR 4 on an initialiser that is also an input is a default that the caller may replace.
_OVERRIDABLE_FROM_IR = 4


@dataclass(frozen=True, slots=True)
class Place:
    """Where the channels of a dimension lie on one axis.

    Channel c is at `start + c * repeat` and the `repeat - 1` places after it.

    Attributes:
        name: of the layer, or of the initialiser.
        axis: of the layer's weight [out, in] (0 its rows, 1 its columns), or of the initialiser.
        start: where the first channel begins.
        repeat: places of one channel: kh · kw for a convolution's columns, H · W for those after a Flatten.
    """

    name: str
    axis: int
    start: int
    repeat: int


@dataclass(frozen=True, slots=True)
class Dimension:
    """Channels that can be put into any one order in all these places without changing what the model computes.

    Attributes:
        size: how many channels.
        rows: places among the outputs of layers.
        columns: places among the inputs of layers.
        constants: places in initialisers, those of the layers' weights, biases and whatever else lies along them.
    """

    size: int
    rows: tuple[Place, ...]
    columns: tuple[Place, ...]
    constants: tuple[Place, ...]


def find_dimensions(program: Program) -> tuple[Dimension, ...]:
    """The dimensions of a program's main graph that lie in at least one layer, in the order of the layers.

    A layer's axis may hold several, one behind the other (the inputs of a layer after Concat). When in doubt there is
    none: an axis that the graph's inputs or outputs, a subgraph, a model-local function, an operator without a rule or
    a Reshape that splits it can see keeps its order.
    """
    model = program.model
    if model.opset_imports.get("", 0) < _OLDEST_OPSET:
        return ()
    axes = _walk(model)
    # Step 1. Where each segment lies in the layers and in the initialisers.
    found: dict[Segment, tuple[list[Place], list[Place], list[Place]]] = {}
    for layer in program.layers:
        for kind, axis in enumerate(_matrix_axes(layer, axes)):
            for segment, place in _places(layer.name, kind, axis):
                found.setdefault(segment, ([], [], []))[kind].append(place)
    for value in model.graph.initializers.values():
        for i, axis in enumerate(axes.get(value) or ()):
            for segment, place in _places(value.name or "", i, axis):
                if segment in found:
                    found[segment][2].append(place)
    # Step 2. Each is a dimension.
    return tuple(
        Dimension(segment.size or 0, tuple(rows), tuple(columns), tuple(constants))
        for segment, (rows, columns, constants) in found.items()
    )


def indices(places: Mapping[Place, NDArray[np.int64]], size: int) -> NDArray[np.int64]:
    """The order of a whole axis of `size` places: new place i holds what is now at place [i].

    Args:
        places: of the dimensions on that axis, each with its order: new channel i is now channel order[i].
        size: places along the axis.
    """
    result = np.arange(size)
    for place, order in places.items():
        within = order[:, None] * place.repeat + np.arange(place.repeat)
        result[place.start : place.start + within.size] = place.start + within.reshape(-1)
    return result


def layer_orders(
    orders: Mapping[Dimension, NDArray[np.int64]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For layers of these shapes [out, in] their rows and columns: the new weight is weight[rows][:, columns].

    Statistics move along: a second moment of the inputs becomes H[columns][:, columns], a bias b[rows]. Layers that no
    order touches are left out.

    Args:
        orders: of each dimension [size] int64: new channel i is now channel order[i].
        shapes: of the layers' weights, by name; places in other layers are passed over.

    Returns:
        ([out], [in]) int64 by the layer's name.

    Raises:
        SparsecError: an order is no permutation of its dimension.
    """
    check_orders(orders)
    touched: dict[str, tuple[dict[Place, NDArray[np.int64]], dict[Place, NDArray[np.int64]]]] = {}
    for dimension, order in orders.items():
        for place in (*dimension.rows, *dimension.columns):
            if place.name in shapes:
                touched.setdefault(place.name, ({}, {}))[place.axis][place] = order
    return {
        name: (indices(rows, shapes[name][0]), indices(columns, shapes[name][1]))
        for name, (rows, columns) in touched.items()
    }


def check_orders(orders: Mapping[Dimension, NDArray[np.int64]]) -> None:
    """Refuse what is no order.

    Raises:
        SparsecError: an order is no permutation of its dimension.
    """
    for dimension, order in orders.items():
        if order.shape != (dimension.size,) or not np.array_equal(np.sort(order), np.arange(dimension.size)):
            where = ", ".join(place.name for place in (*dimension.rows, *dimension.columns))
            raise SparsecError(f"an order of the {dimension.size} channels of {where} must hold each of them once")


def _walk(model: onnx_ir.Model) -> dict[onnx_ir.Value, Axes | None]:
    """The axes of every value of the main graph; None where their number is unknown."""
    graph, shapes = model.graph, _shapes(model)
    axes: dict[onnx_ir.Value, Axes | None] = {value: _fixed(shapes.get(value.name)) for value in graph.inputs}
    for value in graph.initializers.values():
        overridable = value.is_graph_input() and model.ir_version >= _OVERRIDABLE_FROM_IR
        if value.const_value is not None and not overridable:
            axes[value] = [free(int(size)) for size in value.const_value.shape.numpy()]
    for node in graph:
        outputs = _apply(node, model, axes, shapes)
        for value, result in zip(node.outputs, outputs, strict=True):
            axes[value] = result
    for value, found in axes.items():
        if found is not None and (value.is_graph_output() or any(use.node.graph is not graph for use in value.uses())):
            freeze(*found)
    return axes


def _apply(
    node: onnx_ir.Node,
    model: onnx_ir.Model,
    axes: Mapping[onnx_ir.Value, Axes | None],
    shapes: Mapping[str | None, Sizes],
) -> list[Axes | None]:
    """The axes of a node's outputs, by its rule."""
    try:
        if node.domain != "" or node.op_identifier() in model.functions or node.op_type not in RULES:
            raise UnknownError
        rule, count = RULES[node.op_type]
        sources = [value for value in node.inputs[:count] if value is not None]
        inputs = [found for value in sources if (found := axes.get(value)) is not None]
        # An input that is left out may be followed by none.
        if not inputs or len(inputs) < len(sources) or None in node.inputs[: len(sources)]:
            raise UnknownError
        call = Call(node, inputs, [shapes.get(value.name) for value in sources], shapes.get(node.outputs[0].name))
        results: list[Axes | None] = [*rule(call)]
        if any(value.uses() or value.is_graph_output() for value in node.outputs[len(results) :]):
            raise UnknownError
        for value in node.inputs[count:]:
            _freeze_all(value, axes)
    except UnknownError:
        for value in node.inputs:
            _freeze_all(value, axes)
        return [_fixed(shapes.get(value.name)) for value in node.outputs]
    return results + [None] * (len(node.outputs) - len(results))


def _freeze_all(value: onnx_ir.Value | None, axes: Mapping[onnx_ir.Value, Axes | None]) -> None:
    if value is not None:
        freeze(*(axes.get(value) or ()))


def _fixed(sizes: Sizes) -> Axes | None:
    return None if sizes is None else [fixed(size if isinstance(size, int) else None) for size in sizes]


def _shapes(model: onnx_ir.Model) -> dict[str | None, Sizes]:
    """What shape inference finds, by the values' names."""
    copy = model.clone()  # which shares the tensors
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy)
    values = (*copy.graph.inputs, *(value for node in copy.graph for value in node.outputs))
    return {
        value.name: [size if isinstance(size, int) else size.value for size in value.shape]
        for value in values
        if value.name and value.shape is not None
    }


def _matrix_axes(layer: Layer, axes: Mapping[onnx_ir.Value, Axes | None]) -> tuple[Axis, Axis]:
    """The axes of `layer.weight` [out, in]."""
    node = layer.nodes[0]
    index = 1 if layer.kind is not LayerKind.LINEAR or node.inputs[0] is layer.x else 0
    value = node.inputs[index]
    weight = None if value is None else axes.get(value)
    if weight is None or layer.kind is LayerKind.RECURRENT or (layer.kind is LayerKind.LINEAR and len(weight) > 2):
        return fixed(layer.out_features), fixed(layer.in_features)
    if layer.kind is LayerKind.CONV:
        outputs, inputs = weight[:2] if layer.op_type == "Conv" else weight[1::-1]
        size = extent(inputs)
        kernel = layer.in_features // size if size else 0
        return outputs, repeated(inputs, kernel)
    found = node.attributes.get(("transA", "transB")[index])
    is_turned = found is not None and bool(found.value)
    # B lies as [in, out], A as [out, in].
    return (weight[1], weight[0]) if is_turned == (index == 0) else (weight[0], weight[1])


def _places(name: str, number: int, axis: Axis) -> Iterator[tuple[Segment, Place]]:
    """The segments of an axis that can be reordered, and where they lie on it."""
    start = 0
    for segment, repeat in leaves(axis):
        if segment.size is None:
            return
        if not segment.frozen:
            yield segment, Place(name, number, start, repeat)
        start += segment.size * repeat
