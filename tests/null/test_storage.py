"""Dense weights as mask and codes: ONNX Runtime unpacks the same bits."""

from __future__ import annotations

import numpy as np
import onnx_ir
import onnxruntime
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsec.compiler.exporter import store_coded
from sparsec.compiler.exporter.storage import coded_size
from sparsec.ir.values import Codebook

CODEBOOK = Codebook(256)


def model(weight: np.ndarray, opset: int = 13) -> onnx_ir.Model:
    """Y = Identity(X) + W, twice."""
    w = onnx_ir.Value(name="w", const_value=onnx_ir.Tensor(weight, name="w"))
    x = onnx_ir.Value(name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape(weight.shape))
    nodes = [onnx_ir.node("Add", [x, w])]
    nodes.append(onnx_ir.node("Add", [nodes[0].outputs[0], w]))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", x.type, x.shape
    nodes[0].outputs[0].name = "h"
    graph = onnx_ir.Graph([x], [y], nodes=nodes, initializers=[w], opset_imports={"": opset}, name="g")
    return onnx_ir.Model(graph, ir_version=8)


def weight(shape: tuple[int, ...], zeros: float, values: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    table = rng.standard_normal(values).astype(np.float32)
    return np.where(rng.random(shape) < zeros, np.float32(0), table[rng.integers(0, values, shape)])


def run(made: onnx_ir.Model, shape: tuple[int, ...], level: int = 99) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(level)
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(made).SerializeToString(), options)
    return np.asarray(session.run(None, {"x": np.zeros(shape, np.float32)})[0])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple),
    st.sampled_from((0.0, 0.3, 0.7, 0.99)),
    st.sampled_from((1, 2, 15, 255)),
    st.integers(0, 2**16),
)
@example((3000,), 0.5, 255, 0)
@example((7, 11, 3, 3), 0.0, 200, 1)
def test_the_same_bits(shape: tuple[int, ...], zeros: float, values: int, seed: int) -> None:
    array = weight(shape, zeros, values, seed)
    made = model(array)
    sizes = store_coded(made, ["w"], CODEBOOK)
    assert sizes.keys() == ({"w"} if coded_size(array, CODEBOOK) is not None else set())
    for level in (0, 99):  # unpacked in every run, and once
        np.testing.assert_array_equal(run(made, shape, level), 2 * array)
    if sizes:
        assert "w" not in made.graph.initializers
        small = {"column", "shifts", "two", "row", "start", "end", "axis", "zero", "shape"}
        tensors = made.graph.initializers.values()
        stored = sum(t.const_value.nbytes for t in tensors if t.name.split(".")[1] not in small and t.const_value)
        assert stored == sizes["w"] + 1  # the code in front


def test_what_stays() -> None:
    many = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    few = weight((64, 64), 0.5, 20, 0)
    for array, opset, why in (
        (many, 13, "more values than entries"),
        (few, 10, "an opset without CumSum"),
        (few[:4, :4], 13, "no smaller"),
        (np.zeros((64, 64), np.float32), 13, "nothing kept"),
        (few.astype(np.float16), 13, "not float32"),
    ):
        made = model(array, opset)
        assert store_coded(made, ["w", "unknown"], CODEBOOK) == {}, why
        assert "w" in made.graph.initializers
    taken = model(few)
    taken.graph.initializers["w"].shape = onnx_ir.Shape(few.shape)
    taken.graph.initializers["w"].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    taken.graph.inputs.append(taken.graph.initializers["w"])
    assert store_coded(taken, ["w"], CODEBOOK) == {}, "a caller may replace it"


def test_sixteen_entries_and_names_that_are_taken() -> None:
    array = weight((50, 30), 0.6, 15, 3)
    made = model(array)
    other = onnx_ir.Value(name="w.codes", const_value=onnx_ir.Tensor(np.ones(3, np.float32), name="w.codes"))
    made.graph.register_initializer(other)
    assert store_coded(made, ["w"], Codebook(16))
    assert "w.codes_" in made.graph.initializers
    np.testing.assert_array_equal(run(made, array.shape), 2 * array)
