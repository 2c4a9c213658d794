"""Reordered channels: which are free, that the model stays the same, and that blocks keep more."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest
from graphs import Net, build, exactly, feeds_of, run, with_integers
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from sparsec.compiler.frontend import find_layers, read
from sparsec.ir import BlockPattern, SparsecError
from sparsec.models.mlp import mlp
from sparsec.models.tinyvgg16 import tinyvgg16
from sparsec.models.transformer import EncoderConfig, encoder
from sparsec.passes.channels import Dimension, Place, find_dimensions
from sparsec.passes.channels.axes import cut, extent, fixed, free, freeze, leaves, merge, repeated, tie
from sparsec.passes.permute import kept, layer_orders, permuted, reorder, search, search_all
from sparsec.passes.permute.exchange import exchange

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsec.ir import Program

    Array = NDArray[Any]

ASSETS = Path(__file__).resolve().parents[2].parent / "shared" / "assets" / "models"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the models of ../shared/assets are not on this machine")


def text(program: Program) -> list[str]:
    """Each dimension as "size: layer[row start] .. / layer[column start x repeat] ..", repeats of 1 left out."""

    def places(found: tuple[Place, ...]) -> str:
        return " ".join(f"{p.name}[{p.start}{f'x{p.repeat}' if p.repeat > 1 else ''}]" for p in found)

    return [f"{d.size}: {places(d.rows)} / {places(d.columns)}" for d in find_dimensions(program)]


def random_orders(program: Program, seed: int) -> dict[Dimension, Array]:
    rng = np.random.default_rng(seed)
    return {dimension: rng.permutation(dimension.size) for dimension in find_dimensions(program)}


def assert_same(
    program: Program, orders: dict[Dimension, Array], seed: int = 0, compute: Any = run, **sizes: int
) -> None:
    """The reordered model computes the same; its layers are the old ones permuted; the old model is untouched."""
    before = onnx_ir.to_proto(program.model).SerializeToString()
    model = reorder(program.model, orders)
    assert onnx_ir.to_proto(program.model).SerializeToString() == before
    feeds = feeds_of(program.model, seed, sizes)
    for expected, result in zip(compute(program.model, feeds), compute(model, feeds), strict=True):
        assert expected.dtype == result.dtype == (np.float64 if compute is exactly else np.float32)
        close = 1e-9 if compute is exactly else 2e-5
        np.testing.assert_allclose(result, expected, rtol=close, atol=close * float(np.abs(expected).max(initial=0)))
    layers = {layer.name: layer for layer in find_layers(model)}
    found = layer_orders(orders, {layer.name: layer.weight.shape for layer in program.layers})
    for layer in program.layers:
        rows, columns = found.get(layer.name, (np.arange(layer.out_features), np.arange(layer.in_features)))
        np.testing.assert_array_equal(layers[layer.name].weight, layer.weight[rows][:, columns])


# ---- What is free ----

FREE: dict[str, tuple[onnx.ModelProto, list[str]]] = {
    "mlp": (
        build(
            "h = MatMul(x, A) hb = Add(h, b) r = Relu(hb) y = Gemm<transB=1>(r, B, c)",
            A=(6, 8),
            b=(8,),
            B=(3, 8),
            c=(3,),
        ),
        ["8: h[0] / y[0]"],
    ),
    "weight on the left": (
        build("h = MatMul(A, x) r = Relu(h) y = Gemm<transA=1>(B, r)", x="6, 3", A=(8, 6), B=(8, 4)),
        ["8: h[0] / y[0]"],
    ),
    "residual": (
        build(
            "a = MatMul(x, A) r = Relu(a) b = MatMul(r, B) s = Add(a, b) t = Mul(v, s) y = MatMul(t, C)",
            A=(6, 8),
            B=(8, 8),
            v=(1, 8),
            C=(8, 3),
        ),
        ["8: a[0] b[0] / b[0] y[0]"],
    ),
    "convolutions": (
        build(
            """a = Conv<pads=[1,1,1,1]>(x, A, c) n = BatchNormalization(a, v1, v2, v3, v4) r = Relu(n)
            d = Conv<group=8>(r, D, e) p = PRelu(d, s) b = Conv(p, B) g = MaxPool<kernel_shape=[2,2]>(b) f = Flatten(g)
            y = Gemm(f, E)""",
            x="N, 3, 6, 6",
            A=(8, 3, 3, 3),
            c=(8,),
            v1=(8,),
            v2=(8,),
            v3=(8,),
            v4=(8,),
            D=(8, 1, 3, 3),
            e=(8,),
            s=(8, 1, 1),
            B=(5, 8, 1, 1),
            E=(45, 4),
        ),
        ["8: a[0] d[0] / b[0]", "5: b[0] / y[0x9]"],
    ),
    "depthwise with a multiplier": (
        build(
            "a = Conv(x, A) d = Conv<group=4>(a, D, e) y = Conv(d, B)",
            x="N, 3, 6, 6",
            y="N,C,H,W",
            A=(4, 3, 1, 1),
            D=(8, 1, 3, 3),
            e=(8,),
            B=(2, 8, 1, 1),
        ),
        ["4: a[0] d[0x2] / y[0x2]"],
    ),
    "transposed convolution": (
        build(
            "a = ConvTranspose(x, A, c) r = Relu(a) y = ConvTranspose(r, B)",
            x="N, 3, 4, 4",
            y="N,C,H,W",
            A=(3, 8, 2, 2),
            c=(8,),
            B=(8, 2, 3, 3),
        ),
        ["8: a[0] / y[0x9]"],
    ),
    "concat": (
        build(
            "s = Conv(x, S) r = Relu(s) a = Conv(r, A) b = Conv(r, B) c = Concat<axis=1>(a, b, a) y = Conv(c, C)",
            x="N, 3, 4, 4",
            y="N,C,H,W",
            S=(4, 3, 1, 1),
            A=(6, 4, 1, 1),
            B=(5, 4, 1, 1),
            C=(2, 17, 2, 2),
        ),
        ["4: s[0] / a[0] b[0]", "6: a[0] / y[0x4] y[44x4]", "5: b[0] / y[24x4]"],
    ),
    "concat of unequal cuts": (
        build(
            "a = MatMul(x, A) b = MatMul(x, B) c = Concat<axis=1>(a, b) d = Concat<axis=1>(b, a) s = Add(c, d) "
            "y = MatMul(s, C)",
            A=(6, 4),
            B=(6, 6),
            C=(10, 2),
        ),
        ["2: a[0] a[2] b[0] b[2] b[4] / y[0] y[2] y[4] y[6] y[8]"],
    ),
    "split": (
        build(
            "a = MatMul(x, A) b, c = Split<axis=-1>(a, k) s = Sigmoid(c) g = Mul(b, s) y = MatMul(g, B)",
            A=(6, 8),
            B=(4, 3),
        ),
        ["4: a[0] a[4] / y[0]"],
    ),
    "slice": (
        build("a = MatMul(x, A) b = Slice(a, zero, three, one) y = MatMul(b, B)", A=(6, 8), B=(3, 3)),
        ["3: a[0] / y[0]", "5: a[3] / "],
    ),
    "pad": (
        build(
            "a = Conv(x, A) b = Pad(a, pads) c = Conv(x, C) s = Add(b, c) y = Conv(s, B)",
            x="N, 3, 4, 4",
            y="N,C,H,W",
            A=(4, 3, 1, 1),
            C=(8, 3, 1, 1),
            B=(2, 8, 1, 1),
        ),
        ["4: a[0] c[2] / y[2]", "2: c[0] / y[0]", "2: c[6] / y[6]"],
    ),
    "pad as PyTorch writes it": (
        build(
            """p = Constant<value_ints=[0, 0, 0, 0, 2, 2]>() z = ConstantOfShape<value=int64[1] {0}>(count)
            q = Concat<axis=0>(p, z) r = Reshape(q, pairs) s = Slice(r, minus, lowest, zero, minus)
            t = Transpose<perm=[1,0]>(s) u = Reshape(t, minus) w = Cast<to=7>(u) a = Conv(x, A) b = Pad(a, w)
            y = Conv(b, B)""",
            x="N, 3, 4, 4",
            y="N,C,H,W",
            A=(4, 3, 1, 1),
            B=(2, 8, 1, 1),
        ),
        ["4: a[0] / y[2]", "2:  / y[0]", "2:  / y[6]"],
    ),
    "feed-forward part": (
        build(
            "n = LayerNormalization<axis=-1>(x, v0, b0) a = MatMul(n, A) ab = Add(ba, a) g = Erf(ab) h = Mul(ab, g) "
            "i = LayerNormalization<axis=-1>(h, v1, b1) b = MatMul(i, B) y = Add(b, x)",
            x="N, S, 6",
            y="N,S,C",
            v0=(6,),
            b0=(6,),
            A=(6, 8),
            ba=(8,),
            v1=(8,),
            b1=(8,),
            B=(8, 6),
        ),
        ["8: a[0] / b[0]"],
    ),
    "layer normalisation spelled out": (
        build(
            "a = MatMul(x, A) m = ReduceMean<axes=[-1]>(a) d = Sub(a, m) q = Mul(d, d) v = ReduceMean<axes=[2]>(q) "
            "s = Sqrt(v) n = Div(d, s) g = Mul(n, v1) z = Softmax<axis=-1>(g) y = MatMul(z, B)",
            x="N, S, 6",
            y="N,S,C",
            A=(6, 8),
            v1=(8,),
            B=(8, 3),
        ),
        ["8: a[0] / y[0]"],
    ),
    "squeeze and excitation": (
        build(
            "a = Conv(x, A) p = GlobalAveragePool(a) f = Flatten(p) h = MatMul(f, B) r = Relu(h) i = MatMul(r, C) "
            "u = Unsqueeze(i, two) w = Sigmoid(u) m = Mul(a, w) t = ReduceMean<axes=[2,3],keepdims=0>(m) "
            "y = MatMul(t, D)",
            x="N, 3, 4, 4",
            A=(8, 3, 1, 1),
            B=(8, 4),
            C=(4, 8),
            D=(8, 2),
        ),
        ["8: a[0] i[0] / h[0] y[0]", "4: h[0] / i[0]"],
    ),
    "channels last": (
        build(
            "a = Conv(x, A) t = Transpose<perm=[0,2,3,1]>(a) h = MatMul(t, B) b = Add(h, c) r = Reshape(b, flat) "
            "y = Gemm(r, C)",
            x="N, 3, 2, 3",
            A=(4, 3, 1, 1),
            B=(4, 5),
            c=(5,),
            C=(30, 2),
        ),
        ["4: a[0] / h[0]", "5: h[0] / y[0] y[5] y[10] y[15] y[20] y[25]"],
    ),
    "dense to convolution": (
        build(
            "a = Gemm(x, A, b) r = Reshape(a, image) y = Conv(r, B)", y="N,C,H,W", A=(6, 20), b=(20,), B=(3, 5, 1, 1)
        ),
        ["5: a[0x4] / y[0]"],
    ),
    "reshape at the front": (
        build("a = MatMul(x, A) r = Reshape(a, rows) y = MatMul(r, B)", x="2, 5, 6", A=(6, 8), B=(8, 3)),
        ["8: a[0] / y[0]"],
    ),
    "reshape behind unknown sizes": (
        build(
            "a = Conv(x, A) r = Reshape(a, image3) t = Transpose<perm=[0,2,1]>(r) y = MatMul(t, B)",
            x="N, 3, H, W",
            y="N,S,C",
            A=(8, 3, 1, 1),
            B=(8, 3),
        ),
        ["8: a[0] / y[0]"],
    ),
    "computed weight": (
        build("t = Transpose(A) a = MatMul(x, t) y = MatMul(a, B)", A=(8, 6), B=(8, 3)),
        ["8: a[0] / y[0]"],
    ),
    "shared weight": (
        build(
            "a = MatMul(x, A) r = Relu(a) b = MatMul(r, B) c = MatMul(b, B) y = MatMul(c, C)",
            A=(6, 8),
            B=(8, 8),
            C=(8, 3),
        ),
        ["8: a[0] b[0] c[0] / b[0] c[0] y[0]"],
    ),
    "grouped convolution": (
        build(
            "a = Conv(x, A) g = Conv<group=3>(a, G, b) r = Relu(g) y = Conv(r, B)",
            x="N, 3, 4, 4",
            y="N,C,H,W",
            A=(12, 3, 1, 1),
            G=(6, 4, 1, 1),
            b=(6,),
            B=(2, 6, 1, 1),
        ),
        ["3: a[0x4] g[0x2] / y[0x2]"],
    ),
    "recurrent layer": (
        build(
            """a = MatMul(x, A) l, h = GRU<hidden_size=3, linear_before_reset=1>(a, W, R, c) s = Squeeze(l, one)
            y = MatMul(s, B)""",
            x="S, N, 6",
            y="S,N,C",
            A=(6, 8),
            W=(1, 9, 8),
            R=(1, 9, 3),
            c=(1, 18),
            B=(3, 2),
        ),
        ["8: a[0] / l[0]", "3: l[0] l[3] l[6] / y[0]"],
    ),
    "recurrent layer in both directions": (
        build(
            """l, h, c = LSTM<hidden_size=3, direction="bidirectional">(x, W, R, b, , h0, c0, p)
            t = Transpose<perm=[0,2,1,3]>(l) r = Reshape(t, joined) y = MatMul(r, B)""",
            x="4, 2, 6",
            y="S,N,C",
            W=(2, 12, 6),
            R=(2, 12, 3),
            b=(2, 24),
            h0=(2, 2, 3),
            c0=(2, 2, 3),
            p=(2, 9),
            B=(6, 2),
        ),
        [f"3: {' '.join(f'l[{3 * k}]' for k in range(8))} / y[0] y[3]"],
    ),
    "resize": (
        build(
            "a = Conv(x, A) u = Resize(a, , scales) y = Conv(u, B)",
            x="N, 3, 4, 4",
            y="N,C,H,W",
            A=(8, 3, 1, 1),
            B=(3, 8, 1, 1),
        ),
        ["8: a[0] / y[0]"],
    ),
}
INTEGERS = {
    "zero": [0], "one": [1], "three": [3], "two": [2, 3], "k": [4, 4], "pads": [0, 2, 0, 0, 0, 2, 0, 0],
    "flat": [-1, 30], "image": [0, 5, 2, 2], "rows": [-1, 8], "image3": [0, 8, -1], "heads": [0, 0, 2, 4],
    "front": [0, 2], "joined": [0, 0, 6], "count": [2], "pairs": [-1, 2], "minus": [-1],
    "lowest": [-9223372036854775807],
}  # fmt: skip
for _model, _ in FREE.values():
    with_integers(_model, **INTEGERS)
    _model.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))


@pytest.mark.parametrize("name", FREE)
def test_free_channels(name: str) -> None:
    model, expected = FREE[name]
    program = read(model)
    assert text(program) == expected
    for seed in range(3):
        assert_same(program, random_orders(program, seed), seed, H=3, W=5)


# ---- What is not ----

MLP = {"A": (6, 8), "B": (8, 3)}
FROZEN: dict[str, onnx.ModelProto] = {
    "graph input and output": build("y = MatMul(x, A)", A=(6, 8)),
    "also a graph output": build("a = MatMul(x, A) y = MatMul(a, B)", **MLP),
    "weight is a graph input": build("a = MatMul(x, A) y = MatMul(a, B)", **MLP),
    "operator of another domain": build("a = MatMul(x, A) b = other.Thing(a) y = MatMul(b, B)", **MLP),
    "operator without a rule": build("a = MatMul(x, A) b = CumSum(a, oneness) y = MatMul(b, B)", **MLP),
    "constant beside it computed": build(
        "a = MatMul(x, A) r = Range(zeroness, eightness, oneness) c = Cast<to=1>(r) b = Add(a, c) y = MatMul(b, B)",
        **MLP,
    ),
    "head split": build(
        "a = MatMul(x, A) h = Reshape(a, heads) t = Transpose<perm=[0,2,1,3]>(h) s = ReduceSum(t, front) "
        "y = MatMul(s, B)", x="N, S, 6", A=(6, 8), B=(4, 3)),
    "recurrent layer that was not made for inference": build(
        "a = MatMul(x, A) l, h = GRU<hidden_size=2, layout=1>(a, W, R) y = Squeeze(h, one)", x="N, S, 6", y="N, C",
        A=(6, 8), W=(1, 6, 8), R=(1, 6, 2)),
    "local response": build(
        "a = Conv(x, A) n = LRN<size=3>(a) y = Conv(n, B)", x="N, 3, 4, 4", y="N,C,H,W", A=(4, 3, 1, 1),
        B=(2, 4, 1, 1)),
    "group normalisation": build(
        "a = Conv(x, A) n = GroupNormalization<num_groups=2>(a, v1, v2) y = Conv(n, B)", x="N, 3, 4, 4", y="N,C,H,W",
        opset=18, A=(4, 3, 1, 1), v1=(2,), v2=(2,), B=(2, 4, 1, 1)),
    "indices of a pool": build(
        "a = Conv(x, A) m, i = MaxPool<kernel_shape=[2,2]>(a) y = Conv(m, B)",
        x="N, 3, 4, 4", y="N,C,H,W", A=(4, 3, 1, 1), B=(2, 4, 1, 1)),
    "picked channels": build("a = MatMul(x, A) b = Gather<axis=1>(a, three) y = MatMul(b, B)", A=(6, 8), B=(1, 3)),
    "largest channel": build(
        "a = MatMul(x, A) i = ArgMax<axis=1>(a) f = Cast<to=1>(i) y = MatMul(f, B)", A=(6, 8), B=(1, 3)),
    "steps": build(
        "a = MatMul(x, A) b = Slice(a, zero, three, one, three) y = MatMul(b, B)", A=(6, 8), B=(1, 3)),
    "pads of mirrored channels": build(
        'a = Conv(x, A) p = Pad<mode="reflect">(a, pads) y = Conv(p, B)', x="N, 3, 4, 4", y="N,C,H,W",
        A=(4, 3, 1, 1), B=(2, 8, 1, 1)),
    "quantised": build(
        "a = MatMul(x, A) q = QuantizeLinear(a, scale, point) d = DequantizeLinear(q, scale, point) y = MatMul(d, B)",
        **MLP),
    "old opset": build("a = MatMul(x, A) y = MatMul(a, B)", opset=6, **MLP),
}  # fmt: skip
for _model in FROZEN.values():
    with_integers(_model, **INTEGERS)
    _scalars = {"zeroness": np.int64(0), "oneness": np.int64(1), "eightness": np.int64(8), "scale": np.float32(0.1)}
    for _name, _value in {**_scalars, "point": np.uint8(128)}.items():
        _model.graph.initializer.append(numpy_helper.from_array(np.array(_value), _name))
FROZEN["also a graph output"].graph.output.append(
    onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, ["N", 8])
)
FROZEN["indices of a pool"].graph.output.append(
    onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, ["N", 4, 3, 3])
)
FROZEN["weight is a graph input"].graph.input.append(
    onnx.helper.make_tensor_value_info("A", onnx.TensorProto.FLOAT, [6, 8])
)


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_channels(name: str) -> None:
    assert text(read(FROZEN[name])) == []


def test_an_initialiser_that_was_an_input_by_rule_is_free() -> None:
    model = with_integers(build("a = MatMul(x, A) y = MatMul(a, B)", **MLP))
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, 1, tensor.dims))
    assert text(read(model)) == ["8: a[0] / y[0]"]


def test_a_subgraph_and_a_function_freeze_what_they_read() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 17, "local": 1]>
        g (float[N, 2] x, bool flag) => (float[N, 2] y)
          <float[2, 2] A = {1, 2, 3, 4}, float[2, 2] B = {1, 2, 3, 4}, float[2, 2] C = {1, 2, 3, 4}>
        {
            a = MatMul(x, A)
            b = If (flag) <
                then_branch = t () => (float[N, 2] s) { s = Add(a, a) },
                else_branch = e () => (float[N, 2] u) { u = Identity(a) }
            >
            c = MatMul(b, B)
            d = local.twice(c)
            y = MatMul(d, C)
        }
        <domain: "local", opset_import: ["": 17]> twice (v) => (w) { w = Add(v, v) }""")
    assert text(read(model)) == []


