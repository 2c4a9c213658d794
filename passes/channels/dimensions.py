"""Which channels of a model belong together, can be put into another order or left out: `find_channels`.

    h = MatMul(x, W1)               the rows of W1 [out, in], the places of b and
    r = Relu(Add(h, b))       ->    the columns of W2 are one dimension: in any one
    y = MatMul(r, W2)               order of all three y is the same

The nodes are walked once, in their order, with the channels along each axis of each value (axes.py). An initialiser's
axes begin free, a graph input's are fixed; each operator ties or freezes what its rule says (operators.py), and what a
graph output, a subgraph or an unknown operator reads is frozen. What is not frozen in the end is a dimension. Where no
operator works across its channels (a softmax, a mean) either, some of them can be left out: what reads them are the
columns of weights, and y is what it would be with zeros there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...ir import LayerKind
from .axes import Axis, Segment, explain, extent, fixed, free, freeze, leaves, merge, repeated
from .call import Axes, Call, Sizes, UnknownError
from .operators import GAPS, RULES
from .shapes import infer_shapes

if TYPE_CHECKING:
    import onnx_ir

    from ...ir import Layer, Program

# Before it Add and others broadcast by attributes.
_OLDEST_OPSET = 7
# From IR 4 on an initialiser that is also an input is a default that the caller may replace.
OVERRIDABLE_FROM_IR = 4


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


@dataclass(frozen=True, eq=False)
class Channels:
    """What lies along the axes of a program's main graph.

    Attributes:
        axes: of every value; None where their number is unknown.
        layers: by layer name the two axes of its weight [out, in].
        dimensions: segments that can be put into another order and lie in at least one layer, in the order of the
            layers.
    """

    axes: Mapping[onnx_ir.Value, Axes | None]
    layers: Mapping[str, tuple[Axis, Axis]]
    dimensions: Mapping[Segment, Dimension]


def find_dimensions(program: Program) -> tuple[Dimension, ...]:
    """The dimensions of `find_channels`."""
    return tuple(find_channels(program).dimensions.values())


def find_channels(program: Program) -> Channels:
    """Where the channels of a program's main graph lie.

    A layer's axis may hold several dimensions, one behind the other (the inputs of a layer after Concat). When in doubt
    there is none: an axis that the graph's inputs or outputs, a subgraph, a model-local function, an operator without a
    rule or a Reshape that splits it can see keeps its order.
    """
    model = program.model
    if model.opset_imports.get("", 0) < _OLDEST_OPSET:
        return Channels({}, {}, {})
    axes = _Walk(model).axes
    layers = {layer.name: _matrix_axes(layer, axes) for layer in program.layers}
    # Step 1. Where each segment lies in the layers and in the initialisers.
    found: dict[Segment, tuple[list[Place], list[Place], list[Place]]] = {}
    for name, matrix in layers.items():
        for kind, axis in enumerate(matrix):
            for segment, place in _places(name, kind, axis):
                found.setdefault(segment, ([], [], []))[kind].append(place)
    for value in model.graph.initializers.values():
        for i, axis in enumerate(axes.get(value) or ()):
            for segment, place in _places(value.name or "", i, axis):
                if segment in found:
                    found[segment][2].append(place)
    # Step 2. Each is a dimension.
    dimensions = {
        segment: Dimension(segment.size or 0, tuple(rows), tuple(columns), tuple(constants))
        for segment, (rows, columns, constants) in found.items()
    }
    return Channels(axes, layers, dimensions)


class _Walk:
    """Through the main graph, in the order of its nodes.

    Attributes:
        axes: of every value; None where their number is unknown.
    """

    def __init__(self, model: onnx_ir.Model) -> None:
        graph = model.graph
        self._model, self._shapes = model, infer_shapes(model)
        self.axes: dict[onnx_ir.Value, Axes | None] = {}
        self._constants: set[onnx_ir.Value] = set()
        for value in graph.inputs:
            self.axes[value] = _fixed(self._shapes.get(value.name))
            explain(f"they are those of the model's input '{value.name}'", *(self.axes[value] or ()))
        for value in graph.initializers.values():
            overridable = value.is_graph_input() and model.ir_version >= OVERRIDABLE_FROM_IR
            if value.const_value is not None and not overridable:
                self.axes[value] = [free(int(size)) for size in value.const_value.shape.numpy()]
                self._constants.add(value)
        for node in graph:
            for value, result in zip(node.outputs, self._apply(node), strict=True):
                self.axes[value] = result
            # What ConstantOfShape makes is no weight, that it could be zero where channels are left out.
            filled = node.op_type == "ConstantOfShape"
            if not filled and all(value in self._constants for value in node.inputs if value is not None):
                self._constants.update(node.outputs)
        for value, found in self.axes.items():
            inside = any(use.node.graph is not graph for use in value.uses())
            if found is not None and (value.is_graph_output() or inside):
                freeze(*found)
                reader = "a subgraph reads them" if inside else f"they are those of the model's output '{value.name}'"
                explain(reader, *found)

    def _apply(self, node: onnx_ir.Node) -> list[Axes | None]:
        """The axes of a node's outputs, by its rule."""
        label = f"{node.op_type} '{node.name or node.outputs[0].name}'"
        try:
            results: list[Axes | None] = [*self._by_rule(node)]
            if any(value.uses() or value.is_graph_output() for value in node.outputs[len(results) :]):
                raise UnknownError
            words = f"{label} works across them or by their order"
        except UnknownError:
            for value in node.inputs:
                self._freeze(value)
            results = [_fixed(self._shapes.get(value.name)) for value in node.outputs]
            words = f"what {label} does with them is not known"
        results += [None] * (len(node.outputs) - len(results))
        read = [self.axes.get(value) for value in node.inputs if value is not None]
        explain(words, *(axis for axes in (*read, *results) for axis in axes or ()))
        return results

    def _by_rule(self, node: onnx_ir.Node) -> list[Axes]:
        if node.domain != "" or node.op_identifier() in self._model.functions or node.op_type not in RULES:
            raise UnknownError
        rule, count = RULES[node.op_type]
        sources = {i: value for i, value in enumerate(node.inputs[:count]) if value is not None}
        inputs = {i: found for i, value in sources.items() if (found := self.axes.get(value)) is not None}
        # With most operators an input that is left out may be followed by none.
        gap = len(sources) <= max(sources, default=0) and node.op_type not in GAPS
        if not inputs or len(inputs) < len(sources) or gap:
            raise UnknownError
        given = [self._shapes.get(value.name) for value in sources.values()]
        constant = [value in self._constants for value in sources.values()]
        results = rule(Call(node, inputs, given, constant, self._shapes.get(node.outputs[0].name)))
        for value in node.inputs[count:]:
            self._freeze(value)
        return results

    def _freeze(self, value: onnx_ir.Value | None) -> None:
        if value is not None:
            freeze(*(self.axes.get(value) or ()))


def _fixed(sizes: Sizes) -> Axes | None:
    return None if sizes is None else [fixed(size if isinstance(size, int) else None) for size in sizes]


def _matrix_axes(layer: Layer, axes: Mapping[onnx_ir.Value, Axes | None]) -> tuple[Axis, Axis]:
    """The axes of `layer.weight` [out, in]."""
    node = layer.nodes[0]
    index = 1 if layer.kind is not LayerKind.LINEAR or node.inputs[0] is layer.x else 0
    value = node.inputs[index]
    weight = None if value is None else axes.get(value)
    if weight is None or (layer.kind is LayerKind.LINEAR and len(weight) > 2):
        return fixed(layer.out_features), fixed(layer.in_features)
    if layer.kind is LayerKind.RECURRENT:
        return merge(weight[:2]), weight[2]
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
    """The segments of an axis that can be reordered, which takes two channels, and where they lie on it."""
    start = 0
    for segment, repeat in leaves(axis):
        if segment.size is None:
            return
        if not segment.frozen and segment.size > 1:
            yield segment, Place(name, number, start, repeat)
        start += segment.size * repeat
