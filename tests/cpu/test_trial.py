"""Models whose weights are exchanged between two runs: always the outputs of a model that has them for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir
import pytest

from sparsec.compiler.calibration import Trial, Weights
from sparsec.compiler.exporter import SparseOp, bias_place, export, open_model
from sparsec.compiler.frontend import read
from sparsec.compiler.machine import Cpu
from sparsec.ir import parse_pattern

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from sparsec.ir import Layer, Program

RNG = np.random.default_rng(0)


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """A model in text with its initialisers.

    Attributes:
        head: of the graph: inputs and outputs.
        body: its nodes.
        tensors: initialisers by name.
        places: of its layers, which have a place for a bias.
        ir: version.
        unit: how exact its outputs are, as a share of the largest.
    """

    head: str
    body: str
    tensors: dict[str, NDArray[Any]]
    places: tuple[bool, ...]
    ir: int = 8
    unit: float = 1e-5

    @property
    def model(self) -> onnx.ModelProto:
        text = (
            f'<ir_version: {self.ir}, opset_import: ["": 17]> g ({self.head.replace("->", ") => (")}) {{ {self.body} }}'
        )
        model = onnx.parser.parse_model(text)
        for name, array in self.tensors.items():
            tensor = onnx.numpy_helper.from_array(array, name)
            model.graph.initializer.append(tensor)
            if self.ir < 4:
                value = onnx.helper.make_tensor_value_info(name, tensor.data_type, array.shape)
                model.graph.input.append(value)
        return model


@dataclass(frozen=True)
class Opened:
    """A case, read."""

    model: onnx.ModelProto
    program: Program
    feeds: dict[str, NDArray[Any]]
    folder: Path
    unit: float

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.program.layers

    @classmethod
    def of(cls, case: Case, folder: Path) -> Opened:
        model = case.model
        program = read(model)
        session = Cpu(1).open(model.SerializeToString())
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        feeds = {value.name: normal(*value.shape).astype(kinds[value.type]) for value in session.get_inputs()}
        return cls(model, program, feeds, folder, case.unit)

    def trial(self, watched: bool = False) -> Trial:
        return Trial(self.program, self.layers, Cpu(1), self.folder, watched)

    def run(self, model: onnx.ModelProto | onnx_ir.Model, more: str = "") -> dict[str, Any]:
        """Outputs by name, with one tensor `more`."""
        proto = model if isinstance(model, onnx.ModelProto) else onnx_ir.to_proto(model)
        if more and more not in [value.name for value in proto.graph.output]:
            proto = onnx.ModelProto.FromString(proto.SerializeToString())
            proto.graph.output.append(onnx.ValueInfoProto(name=more))
        session = Cpu(1).open(proto.SerializeToString())
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, self.feeds), strict=True))

    def new_weights(self) -> dict[str, Weights]:
        """Other weights, half of them zero, and biases where they can be; as the layer's dtype has them."""
        found = {}
        for layer in self.layers:
            matrix = normal(*layer.weight.shape) * (RNG.random(layer.weight.shape) < 0.5)
            bias = normal(layer.out_features) if bias_place(layer) is not None else None
            found[layer.name] = Weights(matrix.astype(np.float32), bias)
        return found

    def assert_same(self, found: dict[str, Any], expected: dict[str, Any]) -> None:
        assert list(found) == list(expected)
        for name, y in expected.items():
            assert (found[name].shape, found[name].dtype) == (y.shape, y.dtype)
            difference = np.abs(found[name].astype(float) - y).max()
            assert difference <= self.unit * np.abs(y.astype(float)).max(), name


X = "float[6,8] x -> float[6,a] y"
TOKENS = "float[2,6,8] x -> float[2,6,a] y"
IMAGE = "float[2,4,6,6] x -> float[2,a,b,c] y"
W, B = normal(8, 5), normal(5)