# ---- Random graphs ----


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(Net.operations()), st.integers(0, 30)), min_size=2, max_size=14),
    st.integers(0, 2**16),
)
def test_random_graphs_compute_the_same_in_any_order(steps: list[tuple[str, int]], seed: int) -> None:
    net = Net(seed)
    net.grow("conv1", seed)
    for operation, pick in steps:
        net.grow(operation, pick)
    program = read(net.model())
    assert_same(program, random_orders(program, seed), seed, exactly)


# ---- Real models ----

SMALL = {
    "mlp": (mlp((12, 32, 16, 5)), ["32: /fc1/Gemm[0] / /fc2/Gemm[0]", "16: /fc2/Gemm[0] / /fc3/Gemm[0]"]),
    "tinyvgg16": (tinyvgg16(channels=(4, 4, 8, 8, 8), dense=16, classes=5), 15),
    "encoder": (encoder(EncoderConfig(layers=2, hidden=24, heads=3, ffn=40, vocabulary=50, positions=16)), 4),
}


@pytest.mark.parametrize("name", SMALL)
def test_builders(name: str) -> None:
    model, expected = SMALL[name]
    program = read(model)
    found = text(program)
    assert found == expected if isinstance(expected, list) else len(found) == expected
    assert_same(program, random_orders(program, 1), sequence=7)


