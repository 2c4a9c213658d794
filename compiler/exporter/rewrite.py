"""Put sparse operators in the places of layers, and new weights into those that stay dense.

    H = MatMul(X, W)                 Z = ai.sparsec.SparseLinear <activation = "relu", ..>
    B = Add(H, b)            ->          (X, W.values, W.indices, W.indptr, b, R)
    A = Relu(B)
    Z = Add(A, R)

    A = DequantizeLinear(X)
    V = DequantizeLinear(W)          Y = ai.sparsec.QSparseLinear <products = "int8", x = "uint8", ..>
    H = MatMul(A, V)         ->          (X, W.values, W.indices, W.indptr, , , W.table, W.sums)
    Y = QuantizeLinear(H)

The program is never changed: the rewriting happens in a copy that shares its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from ...codegen.problem import INTEGERS
from ...ir.grid import CODES
from ...ir.values import Floats
from ...ir.values.floats import DTYPES
from ..frontend.constants import Constants, overridable
from ..frontend.integers import integer_codes
from ..frontend.nodes import attribute, operand
from ..frontend.quantized import Coding
from ..frontend.weights import from_matrix, weight_index
from .unsigned import add_initializer, make_unsigned

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from ...ir import Grid, Layer, Program, SparseMatrix

DOMAIN = "ai.sparsec"
OP_TYPE = "SparseLinear"
# The same with a result of 8 bits.
QUANTIZED_OP_TYPE = "QSparseLinear"
VERSION = 1


@dataclass(frozen=True)
class SparseOp:
    """What stands in a layer's place.

    Attributes:
        matrix: the packed weight.
        kernel: the name that the operator finds its code by.
        threads: how many threads it may use; 0 for the session's.
        x: how X is given, as in `codegen.problem.Problem`.
        x_grid: of X, where products are of integers and `x` is not "dynamic".
        y_grid: that Y is rounded to; None for floats.
    """

    matrix: SparseMatrix
    kernel: str
    threads: int
    x: str = "float"
    x_grid: Grid | None = None
    y_grid: Grid | None = None


def export(
    program: Program,
    ops: Mapping[str, SparseOp],
    weights: Mapping[str, NDArray[np.float32]] | None = None,
    biases: Mapping[str, NDArray[np.float32]] | None = None,
    rounded: Mapping[str, SparseOp] | None = None,
) -> onnx_ir.Model:
    """A new model in which the layers named in `ops` are sparse, and those named in `weights` have a new weight.

    Args:
        program: what was read; it is not changed, and its tensors are shared, not copied.
        ops: by layer name. Layers named in neither stay as they came.
        weights: by layer name, each [out, in] as `Layer.weight`; the layer's nodes stay.
        biases: by layer name, each [out], for layers in `ops` or `weights`; the others keep theirs.
        rounded: by layer name, for layers in `weights`: X is rounded as these operators round it, by ONNX's own.

    Raises:
        ValueError: a name is no layer's or is in both, a layer has an obstacle, or a shape or dtype is not the layer's.
    """
    weights, biases, rounded = weights or {}, biases or {}, rounded or {}
    _check(program, ops, weights)
    rewriter = _Rewriter(program)
    for layer in program.layers:
        bias = biases.get(layer.name)
        if layer.name in ops:
            rewriter.make_sparse(layer if bias is None else replace(layer, bias=bias), ops[layer.name])
        elif layer.name in weights:
            rounds = layer.name in rounded and rounded[layer.name].x != "float" and layer.x_grid is None
            if rounds and layer.fixed:
                rewriter.round_product(layer, weights[layer.name])
                continue
            rewriter.set_weight(layer, weights[layer.name])
            if rounds:
                rewriter.round_input(layer, rounded[layer.name])
            if bias is not None:
                rewriter.set_bias(layer, bias)
    rewriter.drop_unread()
    return rewriter.model


def bias_place(layer: Layer) -> tuple[onnx_ir.Node, int] | None:
    """The node and the number of its input that hold the layer's bias, or None where there is no such place."""
    first = layer.nodes[0]
    if first.op_type in ("Conv", "ConvTranspose"):
        # Any convolution can have a bias; one that is computed stays.
        return (first, 2) if layer.bias is not None or operand(first, 2) is None else None
    if layer.bias is None:
        return None
    if first.op_type == "Gemm" and operand(first, 2) is not None:
        return (first, 2) if attribute(first, "beta", 1.0) == 1 else None
    node = layer.nodes[1]
    return node, 1 if node.inputs[0] is first.outputs[0] else 0