CASES = {
    "gemm": Case(X, "y = Gemm(x, W, b)", {"W": W, "b": B}, (True,)),
    "gemm with transB and alpha": Case(
        X, "y = Gemm<transB = 1, alpha = 0.5>(x, W, b)", {"W": normal(5, 8), "b": B}, (True,)
    ),
    "gemm with transA": Case(
        "float[8,6] x -> float[6,a] y", "y = Gemm<transA = 1>(x, W, b)", {"W": W, "b": B}, (True,)
    ),
    "gemm with beta": Case(X, "y = Gemm<beta = 0.5>(x, W, b)", {"W": W, "b": B}, (False,)),
    "gemm with beta 0": Case(X, "m = Gemm<beta = 0.0>(x, W, b) y = Add(m, c)", {"W": W, "b": B, "c": B}, (False,)),
    "gemm without bias": Case(X, "y = Gemm(x, W)", {"W": W}, (False,)),
    "gemm without bias, then one": Case(X, "m = Gemm(x, W) y = Add(b, m)", {"W": W, "b": B}, (True,)),
    "gemm with one number as bias": Case(X, "y = Gemm(x, W, b)", {"W": W, "b": normal(1)}, (True,)),
    "gemm with a row as bias": Case(X, "y = Gemm(x, W, b)", {"W": W, "b": normal(1, 5)}, (True,)),
    "gemm with a residual": Case("float[6,8] x, float[6,5] r -> float[6,5] y", "y = Gemm(x, W, r)", {"W": W}, (False,)),
    "gemm, the weight left": Case(
        "float[8,6] x -> float[5,6] y",
        "y = Gemm<alpha = 2.0>(W, x, b)",
        {"W": normal(5, 8), "b": normal(5, 1)},
        (True,),
    ),
    "matmul and add": Case(TOKENS, "m = MatMul(x, W) y = Add(m, b)", {"W": W, "b": B}, (True,)),
    "add and matmul": Case(TOKENS, "m = MatMul(x, W) y = Add(b, m)", {"W": W, "b": B}, (True,)),
    "matmul and a number": Case(TOKENS, "m = MatMul(x, W) y = Add(m, b)", {"W": W, "b": np.float32(2)}, (True,)),
    "matmul, bias, activation, residual": Case(
        "float[2,6,8] x, float[2,6,5] r -> float[2,6,5] y",
        "m = MatMul(x, W) a = Add(m, b) h = Relu(a) y = Add(h, r)",
        {"W": W, "b": B},
        (True,),
    ),
    "matmul without bias": Case(TOKENS, "m = MatMul(x, W) y = Relu(m)", {"W": W}, (False,)),
    "matmul of a vector": Case("float[8] x -> float[5] y", "m = MatMul(x, W) y = Add(m, b)", {"W": W, "b": B}, (True,)),
    "matmul, the weight left": Case("float[8,6] x -> float[5,6] y", "y = MatMul(W, x)", {"W": normal(5, 8)}, (False,)),
    "matmul of tokens, the weight left, and add": Case(
        "float[2,8,6] x -> float[2,5,6] y",
        "m = MatMul(W, x) y = Add(m, b)",
        {"W": normal(5, 8), "b": normal(5, 1)},
        (True,),
    ),
    "convolution": Case(
        IMAGE,
        "y = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, W, b)",
        {"W": normal(5, 4, 3, 3), "b": B},
        (True,),
    ),
    "convolution without bias": Case(
        IMAGE, "y = Conv<kernel_shape = [3, 3], strides = [2, 2]>(x, W)", {"W": normal(5, 4, 3, 3)}, (True,)
    ),
    "convolution in groups": Case(
        IMAGE, "y = Conv<kernel_shape = [1, 1], group = 2>(x, W)", {"W": normal(6, 2, 1, 1)}, (True,)
    ),
    "convolution with a computed bias": Case(
        "float[2,4,6,6] x, float[5] r -> float[2,a,b,c] y",
        "b = Neg(r) y = Conv<kernel_shape = [3, 3]>(x, W, b)",
        {"W": normal(5, 4, 3, 3)},
        (False,),
    ),
    "transposed convolution": Case(
        IMAGE, "y = ConvTranspose<kernel_shape = [2, 2], group = 2>(x, W)", {"W": normal(4, 3, 2, 2)}, (True,)
    ),
    "a stack": Case("float[2,6,8] x -> float[2,6,5] y", "y = MatMul(x, W)", {"W": normal(2, 8, 5)}, (False,)),
    "a weight and a bias for two": Case(
        TOKENS,
        "m = MatMul(x, W) a = Add(m, b) h = Tanh(a) n = MatMul(h, W) y = Add(n, b)",
        {"W": normal(8, 8), "b": normal(8)},
        (True, True),
    ),
    "a weight that is also returned": Case(
        "float[6,8] x -> float[6,5] y, float[8,5] W", "y = Gemm(x, W, b)", {"W": W, "b": B}, (True,)
    ),
    "a weight that is computed": Case(
        X, "t = Transpose<perm = [1, 0]>(W) y = Gemm(x, t, b)", {"W": normal(5, 8), "b": B}, (True,)
    ),
    "a quantized weight": Case(
        X,
        "d = DequantizeLinear(W, s) y = MatMul(x, d)",
        {"W": RNG.integers(-9, 9, (8, 5), dtype=np.int8), "s": np.float32(0.25)},
        (False,),
        unit=1e-2,  # ONNX Runtime rounds the other side to 8 bits too
    ),
    "what flows in is an output": Case(
        "float[6,8] x -> float[6,5] y, float[6,8] h",
        "h = Relu(x) m = MatMul(h, W) y = Add(m, b)",
        {"W": W, "b": B},
        (True,),
    ),
    "one layer's output is another's input and the model's": Case(
        "float[6,8] x -> float[6,5] y, float[6,8] h, float[6,5] z",
        "h = Gemm(x, V, c) y = MatMul(h, W) z = Gemm(h, W, b)",
        {"V": normal(8, 8), "c": normal(8), "W": W, "b": B},
        (True, False, True),
    ),
    "half precision": Case(
        "float16[6,8] x -> float16[6,5] y",
        "y = Gemm<alpha = 0.5>(x, W, b)",
        {"W": W.astype(np.float16), "b": B.astype(np.float16)},
        (True,),
        unit=1e-2,
    ),
    "an old file": Case(X, "m = Gemm(x, W, b) y = MatMul(m, V)", {"W": W, "b": B, "V": normal(5, 5)}, (True, False), 3),
}