@needs_assets
@pytest.mark.parametrize(
    ("file", "dimensions"),
    [
        ("magika_standard_v3_3", 3),
        ("mnist_cnn_opset8", 2),
        ("resnet20_cifar10", 14),
        ("resnet20_cifar10_int8_qdq", 0),
        ("squeezenet_dc_sparse", 25),
        ("ultraface_version-RFB-320", 25),
    ],
)
def test_real_models(file: str, dimensions: int) -> None:
    program = read(ASSETS / f"{file}.onnx")
    orders = random_orders(program, 2)
    assert len(orders) == dimensions
    assert_same(program, orders)


LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def light(file: str) -> onnx.ModelProto:
    """onnx's own test models, whose weights are left out; here they are random."""
    model = onnx.load(LIGHT / f"light_{file}.onnx")
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    rng = np.random.default_rng(0)
    nodes = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape":
            nodes.append(node)
            continue
        shape = shapes[node.input[0]]
        array = rng.standard_normal(shape, dtype=np.float32) * np.float32((2 / max(1, np.prod(shape[1:]))) ** 0.5)
        array = 1 + 0.1 * rng.random(shape, dtype=np.float32) if len(shape) == 1 else array
        model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@pytest.mark.skipif(not LIGHT.is_dir(), reason="this onnx comes without its light models")
