"""Graphs that tests make: from a line of text, or at random; and what they compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import onnxruntime as ort
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def build(body: str, x: str = "N, 6", y: str = "N, ..", opset: int = 17, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """A model from x to y with seeded initialisers of these shapes; `y` is a shape of as many sizes as given."""
    sizes = ", ".join(f"d{i}" for i, _ in enumerate(y.split(",")))
    text = f"""<ir_version: 8, opset_import: ["": {opset}, "other": 1]>
    g (float[{x}] x) => (float[{sizes}] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = node.output[0]
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = 0.5 + rng.random(shape, dtype=np.float32) if name.startswith("v") else rng.standard_normal(shape)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array, dtype=np.float32), name))
    return model


def with_integers(model: onnx.ModelProto, **values: list[int]) -> onnx.ModelProto:
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.int64), name))
    return model


def run(model: onnx_ir.Model, feeds: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    proto = onnx_ir.to_proto(model).SerializeToString()
    return list(ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, feeds))


def feeds_of(model: onnx_ir.Model, seed: int, sizes: dict[str, int]) -> dict[str, Array]:
    """Normal floats; small numbers and ones where integers are read."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        shape = [size if isinstance(size, int) else sizes.get(str(size.value), 2) for size in value.shape or ()]
        dtype = np.dtype(value.dtype.numpy() if value.dtype else np.float32)
        array = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        feeds[value.name or ""] = (np.ones(shape) if "mask" in (value.name or "") else array).astype(dtype)
    return feeds


def exactly(model: onnx_ir.Model, feeds: dict[str, Array]) -> list[Array]:
    """In float64, which ONNX Runtime has no convolution for."""
    with np.errstate(all="ignore"):  # its sigmoid computes both branches
        return list(ReferenceEvaluator(onnx_ir.to_proto(model)).run(None, feeds))


class Net:
    """A random graph of [2, C, 4, 4] tensors of float64, grown by one operation at a time."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.values: list[tuple[str, int]] = [("x", 3)]

    def constant(self, *shape: int, positive: bool = False) -> str:
        array = self.rng.standard_normal(shape)
        return self.store(np.abs(array) + 0.5 if positive else array)

    def store(self, array: Array) -> str:
        self.tensors.append(numpy_helper.from_array(array, f"t{len(self.tensors)}"))
        return self.tensors[-1].name

    def ints(self, *numbers: int) -> str:
        return self.store(np.array(numbers, dtype=np.int64))

    def node(self, op_type: str, *inputs: str, count: int = 1, **attributes: Any) -> str:
        outputs = [f"n{len(self.nodes)}_{i}" for i in range(count)]
        self.nodes.append(onnx.helper.make_node(op_type, inputs, outputs, name=outputs[0], **attributes))
        return outputs[0]

    def conv(self, x: str, c: int, out: int, k: int = 1, group: int = 1) -> str:
        weight = self.constant(out, c // group, k, k)
        return self.node("Conv", x, weight, self.constant(out), group=group, pads=[k // 2] * 4)

    def grow(self, operation: str, pick: int) -> None:
        x, c = self.values[-1 - pick % min(2, len(self.values))]
        y = getattr(self, f"do_{operation}")(x, c, pick)
        self.values.append(y if isinstance(y, tuple) else (y, c))

    def do_conv1(self, x: str, c: int, pick: int) -> tuple[str, int]:
        out = (4, 6, 8)[pick % 3]
        return self.conv(x, c, out), out

    def do_conv3(self, x: str, c: int, pick: int) -> tuple[str, int]:
        out = (4, 6, 8)[pick % 3]
        return self.conv(x, c, out, 3), out

    def do_depthwise(self, x: str, c: int, pick: int) -> tuple[str, int]:
        return self.conv(x, c, c * (1 + pick % 2), 3, group=c), c * (1 + pick % 2)

    def do_grouped(self, x: str, c: int, pick: int) -> tuple[str, int]:
        group = next(g for g in (3, 2, 1) if c % g == 0)
        return self.conv(x, c, group * (1 + pick % 3), 3, group=group), group * (1 + pick % 3)

    def do_recurrent(self, x: str, c: int, pick: int) -> tuple[str, int]:
        # Rows as steps, columns as samples: [4, 8, C] in, [4, D, 8, H] out.
        kind, gates = (("LSTM", 4), ("GRU", 3), ("RNN", 1))[pick % 3]
        units, ways = 3, 1 + pick % 2
        steps = self.node("Reshape", self.node("Transpose", x, perm=[2, 0, 3, 1]), self.ints(4, 8, c))
        w, r = self.constant(ways, gates * units, c), self.constant(ways, gates * units, units)
        direction = "bidirectional" if ways == 2 else "forward"
        bias = self.constant(ways, 2 * gates * units)
        y = self.node(kind, steps, w, r, bias, hidden_size=units, direction=direction)
        turned = self.node("Reshape", self.node("Transpose", y, perm=[0, 2, 1, 3]), self.ints(4, 2, 4, ways * units))
        return self.node("Transpose", turned, perm=[1, 3, 0, 2]), ways * units

    def do_relu(self, x: str, c: int, pick: int) -> str:
        return self.node(("Relu", "Tanh", "Identity", "Sigmoid")[pick % 4], x)

    def do_add(self, x: str, c: int, pick: int) -> str:
        same = [value for value, channels in self.values if channels == c]
        return self.node(("Add", "Sub", "Max")[pick % 3], x, same[pick % len(same)])

    def do_concat(self, x: str, c: int, pick: int) -> tuple[str, int]:
        other, more = self.values[pick % len(self.values)]
        return self.node("Concat", x, other, axis=1), c + more

    def do_rows(self, x: str, c: int, pick: int) -> str:
        same = [value for value, channels in self.values if channels == c]
        tall = self.node("Concat", x, same[pick % len(same)], axis=2)
        return self.node("Slice", tall, self.ints(pick % 5), self.ints(pick % 5 + 4), self.ints(2))

    def do_bias(self, x: str, c: int, pick: int) -> str:
        return self.node("Mul", self.constant(*((c, 1, 1), (1, c, 1, 1), (1,), (1, 1, 4))[pick % 4]), x)

    def do_prelu(self, x: str, c: int, pick: int) -> str:
        return self.node("PRelu", x, self.constant(c, 1, 1))

    def do_norm(self, x: str, c: int, pick: int) -> str:
        scale, bias, mean = (self.constant(c) for _ in range(3))
        return self.node("BatchNormalization", x, scale, bias, mean, self.constant(c, positive=True))

    def do_instance(self, x: str, c: int, pick: int) -> str:
        return self.node("InstanceNormalization", x, self.constant(c), self.constant(c), epsilon=0.1)

    def do_softmax(self, x: str, c: int, pick: int) -> str:
        return self.node("Softmax", x, axis=pick % 4)

    def do_half(self, x: str, c: int, pick: int) -> tuple[str, int]:
        low, high = pick % c, c - (pick // 3) % (c - pick % c)
        sliced = self.node("Slice", x, self.ints(low), self.ints(high), self.ints(1))
        return sliced, high - low

    def do_gated(self, x: str, c: int, pick: int) -> tuple[str, int] | str:
        if c % 2:
            return self.node("Neg", x)
        first = self.node("Split", x, count=2, axis=1)
        return self.node("Mul", first, first[:-1] + "1"), c // 2

    def do_squeeze(self, x: str, c: int, pick: int) -> str:
        pooled = self.node("Flatten", self.node("GlobalAveragePool", x))
        hidden = self.node("Relu", self.node("Gemm", pooled, self.constant(5, c), self.constant(5), transB=1))
        gate = self.node("Sigmoid", self.node("MatMul", hidden, self.constant(5, c)))
        return self.node("Mul", x, self.node("Unsqueeze", gate, self.ints(2, 3)))

    def do_last(self, x: str, c: int, pick: int) -> tuple[str, int]:
        turned = self.node("Transpose", x, perm=[0, 2, 3, 1])
        normal = self.node("LayerNormalization", turned, self.constant(c), self.constant(c), axis=-1, epsilon=0.1)
        product = self.node("MatMul", normal, self.constant(c, 6))
        return self.node("Transpose", self.node("Add", self.constant(6), product), perm=[0, 3, 1, 2]), 6

    def do_flat(self, x: str, c: int, pick: int) -> str:
        inner = self.node("Reshape", x, self.ints(*((0, c, 16), (2, -1, 16), (0, -1), (2, c * 4, 4))[pick % 4]))
        return self.node("Reshape", self.node("Abs", inner), self.ints(0, c, 4, 4))

    def do_pad(self, x: str, c: int, pick: int) -> tuple[str, int]:
        before, after = pick % 3, pick % 2
        return self.node("Pad", x, self.ints(0, before, 0, 0, 0, after, 0, 0)), c + before + after

    def do_mean(self, x: str, c: int, pick: int) -> str:
        return self.node("Sub", x, self.node("ReduceMean", x, axes=[1 + pick % 3]))

    def do_pool(self, x: str, c: int, pick: int) -> str:
        kind = ("MaxPool", "AveragePool")[pick % 2]
        return self.node(kind, x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def do_scale(self, x: str, c: int, pick: int) -> str:
        # One constant for several readers.
        shared = [t.name for t in self.tensors if list(t.dims) == [c, 1, 1]]
        return self.node("Add", x, shared[0] if shared else self.constant(c, 1, 1))

    def do_shuffle(self, x: str, c: int, pick: int) -> str:
        if c % 2:
            return self.node("Neg", x)
        split = self.node("Reshape", x, self.ints(0, 2, c // 2, 4, 4))
        turned = self.node("Transpose", split, perm=[0, 2, 1, 3, 4])
        return self.node("Reshape", turned, self.ints(0, c, 4, 4))

    def do_expand(self, x: str, c: int, pick: int) -> tuple[str, int]:
        one = self.node("ReduceSum", x, self.ints(1))
        return self.node("Expand", one, self.ints(1, 6, 1, 1)), 6

    @classmethod
    def operations(cls) -> list[str]:
        return [name.removeprefix("do_") for name in vars(cls) if name.startswith("do_")]

    def model(self) -> onnx.ModelProto:
        x, c = self.values[-1]
        self.node("Gemm", self.node("Flatten", self.conv(x, c, 4)), self.constant(64, 3))
        last = self.nodes[-1].output[0]
        make = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            self.nodes,
            "g",
            [make("x", onnx.TensorProto.DOUBLE, [2, 3, 4, 4])],
            [make(last, onnx.TensorProto.DOUBLE, [2, 3])],
            self.tensors,
        )
        return onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
