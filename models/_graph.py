"""A ModelProto under construction, with the names that PyTorch's exporter gives to nodes and tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx
    from numpy.typing import NDArray

IR_VERSION = 10
OPSET = 17


class GraphBuilder:
    """Writes nodes and initialisers straight into one ModelProto, so that no weight is held twice for long.

    A module's path, such as "encoder.layer.0", prefixes its parameters with dots and its nodes with slashes:
    parameter `encoder.layer.0.weight`, node `/encoder/layer.0/MatMul`, tensor `/encoder/layer.0/MatMul_output_0`.
    """

    def __init__(self, name: str, seed: int = 0) -> None:
        self.model: onnx.ModelProto = helper.make_model(
            helper.make_graph([], name, [], []),
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
            producer_name="sparsec",
        )
        self._rng = np.random.default_rng(seed)

    def input(self, name: str, dims: Sequence[str | int], dtype: int = TensorProto.FLOAT) -> str:
        """Declare a graph input; `dtype` is a `TensorProto` constant."""
        self.model.graph.input.append(helper.make_tensor_value_info(name, dtype, dims))
        return name

    def output(self, name: str, source: str, dims: Sequence[str | int]) -> None:
        """Declare a float32 graph output and rename the tensor `source`, which no node may read yet, to it."""
        producer = next(node for node in self.model.graph.node if source in node.output)
        producer.output[list(producer.output).index(source)] = name
        self.model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))

    def node(self, op_type: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        """Append a node; returns the name of its first output."""
        names = [f"{name}_output_{index}" for index in range(outputs)]
        self.model.graph.node.append(helper.make_node(op_type, inputs, names, name=name, **attributes))
        return names[0]

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """A Constant node, as the exporter writes scalars and shapes."""
        return self.node("Constant", [], name, value=numpy_helper.from_array(value))

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """An initialiser with the array's own dtype and shape."""
        # Filled in place: `initializer.append(from_array(...))` would copy the bytes once more.
        tensor = self.model.graph.initializer.add()
        tensor.name = name
        tensor.dims.extend(value.shape)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        tensor.raw_data = value.tobytes()
        return name

    def random(self, name: str, shape: Sequence[int], scale: float, mean: float = 0.0) -> str:
        """A float32 initialiser drawn from the normal distribution with this mean and standard deviation."""
        values = self._rng.standard_normal(tuple(shape), dtype=np.float32)
        values *= np.float32(scale)
        values += np.float32(mean)
        return self.weight(name, values)

    def matmul_add(self, x: str, path: str, inputs: int, outputs: int) -> str:
        """`nn.Linear` on a 3-D tensor: MatMul with weight [inputs, outputs], then Add with the bias as first input."""
        weight = self.random(f"{path}.weight", (inputs, outputs), inputs**-0.5)
        bias = self.random(f"{path}.bias", (outputs,), 0.1)
        product = self.node("MatMul", [x, weight], f"{scope(path)}/MatMul")
        return self.node("Add", [bias, product], f"{scope(path)}/Add")


def scope(path: str) -> str:
    """The exporter's node prefix of a module: "encoder.layer.0.output" -> "/encoder/layer.0/output"."""
    parts: list[str] = []
    for part in path.split("."):
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return "/" + "/".join(parts)