@pytest.mark.parametrize(
    ("file", "dimensions"), [("densenet121", 120), ("inception_v2", 69), ("resnet50", 37), ("shufflenet", 0)]
)
def test_known_networks(file: str, dimensions: int) -> None:
    program = read(light(file))
    orders = random_orders(program, 1)
    assert len(orders) == dimensions
    assert_same(program, orders)


@needs_assets
def test_concatenated_segments_of_a_real_model() -> None:
    found = text(read(ASSETS / "squeezenet_dc_sparse.onnx"))
    assert found[:4] == [
        "96: conv1[0] / fire2_squeeze1x1[0]",
        "16: fire2_squeeze1x1[0] / fire2_expand1x1[0] fire2_expand3x3[0x9]",
        "64: fire2_expand1x1[0] / fire3_squeeze1x1[0]",
        "64: fire2_expand3x3[0] / fire3_squeeze1x1[64]",
    ]


def test_heads_move_whole() -> None:
    found = text(read(SMALL["encoder"][0]))
    path = "/encoder/layer.0/attention"
    heads = " ".join(f"{path}/self/{name}/MatMul[0x8]" for name in ("query", "key", "value"))
    assert found[0] == f"3: {heads} / {path}/output/dense/MatMul[0x8]"
    assert found[1] == "40: /encoder/layer.0/intermediate/dense/MatMul[0] / /encoder/layer.0/output/dense/MatMul[0]"


