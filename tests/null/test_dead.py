"""Dead channels: all that are read by zeros or are zero are found, and without them the model computes the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.printer
import onnx_ir
import pytest
from graphs import Net, build, exactly, feeds_of, run, with_integers
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from test_permute import FREE, SMALL
from test_remove import ASSETS, masked, needs_assets, random_kept

from sparsec.compiler.frontend import read
from sparsec.models.lstm_lm import lstm_lm
from sparsec.passes.channels import find_channels
from sparsec.passes.remove import live_channels, removable, remove

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsec.ir import Program
    from sparsec.passes.channels import Dimension

    Array = NDArray[Any]
    # Of an initialiser, what is set at an index.
    Edit = tuple[str, Any, float]


def edited(model: onnx.ModelProto, edits: tuple[Edit, ...]) -> onnx.ModelProto:
    """The model with other numbers in its initialisers."""
    for name, index, number in edits:
        (tensor,) = (one for one in model.graph.initializer if one.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array[index] = number
        tensor.CopyFrom(numpy_helper.from_array(array, name))
    return model


def live(program: Program) -> dict[Dimension, Array]:
    channels = find_channels(program)
    return live_channels(program, channels, removable(channels).dimensions)


def assert_same(program: Program, compute: Any = run, seed: int = 0, **sizes: int) -> int:
    """Without its dead channels the model computes the same; how many there are."""
    channels = find_channels(program)
    found = live_channels(program, channels, removable(channels).dimensions)
    model = remove(program, channels, {dimension: np.flatnonzero(mask) for dimension, mask in found.items()})
    feeds = feeds_of(program.model, seed, sizes)
    close = 1e-9 if compute is exactly else 1e-5
    for one, other in zip(compute(program.model, feeds), compute(model, feeds), strict=True):
        assert one.dtype == other.dtype
        # Where all cancels what is left is the rounding of numbers near one.
        scale = float(np.abs(one).max(initial=1e-3))
        np.testing.assert_allclose(other, one, rtol=close, atol=close * scale)
    return sum(int((~mask).sum()) for mask in found.values())


ALL = slice(None)
MLP = {"A": (6, 4), "b": (4,), "B": (4, 3)}
HIDDEN = "h = MatMul(x, A) c = Add(h, b) {} y = MatMul(r, B)"
CONV: dict[str, Any] = {"x": "N, 3, 5, 5", "A": (4, 3, 3, 3), "d": (4,), "B": (2, 4, 1, 1)}
NORMS = {"scale": (4,), "shift": (4,), "mean": (4,), "var": (4,)}
SCALED = "h = Conv(x, A) n = BatchNormalization(h, scale, shift, mean, var) r = Relu(n) y = Conv(r, B)"
DEEP = "h = MatMul(x, A) r = Relu(h) i = MatMul(r, C) s = Tanh(i) y = MatMul(s, B)"
OFF, LOW, HIGH = ("scale", 1, 0.0), ("shift", 1, -2.0), ("shift", 1, 2.0)
EVEN = (("var", ALL, 1.0), ("mean", ALL, 0.0))
ROW, BIAS, COLUMN = ("A", (ALL, 1), 0.0), ("b", 1, 0.0), ("B", 1, 0.0)
UNIT = "h, s, c = LSTM<hidden_size=3>(x, W, R, b) t = Squeeze(h, one) y = MatMul(t, B)"
UNITS: dict[str, Any] = {"x": "4, 2, 6", "y": "S, N, C", "W": (1, 12, 6), "R": (1, 12, 3), "b": (1, 24), "B": (3, 2)}
GATES, BIASES = (0, slice(1, 12, 3)), (0, slice(1, 24, 3))

# To each model, with these numbers in it, the channels of each dimension that are live.
CASES: dict[str, tuple[str, dict[str, Any], tuple[Edit, ...], list[list[int]]]] = {
    "read by zeros": (HIDDEN.format("r = Sigmoid(c)"), MLP, (COLUMN,), [[0, 2, 3]]),
    "zero": (HIDDEN.format("r = Tanh(c)"), MLP, (ROW, BIAS), [[0, 2, 3]]),
    "zero but for the bias": (HIDDEN.format("r = Tanh(c)"), MLP, (ROW, ("b", 1, 1.0)), [[0, 1, 2, 3]]),
    "zero behind a Relu": (HIDDEN.format("r = Relu(c)"), MLP, (ROW, ("b", 1, -1.0)), [[0, 2, 3]]),
    "zero behind a Clip": (HIDDEN.format("r = Clip(c, zero, six)"), MLP, (ROW, ("b", 1, -1.0)), [[0, 2, 3]]),
    "a Clip above zero": (HIDDEN.format("r = Clip(c, six)"), MLP, (ROW, BIAS), [[0, 1, 2, 3]]),
    "not behind a Sigmoid": (HIDDEN.format("r = Sigmoid(c)"), MLP, (ROW, BIAS), [[0, 1, 2, 3]]),
    "a gated zero": (HIDDEN.format("s = Sigmoid(c) r = Mul(c, s)"), MLP, (ROW, BIAS), [[0, 2, 3]]),
    "zero behind a Max": (HIDDEN.format("r = Max(c, zero)"), MLP, (ROW, ("b", 1, -1.0)), [[0, 2, 3]]),
    "a Max above zero": (HIDDEN.format("r = Max(c, six)"), MLP, (ROW, BIAS), [[0, 1, 2, 3]]),
    "moved from zero": (HIDDEN.format("r = Add(c, six)"), MLP, (ROW, BIAS), [[0, 1, 2, 3]]),
    "a weight that is an outer sum": (
        "h = MatMul(x, A) W = Add(u, v) i = MatMul(h, W) r = Add(h, i) y = MatMul(r, B)",
        {**MLP, "u": (4, 1), "v": (1, 4)}, (ROW, ("u", 1, 0.0), ("v", (0, 1), 0.0)), [[0, 1, 2, 3]],
    ),
    "all dead": (HIDDEN.format("r = Relu(c)"), MLP, (("B", ALL, 0.0),), [[0]]),
    "one of two readers": (
        "h = MatMul(x, A) s = MatMul(h, B) t = MatMul(h, C) y = Add(s, t)",
        {**MLP, "C": (4, 3)}, (COLUMN, ("C", 2, 0.0)), [[0, 1, 2, 3]],
    ),
    "both readers": (
        "h = MatMul(x, A) s = MatMul(h, B) t = MatMul(h, C) y = Add(s, t)",
        {**MLP, "C": (4, 3)}, (COLUMN, ("C", slice(1, 3), 0.0)), [[0, 2, 3]],
    ),
    "one reader, zero for the other": (
        "h = MatMul(x, A) r = Relu(h) s = MatMul(r, B) d = Add(r, b) t = MatMul(d, C) y = Add(s, t)",
        {**MLP, "C": (4, 3)}, (ROW, ("C", 1, 0.0)), [[0, 2, 3]],
    ),
    "a residual of which one side is zero": (
        "a = Conv(x, A) r = Relu(a) b = Conv(r, C) s = Add(a, b) y = Conv(s, B)",
        {**CONV, "y": "N,C,H,W", "C": (4, 4, 1, 1)}, (("C", 1, 0.0),), [[0, 1, 2, 3]],
    ),
    "a residual of which both are": (
        "a = Conv(x, A) r = Relu(a) b = Conv(r, C) s = Add(a, b) y = Conv(s, B)",
        {**CONV, "y": "N,C,H,W", "C": (4, 4, 1, 1)}, (("A", 1, 0.0), ("C", 1, 0.0)), [[0, 2, 3]],
    ),
    "a residual that one of two reads by zeros": (
        "a = Conv(x, A) r = Relu(a) b = Conv(r, C) s = Add(a, b) y = Conv(s, B)",
        {**CONV, "y": "N,C,H,W", "C": (4, 4, 1, 1)}, (("B", (ALL, 1), 0.0),), [[0, 1, 2, 3]],
    ),
    "a norm without scale": (SCALED, {**CONV, **NORMS, "y": "N,C,H,W"}, (*EVEN, OFF, LOW), [[0, 2, 3]]),
    "a norm that shifts": (SCALED, {**CONV, **NORMS, "y": "N,C,H,W"}, (*EVEN, OFF, HIGH), [[0, 1, 2, 3]]),
    "a norm of zero": (
        SCALED, {**CONV, **NORMS, "y": "N,C,H,W"}, (*EVEN, ("A", 2, 0.0), ("shift", 2, 0.0)), [[0, 1, 3]],
    ),
    "pooled": (
        """a = Conv(x, A, d) p = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(a) q = AveragePool<kernel_shape=[2,2]>(p)
        f = Flatten(q) y = MatMul(f, B)""",
        {**CONV, "B": (16, 2)}, (("A", 3, 0.0), ("d", 3, 0.0)), [[0, 1, 2]],
    ),
    "padded with zeros": (
        "a = Conv(x, A, d) p = Pad(a, edges) y = Conv(p, B)",
        {**CONV, "y": "N,C,H,W"}, (("A", 3, 0.0), ("d", 3, 0.0)), [[0, 1, 2]],
    ),
    "padded with others": (
        "a = Conv(x, A, d) p = Pad(a, edges, six) y = Conv(p, B)",
        {**CONV, "y": "N,C,H,W"}, (("A", 3, 0.0), ("d", 3, 0.0)), [[0, 1, 2, 3]],
    ),
    "depthwise": (
        "a = Conv(x, A, d) e = Conv<group=4>(a, D) r = Relu(e) y = Conv(r, B)",
        {**CONV, "y": "N,C,H,W", "D": (4, 1, 2, 2)}, (("A", 3, 0.0), ("d", 3, 0.0), ("D", 0, 0.0)), [[1, 2]],
    ),
    "concatenated": (
        "a = Conv(x, A, d) r = Relu(a) e = Conv(x, E) c = Concat<axis=1>(a, e, r) y = Conv(c, C)",
        {**CONV, "y": "N,C,H,W", "E": (2, 3, 3, 3), "C": (2, 10, 1, 1)},
        (("A", slice(2, 4), 0.0), ("d", 3, 0.0), ("C", (ALL, 4), 0.0)), [[0, 1, 2], [1]],
    ),
    "concatenated with what is not zero": (
        "a = Conv(x, A, d) s = Sigmoid(a) c = Concat<axis=1>(a, s) y = Conv(c, C)",
        {**CONV, "y": "N,C,H,W", "C": (2, 8, 1, 1)}, (("A", 3, 0.0), ("d", 3, 0.0)), [[0, 1, 2, 3]],
    ),
    "read by what is dead": (
        DEEP, {**MLP, "C": (4, 4)}, (("B", 2, 0.0), ("C", (1, [0, 1, 3]), 0.0)), [[0, 2, 3], [0, 1, 3]],
    ),
    "made of what is dead": (
        DEEP, {**MLP, "C": (4, 4)}, (("A", (ALL, 1), 0.0), ("C", ([0, 2, 3], 2), 0.0)), [[0, 2, 3], [0, 1, 3]],
    ),
    "a unit that only itself reads": (
        UNIT, UNITS, (("R", (0, [0, 2, 3, 5, 6, 8, 9, 11], 1), 0.0), ("B", 1, 0.0)), [[0, 2]],
    ),
    "units that only each other read": (
        UNIT, UNITS, (("R", (0, slice(0, 12, 3), slice(1, 3)), 0.0), ("B", slice(1, 3), 0.0)), [[0]],
    ),
    "a unit that another reads": (UNIT, UNITS, (("B", 1, 0.0),), [[0, 1, 2]]),
    "a unit of zeros": (UNIT, UNITS, (("W", GATES, 0.0), ("R", GATES, 0.0), ("b", BIASES, 0.0)), [[0, 2]]),
    "a unit with a bias": (UNIT, UNITS, (("W", GATES, 0.0), ("R", GATES, 0.0)), [[0, 1, 2]]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_live(name: str) -> None:
    body, shapes, edits, expected = CASES[name]
    model = with_integers(build(body, **{"x": "N, 6", "y": "N, C", **shapes}), one=[1], edges=[0, 0, 1, 1, 0, 0, 1, 1])
    for text, number in (("zero", 0), ("six", 6)):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(number), text))
    program = read(edited(model, edits))
    assert [np.flatnonzero(mask).tolist() for mask in live(program).values()] == expected
    assert_same(program)


def test_the_smaller_graph() -> None:
    model = build("h = Gemm<transB=1>(x, A, b) r = Relu(h) y = Gemm<transB=1>(r, B)", A=(4, 6), b=(4,), B=(3, 4))
    program = read(edited(model, (("A", 1, 0.0), ("b", 1, -1.0), ("B", (ALL, 3), 0.0))))
    kept = {dimension: np.flatnonzero(mask) for dimension, mask in live(program).items()}
    small = onnx_ir.to_proto(remove(program, find_channels(program), kept))
    assert [(tensor.name, *tensor.dims) for tensor in small.graph.initializer] == [("A", 2, 6), ("b", 2), ("B", 3, 2)]
    del small.graph.initializer[:], small.graph.value_info[:]
    assert onnx.printer.to_text(small.graph).splitlines() == [
        "g (float[N,6] x) => (float[d0,d1] y) {",
        "   [h] h = Gemm <transB: int = 1> (x, A, b)",
        "   [r] r = Relu (h)",
        "   [y] y = Gemm <transB: int = 1> (r, B)",
        "}",
    ]


@pytest.mark.parametrize("dtype", [onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE])
def test_other_floats(dtype: int) -> None:
    model = edited(build(HIDDEN.format("r = Relu(c)"), **MLP), (ROW, ("b", 1, -1.0), ("B", 3, 0.0)))
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).astype(onnx.helper.tensor_dtype_to_np_dtype(dtype))
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        assert tensor.data_type == dtype
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = dtype
    assert [np.flatnonzero(mask).tolist() for mask in live(read(model)).values()] == [[0, 2]]


@pytest.mark.parametrize(("ir_version", "expected"), [(3, [[0, 2, 3]]), (8, [[0, 1, 2, 3]])])
def test_initialisers_that_are_inputs(ir_version: int, expected: list[list[int]]) -> None:
    """From IR 4 on a caller may replace them; before all are inputs, and none may."""
    model = build(HIDDEN.format("e = Add(c, k) r = Relu(e)"), **MLP, k=())
    edited(model, (ROW, BIAS, ("k", (), 0.0)))
    model.ir_version = ir_version
    for tensor in model.graph.initializer if ir_version == 3 else model.graph.initializer[-1:]:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert [np.flatnonzero(mask).tolist() for mask in live(read(model)).values()] == expected


NUMBERS = (0, 0, 0, 0, 0, 0, 0, -1, -0.5)


def emptied(model: onnx.ModelProto, program: Program, seed: int) -> onnx.ModelProto:
    """Zeros, or now and then others, in some of the constants along some channels: weights, biases, norms."""
    rng = np.random.default_rng(seed)
    arrays = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    for dimension in removable(find_channels(program)).dimensions:
        for channel in np.flatnonzero(rng.random(dimension.size) < 0.5):
            likely = rng.choice((0.5, 0.9, 1.0))
            for place in dimension.constants:
                if rng.random() < likely:
                    start = place.start + channel * place.repeat
                    array, number = np.moveaxis(arrays[place.name], place.axis, 0), rng.choice(NUMBERS)
                    # A variance stays one.
                    array[start : start + place.repeat] = abs(number) if (array >= 0).all() else number
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
    return model


GRAPHS = (
    st.lists(st.tuples(st.sampled_from(Net.operations()), st.integers(0, 30)), min_size=2, max_size=14),
    st.integers(0, 2**16),
)


def grown(steps: list[tuple[str, int]], seed: int) -> onnx.ModelProto:
    net = Net(seed)
    net.grow("conv1", seed)
    for operation, pick in steps:
        net.grow(operation, pick)
    return net.model()


@settings(max_examples=60, deadline=None)
@given(*GRAPHS)
def test_random_graphs_compute_the_same_without_dead_channels(steps: list[tuple[str, int]], seed: int) -> None:
    model = grown(steps, seed)
    assert_same(read(emptied(model, read(model), seed)), exactly, seed)


@settings(max_examples=40, deadline=None)
@given(*GRAPHS)
def test_what_nothing_reads_is_found_in_random_graphs(steps: list[tuple[str, int]], seed: int) -> None:
    program = read(grown(steps, seed))
    channels = find_channels(program)
    kept = random_kept(removable(channels).dimensions, seed)
    found = live(read(onnx_ir.to_proto(masked(program, channels, kept))))
    for (dimension, stay), (other, mask) in zip(kept.items(), found.items(), strict=True):
        assert dimension.size == other.size
        assert set(np.flatnonzero(mask)) <= set(stay) or mask.sum() == 1


@pytest.mark.parametrize("name", FREE)
def test_small_graphs(name: str) -> None:
    model, dead = FREE[name][0], 0
    for seed in range(8):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        dead += assert_same(read(emptied(copy, read(model), seed)), seed=seed, H=3, W=5)
    assert bool(dead) == bool(removable(find_channels(read(model))).dimensions)


MODELS = {**{name: model for name, (model, _) in SMALL.items()}, "lstm_lm": lstm_lm(60, 32, 48)}
FILES = ("mnist_cnn_opset7", "resnet20_cifar10", "squeezenet_dc_sparse", "ultraface_version-RFB-320")


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=needs_assets) for name in FILES)])
def test_networks(name: str) -> None:
    model = onnx.load(ASSETS / f"{name}.onnx") if name in FILES else onnx.ModelProto()
    if name in MODELS:
        model.CopyFrom(MODELS[name])
    assert assert_same(read(emptied(model, read(model), 1)), sequence=7)
