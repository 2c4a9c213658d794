"""Which values of a graph never change, and what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from ...ir.values.floats import DTYPES
from .nodes import attribute, read_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Operators through which exporters and quantizers pass weights. None makes more elements than it reads, but for
# broadcasting and Concat, so a small file cannot ask for unbounded memory.
_FOLDED = frozenset(
    {"Add", "Cast", "Concat", "Constant", "DequantizeLinear", "Div", "Flatten", "Identity", "Mul", "Neg", "Pow"}
    | {"QuantizeLinear", "Reciprocal", "Reshape", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze"}
)
_MAX_ELEMENTS = 2**31
_BFLOAT16 = DTYPES["bfloat16"]
# In IR 3 every initialiser is a graph input by rule, and ONNX Runtime takes it as constant; from 4 on an initialiser
# that is also an input is a default that the caller may replace.
OVERRIDABLE_FROM_IR = 4


def overridable(value: onnx_ir.Value, model: onnx_ir.Model) -> bool:
    """Whether `value` is an initialiser of `model` that a caller may replace by an input."""
    return value.is_initializer() and value.is_graph_input() and model.ir_version >= OVERRIDABLE_FROM_IR


def is_scalar(array: NDArray[Any]) -> bool:
    """Whether `array` holds one number, in whatever number of axes."""
    return array.size == 1 and (array.dtype.kind in "fiu" or array.dtype == _BFLOAT16)


class Constants:
    """The constant values of a model's main graph, read and computed when asked for, and kept."""

    def __init__(self, model: onnx_ir.Model) -> None:
        self._model = model
        self._known: dict[onnx_ir.Value, bool] = {}
        self._arrays: dict[onnx_ir.Value, NDArray[Any] | None] = {}

    def known(self, value: onnx_ir.Value | None) -> bool:
        """Whether `value` depends on nothing but constants; nothing is read or computed."""
        if value is None:
            return False
        pending = [value]
        while pending:  # not recursive: a chain may be longer than Python's stack
            top = pending[-1]
            node = top.producer()
            if top in self._known:
                pending.pop()
            elif node is None:
                fixed = top.is_initializer() and not overridable(top, self._model)
                self._known[top] = fixed and top.const_value is not None
            elif not self.foldable(node):
                self._known[top] = False
            else:
                sources = [source for source in node.inputs if source is not None]
                unknown = [source for source in sources if source not in self._known]
                if unknown:
                    pending.extend(unknown)
                else:
                    self._known[top] = all(self._known[source] for source in sources)
        return self._known[value]

    def array(self, value: onnx_ir.Value | None) -> NDArray[Any] | None:
        """What `value` is; None where it is not constant, or an operator fails on it.

        Raises:
            SparsecError: a tensor's bytes do not fit its shape and type.
        """
        if value is None or not self.known(value):
            return None
        pending = [value]
        while pending:
            top = pending[-1]
            node = top.producer()
            missing = [] if node is None else [v for v in node.inputs if v is not None and v not in self._arrays]
            if top in self._arrays:
                pending.pop()
            elif missing:
                pending.extend(missing)
            elif node is None:
                assert top.const_value is not None
                self._arrays[top] = read_tensor(top.const_value, top.name)
            else:
                self._arrays[top] = self._compute(node, list(node.outputs).index(top))
        return self._arrays[value]

    def foldable(self, node: onnx_ir.Node) -> bool:
        """Whether `node` is one of ONNX's own operators that are computed where all they read is constant."""
        standard = node.domain == "" and node.op_identifier() not in self._model.functions
        several = node.op_type == "Split"  # of attention's matrices, where queries come from elsewhere
        return standard and node.op_type in _FOLDED and (len(node.outputs) == 1 or several)

    def _compute(self, node: onnx_ir.Node, output: int) -> NDArray[Any] | None:
        """One output of `node` on constant inputs, by ONNX Runtime."""
        inputs = [None if value is None else self._arrays[value] for value in node.inputs]
        if any(value is not None and array is None for value, array in zip(node.inputs, inputs, strict=True)):
            return None
        value = node.attributes.get("value")
        if node.op_type == "Constant" and value is not None and value.type == onnx_ir.AttributeType.TENSOR:
            return None if value.is_ref() else read_tensor(value.as_tensor(), node.outputs[0].name)
        if _elements(node, inputs) > _MAX_ELEMENTS:
            return None
        return _evaluate(node, inputs, self._model, output)


def _elements(node: onnx_ir.Node, inputs: list[NDArray[Any] | None]) -> int:
    """An upper bound of the elements of a node's output."""
    shapes = [array.shape for array in inputs if array is not None]
    if node.op_type in ("Concat", "Constant"):
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)
    try:
        return int(np.prod([float(size) for size in np.broadcast_shapes(*shapes)]))
    except ValueError:  # not an element-wise operator: its output is no larger than its largest input
        return max(int(np.prod(shape, dtype=np.int64)) for shape in shapes)


def _evaluate(
    node: onnx_ir.Node, inputs: list[NDArray[Any] | None], model: onnx_ir.Model, output: int
) -> NDArray[Any] | None:
    """One output of a node; None where it cannot be computed."""
    try:
        if node.op_type == "Transpose":  # a view, so that a large weight is not copied
            assert inputs[0] is not None
            return np.transpose(inputs[0], attribute(node, "perm", tuple(range(inputs[0].ndim))[::-1]))
        if node.op_type == "Cast" and attribute(node, "to", 0) == onnx_ir.DataType.BFLOAT16:
            assert inputs[0] is not None
            return inputs[0].astype(_BFLOAT16)
        # bfloat16 is computed in float32 and then rounded, to what one operator would give: ONNX Runtime has few CPU
        # kernels for it, and hands no array of it to NumPy.
        wide = [a.astype(np.float32) if a is not None and a.dtype == _BFLOAT16 else a for a in inputs]
        result = _run(node, wide, model, output)
        rounds = node.op_type != "Cast" and any(a is not b for a, b in zip(inputs, wide, strict=True))
        return result.astype(_BFLOAT16) if rounds and result.dtype == np.float32 else result
    except Exception:  # whatever a malformed node provokes: it is then no constant that sparsec knows
        return None


def _run(node: onnx_ir.Node, inputs: list[NDArray[Any] | None], model: onnx_ir.Model, output: int) -> NDArray[Any]:
    """Run one node in ONNX Runtime, which would fold it to the same."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    values = [
        None if array is None else onnx_ir.Value(name=f"input{i}", const_value=onnx_ir.Tensor(array))
        for i, array in enumerate(inputs)
    ]
    copy = onnx_ir.Node(node.domain, node.op_type, values, node.attributes, num_outputs=len(node.outputs))
    graph = onnx_ir.Graph(
        [],
        copy.outputs,
        nodes=[copy],
        initializers=[value for value in values if value is not None],
        opset_imports={"": model.opset_imports.get("", 1)},
        name="constant",
    )
    proto = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=model.ir_version))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {})[output])