# ---- Axes ----


def shape_of(axis: Any) -> list[tuple[int | None, int]]:
    return [(segment.size, repeat) for segment, repeat in leaves(axis)]


@settings(deadline=None)
@given(st.data())
def test_tied_axes_accept_one_order(data: st.DataObject) -> None:
    """Axes of random parts, tied at random: whatever orders the free segments get, tied axes show the same places."""
    size = data.draw(st.sampled_from([6, 12, 24]))
    pool = [free(size), free(size // 2), free(size // 6), fixed(size // 3)]
    axes = []
    for _ in range(3):
        axis: Any = ()
        while (extent(axis) or 0) < size:
            part = data.draw(st.sampled_from(pool))
            fits = [k for k in (1, 2, 3) if (extent(axis) or 0) + k * (extent(part) or 0) <= size]
            axis += repeated(part, data.draw(st.sampled_from(fits))) if fits else free(1)
        axes.append(axis)
    for one, other in data.draw(st.lists(st.permutations(axes).map(lambda found: found[:2]), max_size=3)):
        tie(one, other)
        rng = np.random.default_rng(0)
        orders: dict[Any, Array] = {}

        def places(axis: Any, rng: Any = rng, orders: Any = orders) -> list[int]:
            result: list[int] = []
            for segment, repeat in leaves(axis):
                free_order = rng.permutation(segment.size)
                order = orders.setdefault(segment, np.arange(segment.size) if segment.frozen else free_order)
                result += (len(result) + (order[:, None] * repeat + np.arange(repeat))).ravel().tolist()
            return result

        assert sorted(places(one)) == list(range(size))
        assert places(one) == places(other)


def test_cuts_and_merges() -> None:
    axis = free(6)
    assert shape_of(cut(axis, 2, 5)) == [(3, 1)]
    assert shape_of(axis) == [(2, 1), (3, 1), (1, 1)]
    channels = free(4)
    assert shape_of(merge([channels, fixed(2), fixed(3)])) == [(4, 6)]
    assert shape_of(merge([fixed(3), channels])) == [(4, 1)] * 3
    assert not leaves(channels)[0].segment.frozen
    cut(repeated(channels, 2), 1, 4)
    assert leaves(channels)[0].segment.frozen
    assert extent(merge([fixed(None), free(3)])) is None
    unknown = free(5)
    tie(unknown, fixed(None))
    assert leaves(unknown)[0].segment.frozen
    freeze(unknown)


# ---- Orders ----


def mlp_dimensions(*widths: int) -> tuple[Program, tuple[Dimension, ...]]:
    program = read(mlp(widths))
    return program, find_dimensions(program)


def planted(shape: tuple[int, int], pattern: BlockPattern, density: float, rng: np.random.Generator) -> Array:
    """Positive scores in random whole blocks, exact zeros elsewhere."""
    mask = pattern.project(rng.random(pattern.grid(shape)).repeat(pattern.rows, 0).repeat(pattern.cols, 1), density)
    return np.where(mask, 0.1 + rng.random(shape), 0.0)


@pytest.mark.parametrize("name", ["group:16", "group:8", "block:16x4", "block:32x32", "block:8x16", "block:1x8"])
@pytest.mark.parametrize("density", [0.5, 0.3, 0.1])
def test_planted_blocks_are_found_again(name: str, density: float) -> None:
    """Outputs and inputs of one layer, both shuffled; where a block has one input only the outputs need an order."""
    pattern = BlockPattern.parse(name)
    assert pattern is not None
    _, (inputs, outputs) = mlp_dimensions(4, 128, 192, 4)
    rng = np.random.default_rng(3)
    dense = planted((192, 128), pattern, density, rng)
    share = float((dense > 0).mean())
    shuffled = dense[rng.permutation(192)][:, rng.permutation(128)]
    scores = {"/fc2/Gemm": shuffled}
    orders = search_all((inputs, outputs), scores, pattern, share)
    assert kept(orders, scores, pattern, share) == pytest.approx(dense.sum(), rel=1e-12)
    present = {inputs: np.arange(128), outputs: np.arange(192)}
    assert kept(present, scores, pattern, share) < 0.9 * dense.sum()


def test_planted_channels_with_repeats_are_found_again() -> None:
    """A 3x3 convolution's columns: 32 columns are no whole number of channels, 36 are four."""
    program = read(FREE["convolutions"][0])
    dimension = Dimension(24, (Place("a", 0, 0, 1),), (Place("b", 1, 0, 9),), ())
    rng = np.random.default_rng(0)
    pattern = BlockPattern(4, 36)
    dense = planted((8, 216), pattern, 0.5, rng)
    order = rng.permutation(24)
    scores = {"b": dense[:, (order[:, None] * 9 + np.arange(9)).ravel()]}
    found = search(dimension, scores, pattern, 0.5)
    assert kept({dimension: found}, scores, pattern, 0.5) == pytest.approx(dense.sum())
    assert program.layers


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["group:4", "block:4x4", "block:5x3", "block:1x4", "block:16x2"]),
    st.sampled_from([0.0, 0.1, 0.33, 0.5, 0.9, 1.0]),
    st.integers(0, 1000),
    st.booleans(),
)
def test_never_below_the_present_order(name: str, density: float, seed: int, sparse: bool) -> None:
    """Segments, repeats, edges that cut a block off, and a dimension on both sides of one layer."""
    rng = np.random.default_rng(seed)
    dimensions = (
        Dimension(14, (Place("a", 0, 0, 1), Place("c", 0, 0, 1)), (Place("b", 1, 0, 1), Place("c", 1, 0, 1)), ()),
        Dimension(5, (Place("a", 0, 14, 1),), (Place("b", 1, 14, 3),), ()),
        Dimension(6, (Place("b", 0, 1, 2),), (), ()),
    )
    shapes = {"a": (19, 10), "b": (13, 29), "c": (14, 14)}
    scores = {n: np.exp(rng.standard_normal(s)) * (rng.random(s) < (0.3 if sparse else 1)) for n, s in shapes.items()}
    pattern = BlockPattern.parse(name)
    assert pattern is not None
    present = {dimension: np.arange(dimension.size) for dimension in dimensions}
    before = kept(present, scores, pattern, density)
    found = search_all(dimensions, scores, pattern, density, seed)
    assert kept(found, scores, pattern, density) >= before
    for dimension in dimensions:
        order = search(dimension, scores, pattern, density, seed)
        assert kept(present | {dimension: order}, scores, pattern, density) >= before
        again = search(dimension, {n: s.copy() for n, s in scores.items()}, pattern, density, seed)
        assert order.tobytes() == again.tobytes() and order.dtype == np.int64