def bias_shape(layer: Layer) -> tuple[int, ...]:
    """Of the array that holds the bias at its place."""
    return (layer.out_features, 1) if layer.transpose_y else (layer.out_features,)


def data_type(layer: Layer) -> onnx_ir.DataType:
    """ONNX's name for the layer's dtype."""
    return onnx_ir.DataType.from_numpy(DTYPES[layer.dtype])


def _check(program: Program, ops: Mapping[str, SparseOp], weights: Mapping[str, NDArray[np.float32]]) -> None:
    layers = {layer.name: layer for layer in program.layers}
    shapes = {name: op.matrix.shape for name, op in ops.items()} | {name: w.shape for name, w in weights.items()}
    for name, shape in shapes.items():
        if name not in layers:
            raise ValueError(f"'{name}' is no layer of the program")
        if name in ops and name in weights:
            raise ValueError(f"layer '{name}' cannot be sparse and have a new dense weight")
        if name in ops and layers[name].obstacle:
            raise ValueError(f"layer '{name}' cannot be sparse: {layers[name].obstacle}")
        if shape != layers[name].weight.shape:
            raise ValueError(f"layer '{name}': shape {shape}, expected {layers[name].weight.shape}")
        if name in ops and layers[name].y_codes is not None and ops[name].y_grid is None:
            raise ValueError(f"layer '{name}': its output is codes, expected a grid for them")
        if name in ops and ops[name].matrix.dtype != layers[name].dtype:
            raise ValueError(f"layer '{name}': {ops[name].matrix.dtype} values, expected {layers[name].dtype}")