@pytest.fixture(params=CASES)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    return Opened.of(CASES[request.param], tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_where_a_bias_has_a_place(name: str) -> None:
    layers = read(CASES[name].model).layers
    assert tuple(bias_place(layer) is not None for layer in layers) == CASES[name].places


def test_with_its_own_weights_a_trial_is_the_model(opened: Opened) -> None:
    trial = opened.trial()
    expected = opened.run(opened.model)
    assert trial.outputs == list(expected)
    opened.assert_same(trial.run(opened.feeds, trial.feeds({})), expected)
    own = {layer.name: Weights(layer.weight) for layer in opened.layers}
    opened.assert_same(trial.run(opened.feeds, trial.feeds(own)), expected)


def test_with_other_weights_a_trial_is_the_model_that_would_be_written(opened: Opened) -> None:
    before = onnx_ir.to_proto(opened.program.model).SerializeToString()
    trial, new = opened.trial(), opened.new_weights()
    biases = {name: one.bias for name, one in new.items() if one.bias is not None}
    written = export(opened.program, {}, {name: one.matrix for name, one in new.items()}, biases)
    expected = opened.run(written)
    opened.assert_same(trial.run(opened.feeds, trial.feeds(new)), expected)
    assert any(not np.array_equal(expected[name], y) for name, y in opened.run(opened.model).items())
    # Only the weights: each layer keeps its own bias.
    bare = {name: Weights(one.matrix) for name, one in new.items()}
    written = export(opened.program, {}, {name: one.matrix for name, one in new.items()})
    opened.assert_same(trial.run(opened.feeds, trial.feeds(bare)), opened.run(written))
    # Afterwards it is the dense model again, and what was read is as it was.
    opened.assert_same(trial.run(opened.feeds, trial.feeds({})), opened.run(opened.model))
    assert onnx_ir.to_proto(opened.program.model).SerializeToString() == before


def test_what_is_written_has_the_weights(opened: Opened) -> None:
    """Read again, it has the same layers with what they were given."""
    new = opened.new_weights()
    biases = {name: one.bias for name, one in new.items() if one.bias is not None}
    written = export(opened.program, {}, {name: one.matrix for name, one in new.items()}, biases)
    if all(output.type is not None for output in opened.program.model.graph.outputs):
        onnx.checker.check_model(onnx_ir.to_proto(written), full_check=True)
    again = read(onnx_ir.to_proto(written)).layers
    assert [layer.name for layer in again] == [layer.name for layer in opened.layers]
    for layer in again:
        matrix, bias = new[layer.name].matrix, new[layer.name].bias
        unit = 1e-3 if layer.dtype == "float16" else 1e-6
        assert np.abs(layer.weight - matrix).max() <= unit * np.abs(matrix).max()
        assert ((layer.weight == 0) == (matrix == 0)).all()
        if bias is not None:
            assert layer.bias is not None
            assert np.abs(layer.bias - bias).max() <= unit * np.abs(bias).max()


def test_what_flows_in(opened: Opened) -> None:
    trial = opened.trial(watched=True)
    expected = opened.run(opened.model)
    # The outputs of the model are still its own.
    assert trial.outputs == list(expected)
    opened.assert_same(trial.run(opened.feeds, trial.feeds({})), expected)
    found = trial.watch(opened.feeds, trial.feeds({}), [layer.name for layer in opened.layers])
    assert list(found) == [layer.name for layer in opened.layers]
    for layer in opened.layers:
        name = layer.x.name or ""
        x = opened.feeds[name] if name in opened.feeds else opened.run(opened.model, name)[name]
        opened.assert_same({name: found[layer.name]}, {name: x})


def test_a_second_layer_sees_what_the_first_became(tmp_path: Path) -> None:
    opened = Opened.of(CASES["one layer's output is another's input and the model's"], tmp_path)
    trial, new = opened.trial(watched=True), opened.new_weights()
    first, second, third = (layer.name for layer in opened.layers)
    found = trial.watch(opened.feeds, trial.feeds({first: new[first]}), [second, third])
    assert found[second] is found[third], "layers with the same input share the array"
    expected = opened.feeds["x"] @ new[first].matrix.T + new[first].bias
    opened.assert_same({"h": found[second]}, {"h": expected})


def test_some_layers_are_opened_and_the_others_stay(tmp_path: Path) -> None:
    opened = Opened.of(CASES["one layer's output is another's input and the model's"], tmp_path)
    first, _, third = opened.layers
    model = open_model(opened.program, [first, third], watched=True)
    assert set(model.weights) == set(model.biases) == set(model.x) == {first.name, third.name}
    trial = Trial(opened.program, [third], Cpu(1), tmp_path, watched=False)
    new = {third.name: opened.new_weights()[third.name]}
    written = export(opened.program, {}, {n: w.matrix for n, w in new.items()}, {n: w.bias for n, w in new.items()})
    opened.assert_same(trial.run(opened.feeds, trial.feeds(new)), opened.run(written))


def test_names_that_are_taken() -> None:
    """A model may have a tensor that is called as the new bias would be."""
    body = '["c"] d = Conv<kernel_shape = [3, 3]>(x, W) y = Add(d, s)'
    case = Case("float[2,4,6,6] x -> float[2,5,4,4] y", body, {"W": normal(5, 4, 3, 3), "s": normal(1)}, (True,))
    model = case.model
    model.graph.initializer[1].name = model.graph.node[1].input[1] = "c.bias"
    program = read(model)
    written = onnx_ir.to_proto(export(program, {}, {"c": program.layers[0].weight}, {"c": B}))
    onnx.checker.check_model(written, full_check=True)
    bias = read(written).layers[0].bias
    assert bias is not None and np.array_equal(bias, B)


# ---- Biases of what is written ----


def tensors(model: onnx_ir.Model) -> dict[str, NDArray[Any]]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}