def test_orders_are_worth_it() -> None:
    """Channels of unequal size and of four kinds, mixed: all of the gain that sorting them by hand would give."""
    rng = np.random.default_rng(0)
    _, (dimension,) = mlp_dimensions(48, 64, 4)
    kinds = np.exp(1.5 * rng.standard_normal((4, 48)))
    scores = {"/fc1/Gemm": kinds.repeat(16, 0) * np.exp(0.3 * rng.standard_normal((64, 48)))}
    shuffled = {"/fc1/Gemm": scores["/fc1/Gemm"][rng.permutation(64)]}
    pattern = BlockPattern(16, 1)
    by_hand, mixed = (kept({}, part, pattern, 0.25) for part in (scores, shuffled))
    order = search(dimension, shuffled, pattern, 0.25)
    assert mixed < 0.8 * by_hand
    assert kept({dimension: order}, shuffled, pattern, 0.25) >= by_hand * (1 - 1e-9)


def test_where_no_order_matters_none_is_sought() -> None:
    _, (dimension,) = mlp_dimensions(6, 8, 5)
    scores = {"/fc2/Gemm": np.random.default_rng(0).random((5, 8))}
    for pattern in (BlockPattern(4, 1), BlockPattern(1, 1)):
        np.testing.assert_array_equal(search(dimension, scores, pattern, 0.5), np.arange(8))
    np.testing.assert_array_equal(search(dimension, {}, BlockPattern(4, 4), 0.5), np.arange(8))


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 1000))
def test_exchange_never_loses(size: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    starts = np.sort(rng.permutation(size)[: min(classes, size)])
    starts[0] = 0
    gains = rng.standard_normal((size, len(starts)))
    home = np.searchsorted(starts, np.arange(size), side="right") - 1
    order = exchange(gains, starts)
    assert sorted(order) == list(range(size))
    now = gains[order, home]
    assert now.sum() >= gains[np.arange(size), home].sum() - 1e-12
    for i in range(size):
        for j in range(i):
            assert gains[order[i], home[j]] + gains[order[j], home[i]] <= now[i] + now[j] + 1e-9


def test_the_reordered_model_keeps_what_the_search_promised() -> None:
    program = read(mlp((24, 64, 32, 8), seed=4))
    scores = {layer.name: np.square(layer.weight, dtype=np.float64) for layer in program.layers}
    pattern = BlockPattern(8, 4)
    orders = search_all(find_dimensions(program), scores, pattern, 0.4)
    assert_same(program, orders)
    layers = find_layers(reorder(program.model, orders))
    after = {layer.name: np.square(layer.weight, dtype=np.float64) for layer in layers}
    for name, part in permuted(orders, scores).items():
        np.testing.assert_array_equal(after[name], part)
    assert kept({}, after, pattern, 0.4) == kept(orders, scores, pattern, 0.4) > kept({}, scores, pattern, 0.4)


def test_what_no_order_touches_is_shared() -> None:
    program, (first, second) = mlp_dimensions(6, 8, 7, 5)
    model = reorder(program.model, {first: np.arange(8)[::-1], second: np.arange(7)})
    shared = {
        name
        for name, value in model.graph.initializers.items()
        if value.const_value is program.model.graph.initializers[name].const_value
    }
    assert shared == {"fc2.bias", "fc3.weight", "fc3.bias"}


def test_half_precision_stays() -> None:
    model = build("a = MatMul(x, A) r = Relu(a) y = MatMul(r, B)")
    for name, shape in MLP.items():
        array = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    program = read(model)
    (dimension,) = find_dimensions(program)
    result = reorder(program.model, {dimension: np.roll(np.arange(8), 3)})
    tensor = result.graph.initializers["A"].const_value
    assert tensor is not None and tensor.dtype == onnx_ir.DataType.FLOAT16
    np.testing.assert_array_equal(tensor.numpy(), np.roll(program.layers[0].weight.T, 3, axis=1))


def test_orders_and_scores_that_cannot_be() -> None:
    program, (dimension,) = mlp_dimensions(6, 8, 5)
    for order in (np.arange(7), np.zeros(8, dtype=np.int64)):
        with pytest.raises(SparsecError, match="8 channels of /fc1/Gemm, /fc2/Gemm must hold each of them once"):
            reorder(program.model, {dimension: order})
    pattern = BlockPattern(4, 1)
    with pytest.raises(SparsecError, match=r"its scores are \[4, 6\], but 8 channels end at 8 of axis 0"):
        search(dimension, {"/fc1/Gemm": np.ones((4, 6))}, pattern, 0.5)
    with pytest.raises(SparsecError, match="negative or not finite"):
        search(dimension, {"/fc1/Gemm": np.full((8, 6), np.nan)}, pattern, 0.5)