class _Rewriter:
    """A copy of a program's model, and where its nodes and values are in it."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.model = program.model.clone()
        self._graph = self.model.graph
        self._node = dict(zip(program.model.graph, self._graph, strict=True))
        self._names = {name for graph in self.model.graphs() for value in _values(graph) if (name := value.name)}
        self._node_names = {node.name for node in self._graph if node.name}
        self._packed: dict[int, tuple[onnx_ir.Value, ...]] = {}
        self._made: dict[onnx_ir.Node, None] = {}

    def make_sparse(self, layer: Layer, op: SparseOp) -> None:
        """Replace the layer's nodes by one sparse operator, with Transposes around it where it needs them."""
        old = [self._node[node] for node in layer.nodes]
        last = old[-1]
        if layer.y_codes is not None:
            self._make_unsigned(last.outputs[0])
        index = weight_index(layer)
        weight, x = old[0].inputs[index], old[0].inputs[layer.nodes[0].inputs.index(layer.x)]
        assert weight is not None
        assert x is not None
        base = weight.name or layer.name
        # Step 1. Inputs: X turned where the operator wants it so, the packed weight, bias, residual.
        new: list[onnx_ir.Node] = []
        if op.x == "uint8":
            x = self._codes(x, layer)
        elif layer.fixed:
            x = self._floats(x, layer, new)
        if layer.transpose_x:
            x = self._transpose(x, layer, new)
        inputs = [x, *self._matrix(op.matrix, base), self._bias(layer, old, base), self._residual(layer, old, new)]
        inputs += self._shared(op, base)
        while inputs[-1] is None and len(inputs) > 5:
            inputs.pop()
        # Step 2. The operator, under the old node's name.
        node = onnx_ir.Node(
            DOMAIN,
            OP_TYPE if op.y_grid is None else QUANTIZED_OP_TYPE,
            inputs,
            _attributes(layer, op),
            name=old[0].name,
            doc_string=old[0].doc_string,
            metadata_props=dict(old[0].metadata_props) or None,
        )
        new.append(node)
        result = node.outputs[0]
        if op.y_grid is not None and layer.y_codes is None:
            result.name = self._unique(f"{last.outputs[0].name}.quantized")
            result = self._dequantized(result, op.y_grid, layer, new)
        if layer.transpose_y:
            result.name = self._unique(f"{last.outputs[0].name}.transposed")
            result = self._transpose(result, layer, new)
        # Step 3. The output takes the old one's place and name; what was only there for the old nodes goes.
        self._graph.insert_after(last, new)
        _take_over(last.outputs[0], result)
        if layer.y_codes is not None and result.type is None:
            result.type = onnx_ir.TensorType(onnx_ir.DataType.UINT8)
        self._graph.opset_imports.setdefault(DOMAIN, VERSION)
        self._remove(old)

    def set_weight(self, layer: Layer, matrix: NDArray[np.float32]) -> None:
        """Give the layer's node `matrix` [out, in] in the orientation and type that its weight has."""
        node, index = self._node[layer.nodes[0]], weight_index(layer)
        weight = node.inputs[index]
        assert weight is not None
        if layer.fixed:
            new = integer_codes(layer, matrix, Constants(self._program.model))
            node.replace_input_with(index, self._initializer(f"{weight.name}.pruned", new))
            self._drop_if_unused([weight])
            return
        tensor = weight.const_value if weight.is_initializer() else None
        if tensor is not None:
            shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype.numpy()
        else:
            computed = Constants(self._program.model).array(layer.nodes[0].inputs[index])
            assert computed is not None, "the layer was found by computing it"
            shape, dtype = computed.shape, computed.dtype
        array = from_matrix(layer.nodes[0], index, matrix, shape, dtype)
        codes = self._coded(weight, layer.nodes[0].inputs[index], array, layer)
        if codes is not None:
            node.replace_input_with(index, codes)
            self._drop_if_unused([weight])
            return
        own = len(weight.uses()) == 1 and not weight.is_graph_output()
        if tensor is not None and own:
            weight.const_value = onnx_ir.Tensor(
                array,
                name=weight.name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props) or None,
            )
            return
        # Computed, or shared with nodes that keep the old one.
        node.replace_input_with(index, self._initializer(f"{weight.name}.pruned", array))
        self._drop_if_unused([weight])

    def _coded(
        self, weight: onnx_ir.Value, source: onnx_ir.Value | None, array: NDArray[np.generic], layer: Layer
    ) -> onnx_ir.Value | None:
        """`array` dequantised as the weight is, so that ONNX Runtime goes on multiplying integers.

        None where the weight is not dequantised, or its codes cannot say `array` exactly.
        """
        old = weight.producer()
        coding = Coding.of(None if source is None else source.producer(), Constants(self._program.model))
        codes = None if coding is None else coding.encode(array)
        if old is None or codes is None:
            return None
        inputs = [self._initializer(f"{weight.name}.pruned", codes), *old.inputs[1:]]
        name = self._unique_node(f"{layer.name}/DequantizeLinear")
        node = onnx_ir.Node("", "DequantizeLinear", inputs, old.attributes.values(), name=name)
        node.outputs[0].name = self._unique(f"{weight.name}.pruned")
        self._graph.insert_before(old, node)
        return node.outputs[0]

    def round_input(self, layer: Layer, op: SparseOp) -> None:
        """Round the layer's X as `op` does: to a grid, each of its rows to one of its own, or to bfloat16."""
        node, index = self._node[layer.nodes[0]], 1 - weight_index(layer)
        x = node.inputs[index]
        assert x is not None
        new: list[onnx_ir.Node] = []
        if op.x == "bfloat16":
            half = self._step("Cast", [x], layer, new, to=onnx_ir.DataType.BFLOAT16)
            rounded = self._step("Cast", [half], layer, new, to=onnx_ir.DataType.FLOAT)
        else:
            rounded = self._on_rows(x, layer, new) if op.x_grid is None else self._on_grid(x, op.x_grid, layer, new)
        self._graph.insert_before(node, new)
        node.replace_input_with(index, rounded)

    def round_product(self, layer: Layer, matrix: NDArray[np.float32]) -> None:
        """In the place of a product of integers that one scale rounds X for: that of each row's own, in floats."""
        first = self._node[layer.nodes[0]]
        codes = first.inputs[layer.nodes[0].inputs.index(layer.x)]
        assert codes is not None and layer.product is not None, "the layer is dynamic"
        last = layer.product.producer()
        assert last is not None
        new: list[onnx_ir.Node] = []
        rounded = self._on_rows(self._floats(codes, layer, new), layer, new)
        weight = self._initializer(f"{layer.name}.weight", np.ascontiguousarray(matrix.T))
        product = self._step("MatMul", [rounded, weight], layer, new)
        if last is layer.nodes[0] and layer.bias is not None:  # the operator adds it itself
            product = self._step("Add", [product, self._initializer(f"{layer.name}.bias", layer.bias)], layer, new)
        old = self._node[last].outputs[0]
        self._graph.insert_after(self._node[last], new)
        _take_over(old, product)
        self._drop_if_unused([old])

    def _on_grid(self, x: onnx_ir.Value, grid: Grid, layer: Layer, new: list[onnx_ir.Node]) -> onnx_ir.Value:
        scale = self._initializer(f"{layer.name}.x_scale", np.array(grid.scale, dtype=np.float32))
        zero_point = self._initializer(f"{layer.name}.x_zero_point", np.array(grid.zero_point, dtype=np.uint8))
        codes = self._step("QuantizeLinear", [x, scale, zero_point], layer, new)
        return self._step("DequantizeLinear", [codes, scale, zero_point], layer, new)

    def _on_rows(self, x: onnx_ir.Value, layer: Layer, new: list[onnx_ir.Node]) -> onnx_ir.Value:
        """By the extremes of each row and zero, as codegen/kernels/cpu/quantize_rows.py has it."""

        def constant(value: float) -> onnx_ir.Value:
            return self._initializer(f"{layer.name}.constant", np.array(value, dtype=np.float32))

        def step(op_type: str, *inputs: onnx_ir.Value) -> onnx_ir.Value:
            return self._step(op_type, list(inputs), layer, new)

        # Step 1. The extremes: TopK, whose form is the same in all opsets.
        zero, one, codes = constant(0), constant(1), constant(CODES)
        count = self._initializer(f"{layer.name}.one", np.array([1], dtype=np.int64))
        axis = -2 if layer.transpose_x else -1
        largest, least = (self._step("TopK", [x, count], layer, new, axis=axis, largest=sign) for sign in (1, 0))
        largest, least = step("Max", largest, zero), step("Min", least, zero)
        # Step 2. Scale and zero point; codes, and what they stand for.
        scale = step("Max", step("Div", step("Sub", largest, least), codes), constant(1e-30))
        inverse = step("Div", one, scale)
        point = step("Round", step("Sub", zero, step("Mul", least, inverse)))
        shifted = step("Add", step("Round", step("Mul", x, inverse)), point)
        clipped = step("Max", step("Min", shifted, codes), zero)
        return step("Mul", step("Sub", clipped, point), scale)

    def _step(
        self, op_type: str, inputs: list[onnx_ir.Value], layer: Layer, new: list[onnx_ir.Node], **attributes: int
    ) -> onnx_ir.Value:
        """The first output of a new node."""
        node = onnx_ir.Node(
            "",
            op_type,
            inputs,
            [onnx_ir.AttrInt64(key, value) for key, value in attributes.items()],
            num_outputs=2 if op_type == "TopK" else 1,
            name=self._unique_node(f"{layer.name}/{op_type}"),
        )
        for output in node.outputs:
            output.name = self._unique(f"{layer.name}.{op_type.lower()}")
        new.append(node)
        return node.outputs[0]

    def set_bias(self, layer: Layer, bias: NDArray[np.float32]) -> None:
        """Give the layer `bias` [out] where its own stands, or could."""
        place = bias_place(layer)
        assert place is not None, "a layer has a new bias only where there is a place for it"
        node, index = self._node[place[0]], place[1]
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        old = node.inputs[index]
        name = f"{layer.name}.bias" if old is None else f"{old.name}.corrected"
        array = np.ascontiguousarray(bias.reshape(bias_shape(layer)), dtype=DTYPES[layer.dtype])
        node.replace_input_with(index, self._initializer(name, array))
        if old is not None:
            self._drop_if_unused([old])

    def _matrix(self, matrix: SparseMatrix, base: str) -> tuple[onnx_ir.Value, ...]:
        """The initialisers of a packed weight; layers that share the matrix share them."""
        if id(matrix) not in self._packed:
            parts = {"values": matrix.values, "indices": matrix.indices, "indptr": matrix.indptr}
            self._packed[id(matrix)] = tuple(self._initializer(f"{base}.{part}", parts[part]) for part in parts)
        return self._packed[id(matrix)]

    def _shared(self, op: SparseOp, base: str) -> list[onnx_ir.Value | None]:
        """What the values share: scales or a codebook; and the sums of codes, where products are of integers."""
        matrix = op.matrix
        table = matrix.kind.laid_out(matrix.table, matrix.panels * matrix.panel)
        return [
            self._initializer(f"{base}.table", table) if table.size else None,
            self._initializer(f"{base}.sums", matrix.sums) if op.x in INTEGERS else None,
        ]

    def _codes(self, x: onnx_ir.Value, layer: Layer) -> onnx_ir.Value:
        """The codes that the float32 value `x` was made of, in uint8."""
        if layer.x is layer.x_codes:
            return x
        node = x.producer()
        if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            raise ValueError(f"layer '{layer.name}': its input is not quantised")
        self._make_unsigned(node.inputs[0])
        return node.inputs[0]

    def _floats(self, x: onnx_ir.Value, layer: Layer, new: list[onnx_ir.Node]) -> onnx_ir.Value:
        """What the codes `x`, which the layer's operator multiplies, were made of or stand for."""
        node = x.producer()
        if layer.x_grid is None:
            floats = node.inputs[0] if node is not None and node.op_type == "DynamicQuantizeLinear" else x
            assert floats is not None
            return floats
        scale = self._initializer(f"{layer.name}.x_scale", np.array(layer.x_grid.scale, dtype=np.float32))
        zero_point = self._initializer(f"{layer.name}.x_zero_point", np.array(layer.x_grid.zero_point, dtype=np.uint8))
        return self._step("DequantizeLinear", [x, scale, zero_point], layer, new)

    def _make_unsigned(self, codes: onnx_ir.Value) -> None:
        around = [node for node in (codes.producer(), *(use.node for use in codes.uses())) if node is not None]
        old = [value for node in around for value in node.inputs[2:3] if value is not None]
        make_unsigned(self.model, codes, self._unique)
        self._drop_if_unused(old)

    def _dequantized(self, codes: onnx_ir.Value, grid: Grid, layer: Layer, new: list[onnx_ir.Node]) -> onnx_ir.Value:
        """`codes` as float32; the node goes where every layer that follows reads the codes."""
        codes.type = onnx_ir.TensorType(onnx_ir.DataType.UINT8)
        scale = self._initializer(f"{layer.name}.y_scale", np.array(grid.scale, dtype=np.float32))
        zero_point = self._initializer(f"{layer.name}.y_zero_point", np.array(grid.zero_point, dtype=np.uint8))
        name = self._unique_node(f"{layer.name}/DequantizeLinear")
        new.append(onnx_ir.Node("", "DequantizeLinear", [codes, scale, zero_point], name=name))
        self._made[new[-1]] = None
        return new[-1].outputs[0]

    def drop_unread(self) -> None:
        """Remove what only turned codes back that every reader takes as they are."""
        self._drop_if_unused([node.outputs[0] for node in self._made])

    def _bias(self, layer: Layer, old: list[onnx_ir.Node], base: str) -> onnx_ir.Value | None:
        """The bias as the initialiser that it already is, or as a new one where it was folded."""
        if layer.bias is None:
            return None
        for value in (value for node in old for value in node.inputs if value is not None and value.is_initializer()):
            tensor = value.const_value
            if tensor is None or tuple(tensor.shape) != layer.bias.shape or tensor.dtype != data_type(layer):
                continue
            if not overridable(value, self.model) and np.array_equal(tensor.numpy(), layer.bias):
                return value
        return self._initializer(f"{base}.bias", layer.bias.astype(DTYPES[layer.dtype], copy=False))

    def _residual(self, layer: Layer, old: list[onnx_ir.Node], new: list[onnx_ir.Node]) -> onnx_ir.Value | None:
        """The tensor added last: as it is, or Gemm's C times beta."""
        if layer.residual is None:
            return None
        if layer.nodes[-1] is not layer.nodes[0]:
            index = 1 if layer.nodes[-1].inputs[1] is layer.residual else 0
            return old[-1].inputs[index]
        beta, c = attribute(layer.nodes[0], "beta", 1.0), old[0].inputs[2]
        if beta == 1 or c is None:
            return c
        factor = self._initializer(f"{c.name}.beta", np.array(beta, dtype=DTYPES[layer.dtype]))
        new.append(onnx_ir.Node("", "Mul", [c, factor], name=self._unique_node(f"{layer.name}/Mul")))
        new[-1].outputs[0].name = self._unique(f"{c.name}.scaled")
        return new[-1].outputs[0]

    def _transpose(self, value: onnx_ir.Value, layer: Layer, new: list[onnx_ir.Node]) -> onnx_ir.Value:
        """`value` with its last two axes swapped."""
        assert layer.rank is not None, "a layer that is transposed has a known rank"
        perm = [*range(layer.rank - 2), layer.rank - 1, layer.rank - 2]
        name = self._unique_node(f"{layer.name}/Transpose")
        node = onnx_ir.Node("", "Transpose", [value], [onnx_ir.AttrInt64s("perm", perm)], name=name)
        node.outputs[0].name = self._unique(f"{value.name}.transposed")
        new.append(node)
        return node.outputs[0]

    def _initializer(self, name: str, array: NDArray[np.generic]) -> onnx_ir.Value:
        """A new initialiser under `name`, or that with a number behind it."""
        return add_initializer(self.model, self._unique(name), array)

    def _unique(self, name: str) -> str:
        return _take_name(name, self._names)

    def _unique_node(self, name: str) -> str:
        return _take_name(name, self._node_names)

    def _remove(self, nodes: list[onnx_ir.Node]) -> None:
        """Remove nodes, and what nobody reads any more because of it; what nobody read before stays."""
        sources = [value for node in nodes for value in node.inputs if value is not None]
        self._graph.remove(nodes, safe=True)
        self._drop_if_unused(sources)

    def _drop_if_unused(self, values: Iterable[onnx_ir.Value]) -> None:
        pending = list(values)
        while pending:
            value = pending.pop()
            if value.uses() or value.is_graph_output():
                continue
            node = value.producer()
            if node is None:
                self._drop_initializer(value)
            elif node.graph is self._graph and not any(o.uses() or o.is_graph_output() for o in node.outputs):
                pending.extend(source for source in node.inputs if source is not None)
                self._graph.remove(node, safe=True)

    def _drop_initializer(self, value: onnx_ir.Value) -> None:
        if value.is_initializer() and not overridable(value, self.model):
            if value.is_graph_input():
                self._graph.inputs.remove(value)
            assert value.name is not None
            self._graph.initializers.pop(value.name)