def test_a_sparse_operator_takes_the_new_bias() -> None:
    """The same bias stays for the layer that is not named; the dense one beside it gets its own."""
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[6,32] x) => (float[6,32] u, float[6,32] v, float[6,32] w) {
        ["a"] u = Gemm(x, A, b)  ["b"] v = Gemm(x, B, b)  ["c"] w = Gemm(x, C, b)
    }"""
    model = onnx.parser.parse_model(text)
    arrays = {name: normal(32, 32) for name in "ABC"} | {"b": normal(32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    program = read(model)
    matrix = parse_pattern("group:16").pack(program.layers[0].weight, "float32")
    sparse, dense = normal(32), normal(32)
    written = export(
        program, {"a": SparseOp(matrix, "kernel", 1)}, {"b": program.layers[1].weight}, {"a": sparse, "b": dense}
    )
    operator, second, third = written.graph
    assert operator.op_type == "SparseLinear"
    found = [node.inputs[index] for node, index in ((operator, 4), (second, 2), (third, 2))]
    for value, expected in zip(found, (sparse, dense, arrays["b"]), strict=True):
        assert value is not None and np.array_equal(value.const_value.numpy(), expected)
    assert sorted(set(tensors(written)) & {"A", "B", "C", "b"}) == ["B", "C", "b"]
    # When the last of them has a new one, the old one goes.
    everyone = {layer.name: layer.weight for layer in program.layers}
    written = export(program, {}, everyone, dict.fromkeys(everyone, sparse))
    assert "b" not in tensors(written)


def test_a_bias_needs_new_weights() -> None:
    """A layer that is named among the biases only stays as it came."""
    program = read(CASES["gemm"].model)
    written = export(program, {}, {}, {program.layers[0].name: normal(5)})
    assert np.array_equal(tensors(written)["b"], B)