def _attributes(layer: Layer, op: SparseOp) -> list[onnx_ir.Attr]:
    (rows, cols), kind = op.matrix.block, op.matrix.kind
    grids = (("x", op.x_grid), ("y", op.y_grid))
    return [
        onnx_ir.AttrString("kernel", op.kernel),
        onnx_ir.AttrInt64("in_features", layer.in_features),
        onnx_ir.AttrInt64("out_features", layer.out_features),
        onnx_ir.AttrInt64("block_rows", rows),
        onnx_ir.AttrInt64("block_cols", cols),
        onnx_ir.AttrInt64("threads", op.threads),
        onnx_ir.AttrString("pattern", str(op.matrix.pattern)),
        onnx_ir.AttrFloat32("sparsity", 1 - op.matrix.density),
        onnx_ir.AttrString("activation", layer.epilogue.activation.value),
        onnx_ir.AttrFloat32("alpha", layer.epilogue.alpha),
        onnx_ir.AttrFloat32("beta", layer.epilogue.beta),
        *([onnx_ir.AttrString("value_type", str(kind))] if kind != Floats(op.matrix.dtype) else []),
        *([onnx_ir.AttrString("products", str(kind)), onnx_ir.AttrString("x", op.x)] if op.x != "float" else []),
        *(onnx_ir.AttrFloat32(f"{name}_scale", grid.scale) for name, grid in grids if grid is not None),
        *(onnx_ir.AttrInt64(f"{name}_zero_point", grid.zero_point) for name, grid in grids if grid is not None),
    ]


def _values(graph: onnx_ir.Graph) -> Iterable[onnx_ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _take_over(old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    """`new` in every place where `old` was used or returned, described as it was."""
    new.type, new.shape, new.doc_string = old.type, old.shape, old.doc_string
    new.metadata_props.update(old.metadata_props)
    new.meta.update(old.meta)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, None


def _take_name(name: str, names: set[str]) -> str:
    unique, number = name, 1
    while unique in names:
        number += 1
        unique = f"{name}_{number}"
    names.add(unique)
    return unique
