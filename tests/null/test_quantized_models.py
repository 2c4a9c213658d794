"""Models in QDQ form: what is found in them, what a rewritten one looks like, and that it computes the same codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sparsec.codegen.target import CpuTarget, Target
from sparsec.codegen.target.cuda import TABLE
from sparsec.compiler.chains import chained
from sparsec.compiler.config import CompileConfig
from sparsec.compiler.exporter import SparseOp, export, layer_model
from sparsec.compiler.formats import Form, kinds_of, pack
from sparsec.compiler.frontend import read
from sparsec.compiler.inspect import inspect
from sparsec.compiler.plan import Candidate, make_plan
from sparsec.ir import BlockPattern, Grid, Layer, Program, SparsecError, SparseMatrix
from sparsec.ir.sparse_matrix import DOT_INPUTS
from sparsec.ir.values import Floats, Int8
from sparsec.passes.prune import prune_by_norm

if TYPE_CHECKING:
    from pathlib import Path

# ---- Graphs ----

RNG = np.random.default_rng(0)
KEEP = ((np.arange(8)[:, None] // 4 + np.arange(12)[None, :] // 4) % 2).astype(bool)
CODES = np.where(KEEP, RNG.integers(-127, 128, (8, 12)), 0)
SCALES = np.linspace(0.01, 0.03, 8, dtype=np.float32)


def i8(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int8) if len(values) > 1 else np.array(values[0], dtype=np.int8)


CONSTANTS: dict[str, np.ndarray] = {
    "W": CODES.astype(np.int8),  # [out, in]
    "Wt": CODES.T.astype(np.int8),
    "Wu": (CODES + 128).astype(np.uint8),
    "Wa": (CODES + 100).clip(0, 255).astype(np.uint8),
    "Wat": (CODES + 100).clip(0, 255).astype(np.uint8).T.copy(),
    "W2": np.where(KEEP.T, RNG.integers(-127, 128, (12, 8)), 0).astype(np.int8),  # [12, 8]
    "Wf": (CODES * SCALES[:, None]).astype(np.float32),
    "ws": SCALES,
    "ws1": np.float32(0.02),
    "ws_small": np.float32(0.0005),  # so that a step before moves the result by less than one
    "ws2": np.linspace(0.01, 0.03, 12, dtype=np.float32),
    "wsb": np.full((8, 3), 0.02, np.float32),
    "ws_zero": np.array([0.0, *SCALES[1:]], np.float32),
    "z8": np.zeros(8, np.int8),
    "z12": np.zeros(12, np.int8),
    "z0": i8(0),
    "z7": i8(7),
    "u128": np.uint8(128),
    "u100": np.uint8(100),
    "u0": np.uint8(0),
    "xs": np.float32(0.05),
    "xs_zero": np.float32(0),
    "xs_inf": np.float32(np.inf),
    "xs_of_one": np.array([0.05], np.float32),
    "xs12": np.full(12, 0.05, np.float32),
    "ys": np.float32(0.1),
    "b": np.linspace(-1, 1, 8, dtype=np.float32),
    "bq": RNG.integers(-1000, 1000, 8).astype(np.int32),
    "bs": SCALES * np.float32(0.05),
}
NAMES = {"u": "uint8", "i": "int8", "f": "float"}


def build(body: str, inputs: str = "uint8[n,12] x", outputs: str = "uint8[n,8] y", opset: int = 19) -> onnx.ModelProto:
    """A model from ONNX text, with those of `CONSTANTS` that it reads as initialisers."""
    head = f'<ir_version: 9, opset_import: ["": {opset}, "com.microsoft": 1]>\ng ({inputs}) => ({outputs})'
    model = onnx.parser.parse_model(f"{head} {{ {body} }}")
    used = {name for node in model.graph.node for name in node.input}
    for name, array in CONSTANTS.items():
        if name in used:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return model


WEIGHT = "w = DequantizeLinear<axis: int = 0>(W, ws, z8)"
X = "a = DequantizeLinear(x, xs, u128)"
GEMM = "h = Gemm<transB: int = 1>(a, w, b)"
Y = "y = QuantizeLinear(h, ys, u100)"
PLAIN = f"{X} {WEIGHT} {GEMM} {Y}"
SIGNED = (
    f"q = QuantizeLinear(x, xs, z7) a = DequantizeLinear(q, xs, z7) {WEIGHT} {GEMM} "
    "p = QuantizeLinear(h, ys, z0) y = DequantizeLinear(p, ys, z0)"
)
FLOATS = ("float[n,12] x", "float[n,8] y")


def layers_of(model: onnx.ModelProto) -> tuple[Layer, ...]:
    return read(model.SerializeToString()).layers


def described(layer: Layer) -> str:
    """As `describe`, and whether X is rounded when the model runs."""
    head, sign, obstacle = describe(layer).partition(" ! ")
    return head + (", x when it runs" if layer.dynamic and not obstacle else "") + sign + obstacle


def describe(layer: Layer) -> str:
    """A layer as one line; a grid in brackets is one of codes that stay outside."""
    parts = [f"{layer.nodes[-1].outputs[0].name} = {layer.stored or layer.dtype}"]
    parts += [f"as {layer.values}"] if layer.values is not None else []
    for side, grid, codes in (("x", layer.x_grid, layer.x_codes), ("y", layer.y_grid, layer.y_codes)):
        if grid is not None:
            numbers = f"{grid.scale:.4g} {grid.zero_point}"
            parts.append(f"{side} ({numbers})" if codes is None else f"{side} {codes.name} {numbers}")
    return ", ".join(parts) + (f" ! {layer.obstacle}" if layer.obstacle else "")


FOUND = {
    "all of it": (PLAIN, "y = int8, as int8, x x 0.05 128, y y 0.1 100"),
    "one scale": (
        PLAIN.replace("<axis: int = 0>(W, ws, z8)", "(W, ws1, z0)"),
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "no zero points": (
        f"a = DequantizeLinear(x, xs) w = DequantizeLinear<axis: int = 0>(W, ws) {GEMM} y = QuantizeLinear(h, ys)",
        "y = int8, as int8, x x 0.05 0, y y 0.1 0",
    ),
    "scales of one element": (PLAIN.replace("xs", "xs_of_one"), "y = int8, as int8, x x 0.05 128, y y 0.1 100"),
    "MatMul": (
        f"{X} w = DequantizeLinear<axis: int = 1>(Wt, ws, z8) h = MatMul(a, w) {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "axis from the end": (
        f"{X} w = DequantizeLinear<axis: int = -1>(Wt, ws, z8) h = MatMul(a, w) {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "turned after": (
        f"{X} {WEIGHT} t = Transpose(w) h = MatMul(a, t) {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "turned before": (
        f"{X} t = Transpose(W) w = DequantizeLinear(t, ws, z8) h = MatMul(a, w) {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "quantised in the graph": (
        f"{X} q = QuantizeLinear<axis: int = 0>(Wf, ws, z8) w = DequantizeLinear<axis: int = 0>(q, ws, z8) {GEMM} {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "uint8 around 128": (
        f"{X} w = DequantizeLinear(Wu, ws1, u128) {GEMM} {Y}",
        "y = uint8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "asymmetric": (
        f"{X} w = DequantizeLinear(Wa, ws1, u0) {GEMM} {Y}",
        "y = uint8, x x 0.05 128, y y 0.1 100",
    ),
    "a bias of codes": (
        f"{X} {WEIGHT} b2 = DequantizeLinear<axis: int = 0>(bq, bs) h = Gemm<transB: int = 1>(a, w, b2) {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "an activation": (
        f"{X} {WEIGHT} {GEMM} r = Relu(h) y = QuantizeLinear(r, ys, u100)",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
}
NOT_ALL = {
    "X of floats": ("float[n,12] a", f"{WEIGHT} {GEMM} {Y}", "y = int8, as int8, y y 0.1 100"),
    "X by channel": (
        "uint8[n,12] x",
        f"a = DequantizeLinear<axis: int = 1>(x, xs12) {WEIGHT} {GEMM} {Y}",
        "y = int8, as int8, y y 0.1 100",
    ),
    "signed X from outside": (
        "int8[n,12] x",
        f"a = DequantizeLinear(x, xs, z7) {WEIGHT} {GEMM} {Y}",
        "y = int8, as int8, x (0.05 135), y y 0.1 100",
    ),
    "signed X that something else reads": (
        "float[n,12] f",
        f"x = QuantizeLinear(f, xs, z7) a = DequantizeLinear(x, xs, z7) o = Identity(x) {WEIGHT} {GEMM} {Y}",
        "y = int8, as int8, x (0.05 135), y y 0.1 100",
    ),
    "signed Y returned": (
        "uint8[n,12] x",
        f"{X} {WEIGHT} {GEMM} y = QuantizeLinear(h, ys, z0)",
        "h = int8, as int8, x x 0.05 128, y (0.1 128)",
    ),
    "Y read twice": ("uint8[n,12] x", f"{PLAIN} o = Relu(h)", "h = int8, as int8, x x 0.05 128"),
    "Y by channel": (
        "uint8[n,12] x",
        f"{X} {WEIGHT} {GEMM} y = QuantizeLinear<axis: int = 1>(h, ws)",
        "h = int8, as int8, x x 0.05 128",
    ),
    "a residual": (
        "uint8[n,12] x, float[n,8] r",
        f"{X} {WEIGHT} {GEMM} s = Add(h, r) y = QuantizeLinear(s, ys, u100)",
        "s = int8, as int8, x x 0.05 128",
    ),
    "alpha": (
        "uint8[n,12] x",
        f"{X} {WEIGHT} h = Gemm<alpha: float = 0.3, transB: int = 1>(a, w, b) {Y}",
        "y = int8, x x 0.05 128, y y 0.1 100",
    ),
    "a power of two": (
        "uint8[n,12] x",
        f"{X} {WEIGHT} h = Gemm<alpha: float = 0.5, transB: int = 1>(a, w, b) {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "a float weight": ("uint8[n,12] x", f"{X} h = Gemm<transB: int = 1>(a, Wf, b) {Y}", "h = float32"),
}


@pytest.mark.parametrize("name", FOUND)
def test_layers_with_codes(name: str) -> None:
    body, expected = FOUND[name]
    (layer,) = layers_of(build(body))
    assert describe(layer) == expected
    if layer.values is not None:
        assert layer.table is not None
        np.testing.assert_array_equal(layer.values.round(layer.weight, layer.table), layer.weight)
    if layer.stored == "int8" and layer.table is not None and layer.table.std() > 0:
        np.testing.assert_array_equal(layer.table, SCALES[:, None])
        np.testing.assert_array_equal(layer.weight, CODES.astype(np.float32) * SCALES[:, None])
    assert layer.nbytes == 96


@pytest.mark.parametrize("name", NOT_ALL)
def test_layers_with_fewer_codes(name: str) -> None:
    inputs, body, expected = NOT_ALL[name]
    assert "; ".join(map(describe, layers_of(build(body, inputs)))) == expected


def test_signed_codes_between_two_nodes_are_shifted() -> None:
    (layer,) = layers_of(build(SIGNED, *FLOATS))
    assert describe(layer) == "p = int8, as int8, x q 0.05 135, y p 0.1 128"
    other = build(SIGNED.replace("y = DequantizeLinear(p, ys, z0)", "y = DequantizeLinear(p, xs, z0)"), *FLOATS)
    assert describe(layers_of(other)[0]) == "h = int8, as int8, x q 0.05 135, y (0.1 128)"


def test_the_weight_on_the_left() -> None:
    body = f"{X} {WEIGHT} h = MatMul(w, a) {Y}"
    (layer,) = layers_of(build(body, "uint8[12,5] x", "uint8[8,5] y"))
    assert layer.transpose_x
    assert layer.transpose_y
    assert describe(layer) == "y = int8, as int8, x x 0.05 128, y y 0.1 100"


# ---- What is not taken ----

OBSTACLES = {
    "scales along the inputs": (
        f"{X} w = DequantizeLinear<axis: int = 1>(W, ws2, z12) {GEMM} {Y}",
        "its weight has scales along its inputs; no sparse operator yet",
    ),
    "no scale for the weight": (
        f"{X} w = DequantizeLinear<axis: int = 0>(W, ws_zero, z8) {GEMM} {Y}",
        "the scale 'ws_zero' of its weight is 0, expected a positive finite number",
    ),
    "no scale for X": (
        PLAIN.replace("xs", "xs_zero"),
        "the scale 'xs_zero' of its input is 0, expected a positive finite number",
    ),
    "infinity for X": (
        PLAIN.replace("xs", "xs_inf"),
        "the scale 'xs_inf' of its input is inf, expected a positive finite number",
    ),
    "no scale for Y": (
        PLAIN.replace("ys", "xs_zero"),
        "the scale 'xs_zero' of its output is 0, expected a positive finite number",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles(name: str) -> None:
    body, words = OBSTACLES[name]
    (layer,) = layers_of(build(body))
    assert layer.obstacle == words


@pytest.mark.parametrize(
    ("kind", "opset", "ir"), [("INT4", 21, 10), ("UINT4", 21, 10), ("FLOAT8E4M3FN", 19, 9), ("FLOAT8E5M2", 19, 9)]
)
def test_weights_of_fewer_bits_or_small_floats(kind: str, opset: int, ir: int) -> None:
    """Found, with an obstacle; nothing is put in their place."""
    model = build("w = DequantizeLinear(W, ws1) y = MatMul(x, w)", "float[n,8] x", "float[n,12] y", opset=opset)
    model.ir_version = ir
    del model.graph.initializer[:]
    values = (CODES % 3).ravel().tolist()
    model.graph.initializer.append(onnx.helper.make_tensor("W", getattr(onnx.TensorProto, kind), (8, 12), values))
    model.graph.initializer.append(onnx.numpy_helper.from_array(CONSTANTS["ws1"], "ws1"))
    (layer,) = layers_of(model)
    assert layer.obstacle == f"weights of {kind.lower()}; no sparse operator yet"
    assert layer.nbytes == (48 if kind.endswith("INT4") else 96)
    plan = make_plan(read(model), CompileConfig(sparsity=0.5, prune_all=True, layer_sparsity=(("*", 0.9),)))
    assert not plan.candidates
    assert not plan.pruned


@pytest.mark.parametrize(("zero_point", "kind"), [("u0", "uint8"), ("b0", "int32")])
@pytest.mark.parametrize("of", ["weight", "X"])
def test_a_zero_point_of_another_type_is_refused(zero_point: str, kind: str, of: str) -> None:
    weight = f"w = DequantizeLinear(W, ws1, {zero_point})" if of == "weight" else WEIGHT
    x = (
        X
        if of == "weight"
        else f"f = Identity(x) q = QuantizeLinear(f, xs, z0) a = DequantizeLinear(q, xs, {zero_point})"
    )
    model = build(f"{x} {weight} {GEMM} {Y}", "uint8[n,12] x" if of == "weight" else FLOATS[0])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.int32(0), "b0"))
    codes = "W" if of == "weight" else "q"
    with pytest.raises(
        SparsecError, match=f"zero point '{zero_point}' is {kind}, but the codes '{codes}' are int8; they must"
    ):
        read(model)


def test_an_infinite_scale_of_a_weight_is_refused() -> None:
    with pytest.raises(SparsecError, match="its weight, initialiser 'w', holds"):
        read(build(PLAIN.replace("<axis: int = 0>(W, ws, z8)", "(W, xs_inf, z0)")))


DYNAMIC = "q, s, z = DynamicQuantizeLinear(f) p = MatMulInteger(q, Wt, z, z8) c = Cast<to: int = 1>(p)"
CODED = "as int8, x x 0.05 128"
# Name: body, input, output, the layer, the model with a sparse operator in its place.
INTEGERS = {
    "QLinearMatMul": (
        "y = QLinearMatMul(x, xs, u128, Wt, ws, z8, ys, u100)",
        ("uint8[n,12] x", "uint8[n,8] y"),
        f"y = int8, {CODED}, y y 0.1 100",
        ["y = QSparseLinear(x)"],
    ),
    "QGemm": (
        "y = com.microsoft.QGemm<transB: int = 1>(x, xs, u128, W, ws, z8, bq, ys, u100)",
        ("uint8[n,12] x", "uint8[n,8] y"),
        f"y = int8, {CODED}, y y 0.1 100",
        ["y = QSparseLinear(x)"],
    ),
    "QGemm to floats": (
        "h = com.microsoft.QGemm<transB: int = 1>(x, xs, u128, W, ws, z8, bq) y = Relu(h)",
        ("uint8[n,12] x", "float[n,8] y"),
        f"y = int8, {CODED}",
        ["y = SparseLinear(x)"],
    ),
    "MatMulIntegerToFloat": (
        "y = com.microsoft.MatMulIntegerToFloat(x, Wt, xs, ws, u128, z8, b)",
        ("uint8[n,12] x", "float[n,8] y"),
        f"y = int8, {CODED}",
        ["y = SparseLinear(x)"],
    ),
    "of asymmetric weights": (
        "y = QLinearMatMul(x, xs, u128, Wat, ws1, u100, ys, u100)",
        ("uint8[n,12] x", "uint8[n,8] y"),
        f"y = uint8, {CODED}, y y 0.1 100",
        ["y = QSparseLinear(x)"],
    ),
    "of weights that no int8 is": (
        "y = QLinearMatMul(x, xs, u128, Wat, ws1, u0, ys, u100)",
        ("uint8[n,12] x", "uint8[n,8] y"),
        "y = uint8, x x 0.05 128, y y 0.1 100",
        ["x.dequantizelinear = DequantizeLinear(x, x.scale)", "y = QSparseLinear(x.dequantizelinear)"],
    ),
    "DynamicQuantizeMatMul": (
        "h = com.microsoft.DynamicQuantizeMatMul(f, Wt, ws, z8, b) y = Relu(h)",
        ("float[1,12] f", "float[1,8] y"),
        "y = int8, as int8, x when it runs",
        ["y = SparseLinear(f)"],
    ),
    "MatMulIntegerToFloat of codes when it runs": (
        "q, s, z = DynamicQuantizeLinear(f) y = com.microsoft.MatMulIntegerToFloat(q, Wt, s, ws, z, z8)",
        ("float[1,12] f", "float[1,8] y"),
        "y = int8, as int8, x when it runs",
        ["y = SparseLinear(f)"],
    ),
    "as ONNX Runtime's tool writes it": (
        f"{DYNAMIC} m = Mul(s, ws) k = Mul(c, m) h = Add(k, b) y = Relu(h)",
        ("float[1,12] f", "float[1,8] y"),
        "y = int8, as int8, x when it runs",
        ["y = SparseLinear(f)"],
    ),
    "scaled one by one": (
        f"{DYNAMIC} m = Mul(ws, c) y = Mul(m, s)",
        ("float[1,12] f", "float[1,8] y"),
        "y = int8, as int8, x when it runs",
        ["y = SparseLinear(f)"],
    ),
    "scaled by X first": (
        f"{DYNAMIC} m = Mul(c, s) y = Mul(m, ws1)",
        ("float[1,12] f", "float[1,8] y"),
        "y = int8, as int8, x when it runs",
        ["y = SparseLinear(f)"],
    ),
    "a scale that something else reads": (
        f"{DYNAMIC} m = Mul(s, ws) y = Mul(c, m) o = Neg(m)",
        ("float[1,12] f", "float[1,8] y, float[8] o"),
        "p = int8 ! a product of integers whose scale is applied elsewhere; no sparse operator yet",
        None,
    ),
    "codes that something else reads": (
        f"{DYNAMIC} m = Mul(s, ws) y = Mul(c, m) o = DequantizeLinear(q, s, z)",
        ("float[1,12] f", "float[1,8] y, float[1,12] o"),
        "y = int8, as int8, x when it runs",
        ["q, s, z = DynamicQuantizeLinear(f)", "y = SparseLinear(f)", "o = DequantizeLinear(q, s, z)"],
    ),
    "never scaled": (
        "y = MatMulInteger(x, Wt, u128, z0)",
        ("uint8[n,12] x", "int32[n,8] y"),
        "y = int8 ! a product of integers whose input is neither codes of one constant scale nor of "
        "DynamicQuantizeLinear; no sparse operator yet",
        None,
    ),
    "never scaled, of codes when it runs": (
        "q, s, z = DynamicQuantizeLinear(f) y = MatMulInteger(q, Wt, z)",
        ("float[1,12] f", "int32[1,8] y"),
        "y = int8 ! a product of integers whose scale is applied elsewhere; no sparse operator yet",
        None,
    ),
    "a scale that varies": (
        "y = QLinearMatMul(x, xs, u128, Wt, ws, z8, v, u100)",
        ("uint8[n,12] x, float v", "uint8[n,8] y"),
        "y = int8 ! a product of integers whose output has no constant scale; no sparse operator yet",
        None,
    ),
    "a zero point that varies": (
        "y = com.microsoft.MatMulIntegerToFloat(x, Wt, xs, ws, v, z8)",
        ("uint8[n,12] x, uint8 v", "float[n,8] y"),
        "y = int8 ! a product of integers whose input is neither codes of one constant scale nor of "
        "DynamicQuantizeLinear; no sparse operator yet",
        None,
    ),
    "signed codes": (
        "y = QLinearMatMul(x, xs, z0, Wt, ws, z8, ys, z7)",
        ("int8[n,12] x", "int8[n,8] y"),
        "y = int8 ! a product of integers of signed codes; no sparse operator yet",
        None,
    ),
    "a scale of zero": (
        "y = com.microsoft.MatMulIntegerToFloat(x, Wt, xs, ws_zero, u128, z8)",
        ("uint8[n,12] x", "float[n,8] y"),
        "y = int8, x x 0.05 128 ! the scale of its weight is 0, expected a positive finite number",
        None,
    ),
    "a turned input": (
        "y = com.microsoft.QGemm<transA: int = 1, transB: int = 1>(x, xs, u128, W, ws, z8, bq, ys, u100)",
        ("uint8[12,n] x", "uint8[n,8] y"),
        "y = int8 ! a product of integers of a turned or multiplied input; no sparse operator yet",
        None,
    ),
}


DYNAMIC_FORMS = [name for name, (_, _, words, _) in INTEGERS.items() if "when it runs" in words]


@pytest.mark.parametrize("name", INTEGERS)
def test_products_of_integers(name: str) -> None:
    body, (inputs, outputs), words, sparse_nodes = INTEGERS[name]
    model = build(body, inputs, outputs)
    feeds = feeds_of(model)
    dense = run_dense(model, feeds)
    program = read(model)
    (layer,) = program.layers
    result = described(layer)
    assert result == words
    assert layer.fixed
    if layer.table is not None and layer.stored == "int8":
        np.testing.assert_array_equal(layer.weight, CODES.astype(np.float32) * layer.table)
    if sparse_nodes is None:
        plan = make_plan(program, CompileConfig(sparsity=0.9, prune_all=True, layer_sparsity=(("*", 0.9),)))
        assert not plan.candidates
        assert not plan.pruned
        return
    rewritten = export(program, sparse(program))
    assert [line.replace(".x_scale, y.x_zero_point", ".scale") for line in nodes(rewritten)] == [
        line.replace("x.scale", "y.scale").replace("x.dequantizelinear", "y.dequantizelinear") for line in sparse_nodes
    ]
    # Codes of X made when the model runs may differ by one where a quotient is near a tie.
    step = float(np.abs(layer.weight).max() * np.ptp([0, *feeds["f"].ravel()]) / 255) if "f" in feeds else 1e-5
    for actual, expected in zip(run(rewritten, feeds), dense, strict=True):
        assert_close(actual, expected, step)


def test_a_product_of_integers_takes_new_codes() -> None:
    """As the reference of a check does, which is dense and has the artifact's weights."""
    body, (inputs, outputs), _, _ = INTEGERS["as ONNX Runtime's tool writes it"]
    model = build(body, inputs, outputs)
    program = read(model)
    (layer,) = program.layers
    new = np.where(np.arange(12) < 8, layer.weight, 0).astype(np.float32)
    changed = onnx_ir.to_proto(export(program, {}, {layer.name: new}))
    kept = next(onnx.numpy_helper.to_array(t) for t in changed.graph.initializer if t.name.startswith("Wt"))
    np.testing.assert_array_equal(kept, np.where(np.arange(12)[:, None] < 8, CODES.T, 0))
    assert [node.op_type for node in changed.graph.node] == [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("name", DYNAMIC_FORMS)
def test_the_reference_rounds_row_by_row(name: str) -> None:
    """What the artifact is checked against, where one scale rounds all rows and the sparse operator each by its own."""
    body, (_, outputs), _, _ = INTEGERS[name]
    model = build(body, "float[3,12] f", outputs.replace("[1,", "[3,"))
    program = read(model)
    (layer,) = program.layers
    ops = sparse(program)
    reference = export(program, {}, {layer.name: layer.weight}, {}, ops)
    rows = np.random.default_rng(0).standard_normal((3, 12)) * [[1], [30], [0.01]]
    feeds = {"f": rows.astype(np.float32)}
    ours, expected = run(export(program, ops), feeds), run_dense(onnx_ir.to_proto(reference), feeds)
    for actual, right in zip(ours, expected, strict=True):
        np.testing.assert_allclose(actual, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())
    # One scale for all leaves nothing of the last row.
    assert not np.allclose(run_dense(model, feeds)[0][2], expected[0][2], rtol=1e-3, atol=0)


def test_weights_of_integer_operators_cannot_be_fitted(tmp_path: Path) -> None:
    program = read(build(INTEGERS["QGemm"][0]))
    config = CompileConfig(calib=tmp_path / "any.npz", layer_sparsity=(("*", 0.9),))
    reasons = make_plan(program, config).reasons
    assert reasons == {"y": "QGemm: its weight cannot be fitted to data; quantise the model in QDQ form for that"}


@pytest.mark.parametrize("op", ["QLinearConv", "ConvInteger"])
def test_convolutions_of_integers_are_reported(op: str) -> None:
    body = {
        "QLinearConv": "y = QLinearConv(x, xs, u128, K, ws, z8, ys, u100)",
        "ConvInteger": "y = ConvInteger(x, K, u128)",
    }[op]
    kind = "uint8" if op == "QLinearConv" else "int32"
    model = build(body, "uint8[1,3,5,5] x", f"{kind}[1,8,4,4] y")
    model.graph.initializer.append(onnx.numpy_helper.from_array(CONSTANTS["W"].reshape(8, 3, 2, 2), "K"))
    (layer,) = layers_of(model)
    assert layer.obstacle == "a convolution of integers; no sparse operator yet"
    assert layer.weight.shape == (8, 12)


def test_integer_operators_without_a_constant_weight_are_no_layers() -> None:
    assert not layers_of(build("y = MatMulInteger(x, v)", "uint8[n,12] x, int8[12,8] v", "int32[n,8] y"))


# ---- Rewriting ----


class _Sparse(OpRun):  # type: ignore[misc]
    """The operators by their definition: in codes of 8 bits where the node says so."""

    op_domain = "ai.sparsec"

    def _run(self, *inputs: Any, **a: Any) -> Any:
        x, values, indices, indptr, bias, residual, table, sums = (*inputs, None, None, None, None)[:8]
        shape, pattern = (a["out_features"], a["in_features"]), BlockPattern(a["block_rows"], a["block_cols"])
        together = DOT_INPUTS if a.get("products") else 1
        kind, shared = (Floats(), np.zeros(0)) if table is None else (Int8(), table.reshape(-1, 1))
        matrix = SparseMatrix(pattern, shape, values, indices, indptr, kind, shared, together=together)
        if a.get("products"):
            assert x.dtype == (np.uint8 if a["x"] == "uint8" else np.float32)
            whole = np.rint(matrix.to_dense().astype(np.float64) / matrix.table)
            np.testing.assert_array_equal(sums, whole.sum(axis=1))

            def product(x: np.ndarray, grid: Grid) -> np.ndarray:
                codes = x if a["x"] == "uint8" else np.rint(grid.round(x) / np.float32(grid.scale)) + grid.zero_point
                exact = codes.astype(np.int64) @ whole.T.astype(np.int64) - sums * grid.zero_point
                return exact.astype(np.float32) * (matrix.table[:, 0] * np.float32(grid.scale))

            if a["x"] == "dynamic":
                y = np.concatenate([product(row[None], Grid.spanning(row.min(), row.max())) for row in x])
            else:
                y = product(x, Grid(a["x_scale"], a["x_zero_point"]))
        else:
            y = x @ matrix.to_dense().T
        y = y if bias is None else y + bias
        y = np.maximum(y, 0) if a["activation"] == "relu" else y
        y = y if residual is None else y + residual
        if "y_scale" not in a:
            return (y.astype(np.float32),)
        return (np.clip(np.rint(y / np.float32(a["y_scale"])) + a["y_zero_point"], 0, 255).astype(np.uint8),)


class SparseLinear(_Sparse):
    pass


class QSparseLinear(_Sparse):
    pass


def sparse(program: Program, *names: str, pattern: str = "block:4x4") -> dict[str, SparseOp]:
    """Every layer that can be, or those named, as the compiler would have it."""
    candidates = {}
    for layer in program.layers:
        if not layer.obstacle and (not names or layer.name in names):
            form = Form(pattern, kinds_of(layer, CompileConfig())[0])
            matrix, x = pack(layer, layer.weight, form, CompileConfig())
            candidates[layer.name] = Candidate(layer, matrix, pruned=False, x=x)
    return {name: op(one) for name, one in chained(candidates).items()}


def op(one: Candidate) -> SparseOp:
    x_grid = one.layer.x_grid if one.x != "float" else None
    y_grid = one.y_grid if one.layer.y_codes is None else one.layer.y_grid
    return SparseOp(one.matrix, "kernel", 1, one.x, x_grid, y_grid)


def nodes(model: onnx_ir.Model) -> list[str]:
    """One line a node, without attributes and without what a packed weight is made of."""
    return [
        f"{', '.join(v.name or '' for v in node.outputs)} = {node.op_type}"
        f"({', '.join('' if v is None else v.name or '' for v in node.inputs[: 1 if node.domain else None])})"
        for node in model.graph
    ]


def run(model: onnx_ir.Model | onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    proto = onnx_ir.to_proto(model) if isinstance(model, onnx_ir.Model) else model
    onnx.checker.check_model(proto)
    return list(ReferenceEvaluator(proto, new_ops=[SparseLinear, QSparseLinear]).run(None, feeds))


def run_dense(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def feeds_of(model: onnx.ModelProto | onnx_ir.Model) -> dict[str, np.ndarray]:
    proto = onnx_ir.to_proto(model) if isinstance(model, onnx_ir.Model) else model
    # Of each test the same: a code that rounds the other way in one layer can move the next one's by two.
    feeds, rng = {}, np.random.default_rng(0)
    for value in proto.graph.input:
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [d.dim_value or 3 for d in value.type.tensor_type.shape.dim]
        floats = rng.standard_normal(shape).astype(np.float32)
        limits = None if kind == np.float32 else np.iinfo(kind)
        feeds[value.name] = floats if limits is None else rng.integers(limits.min, limits.max + 1, shape).astype(kind)
    return feeds


def assert_close(actual: np.ndarray, expected: np.ndarray, step: float = 0.1) -> None:
    """Within one code, or where codes are turned back one step of their grid."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    most = 1 if actual.dtype.kind in "iu" else step * 1.001
    assert np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max() <= most


def check(model: onnx.ModelProto) -> onnx_ir.Model:
    """Rewrite all layers; the outputs stay within a step, and the program untouched. The rewritten model."""
    program = read(model)
    before = onnx_ir.to_proto(program.model).SerializeToString()
    result = export(program, sparse(program))
    assert onnx_ir.to_proto(program.model).SerializeToString() == before
    feeds = feeds_of(model)
    for actual, expected in zip(run(result, feeds), run_dense(model, feeds), strict=True):
        assert_close(actual, expected)
    return result


def initializers(model: onnx_ir.Model) -> dict[str, Any]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}


def test_codes_in_and_out() -> None:
    result = check(build(PLAIN))
    assert nodes(result) == ["y = QSparseLinear(x)"]
    assert set(initializers(result)) == {"w.values", "w.indices", "w.indptr", "w.table", "w.sums", "b"}
    attributes = {name: found.value for name, found in result.graph[0].attributes.items()}
    expected = {"x": "uint8", "products": "int8", "value_type": "int8", "x_zero_point": 128, "y_zero_point": 100}
    assert expected.items() <= attributes.items()


@pytest.mark.parametrize("name", [*FOUND])
def test_every_form_computes_the_same(name: str) -> None:
    result = check(build(FOUND[name][0]))
    wanted = ["a = DequantizeLinear(x)", "y = QSparseLinear(a)"] if name == "asymmetric" else ["y = QSparseLinear(x)"]
    assert [line.replace("x, xs, u128", "x") for line in nodes(result)] == wanted


@pytest.mark.parametrize("name", NOT_ALL)
def test_forms_with_fewer_codes_compute_the_same(name: str) -> None:
    inputs, body, _ = NOT_ALL[name]
    kind = "int8" if name == "signed Y returned" else "uint8"
    check(build(body, inputs, f"{kind}[n,8] y"))


SECOND = (
    "c = DequantizeLinear(y, ys, u100) v = DequantizeLinear(W2, ws_small, z0) k = Gemm<transB: int = 1>(c, v) "
    "z = QuantizeLinear(k, ys, u128)"
)


def test_codes_go_from_layer_to_layer() -> None:
    result = check(build(f"{PLAIN} {SECOND}", outputs="uint8[n,12] z"))
    assert nodes(result) == ["y = QSparseLinear(x)", "z = QSparseLinear(y)"]


def test_codes_that_others_read_stay() -> None:
    """A DequantizeLinear with another reader is kept, one without goes; so are its constants."""
    result = check(
        build(
            f"{PLAIN} o = Relu(a) e = DequantizeLinear(y, ys, u100)",
            outputs="uint8[n,8] y, float[n,12] o, float[n,8] e",
        )
    )
    assert nodes(result) == [
        "a = DequantizeLinear(x, xs, u128)",
        "y = QSparseLinear(x)",
        "o = Relu(a)",
        "e = DequantizeLinear(y, ys, u100)",
    ]
    assert {"xs", "u128", "ys", "u100"} < set(initializers(result))


def test_signed_codes_become_unsigned_ones() -> None:
    model = build(SIGNED, *FLOATS)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("q", onnx.TensorProto.INT8, [None, 12]))
    result = check(model)
    assert nodes(result) == [
        "q = QuantizeLinear(x, xs, z7.unsigned)",
        "p = QSparseLinear(q)",
        "y = DequantizeLinear(p, ys, z0.unsigned)",
    ]
    shifted = {name: array for name, array in initializers(result).items() if name.startswith("z")}
    assert {name: (array.dtype.name, int(array)) for name, array in shifted.items()} == {
        "z7.unsigned": ("uint8", 135),
        "z0.unsigned": ("uint8", 128),
    }


def test_other_readers_of_signed_codes_are_shifted_with_them() -> None:
    body = f"{SIGNED} o = Relu(d) d = DequantizeLinear(q, xs, z7) m = QuantizeLinear(o, xs, z7)"
    body = body.replace("o = Relu(d) d = DequantizeLinear(q, xs, z7)", "d = DequantizeLinear(q, xs, z7) o = Relu(d)")
    result = check(build(body, FLOATS[0], "float[n,8] y, int8[n,12] m"))
    assert nodes(result) == [
        "q = QuantizeLinear(x, xs, z7.unsigned)",
        "p = QSparseLinear(q)",
        "y = DequantizeLinear(p, ys, z0.unsigned)",
        "d = DequantizeLinear(q, xs, z7.unsigned)",
        "o = Relu(d)",
        "m = QuantizeLinear(o, xs, z7)",
    ]


def test_signed_codes_of_others_are_rounded_again_to_the_same() -> None:
    inputs, body, _ = NOT_ALL["signed X from outside"]
    result = check(build(body, inputs))
    assert nodes(result) == ["a = DequantizeLinear(x, xs, z7)", "y = QSparseLinear(a)"]
    assert result.graph[1].attributes["x"].value == "static"


def test_codes_are_turned_where_the_weight_stands_on_the_left() -> None:
    result = check(build(f"{X} {WEIGHT} h = MatMul(w, a) {Y}", "uint8[12,5] x", "uint8[8,5] y"))
    assert nodes(result) == [
        "x.transposed = Transpose(x)",
        "y.transposed = QSparseLinear(x.transposed)",
        "y = Transpose(y.transposed)",
    ]


def test_layers_that_stay_keep_every_byte() -> None:
    program = read(build(f"{PLAIN} {SECOND}", outputs="uint8[n,12] z"))
    result = export(program, sparse(program, "h"))
    assert nodes(result)[1:] == [
        "c = DequantizeLinear(y, ys, u100)",
        "v = DequantizeLinear(W2, ws_small, z0)",
        "k = Gemm(c, v)",
        "z = QuantizeLinear(k, ys, u128)",
    ]


def test_a_result_of_codes_needs_a_grid() -> None:
    program = read(build(PLAIN))
    (layer,) = program.layers
    matrix, x = pack(layer, layer.weight, Form("block:4x4", Int8()), CompileConfig())
    with pytest.raises(ValueError, match="layer 'h': its output is codes, expected a grid for them"):
        export(program, {"h": SparseOp(matrix, "kernel", 1, x, layer.x_grid)})


# ---- New weights in layers that stay dense ----


@pytest.mark.parametrize("body", [PLAIN, PLAIN.replace("W, ws, z8", "Wa, ws, u8").replace("<axis: int = 0>", "")])
def test_pruned_weights_stay_codes(body: str) -> None:
    model = build(body.replace("Wa, ws, u8", "Wa, ws1, u100"))
    program = read(model)
    (layer,) = program.layers
    pruned = prune_by_norm(layer.weight, BlockPattern(4, 4), 0.7)
    result = export(program, {}, {"h": pruned})
    weights = initializers(result)
    assert [name for name in weights if name.startswith("W")] == []
    assert weights["w.pruned"].dtype == (np.int8 if "W, ws" in body else np.uint8)
    assert [node.op_type for node in result.graph] == [node.op_type for node in program.model.graph]
    (found,) = read(onnx_ir.to_proto(result)).layers
    np.testing.assert_array_equal(found.weight, pruned)
    assert describe(found) == describe(layer)


def test_weights_that_are_no_codes_become_floats() -> None:
    program = read(build(PLAIN))
    weight = program.layers[0].weight * np.float32(1.001)
    result = export(program, {}, {"h": weight})
    np.testing.assert_array_equal(initializers(result)["w.pruned"], weight)
    assert "W" not in initializers(result)


# ---- One layer alone ----


@pytest.mark.parametrize(
    ("body", "ends", "x", "y", "operators"),
    [
        (
            PLAIN,
            ("uint8[n,12] x", "uint8[n,8] y"),
            ("x", "uint8"),
            ("y", "uint8"),
            "DequantizeLinear Gemm QuantizeLinear",
        ),
        (SIGNED, FLOATS, ("q", "uint8"), ("p", "uint8"), "DequantizeLinear Gemm QuantizeLinear"),
        (
            NOT_ALL["signed X from outside"][1],
            ("int8[n,12] x", "uint8[n,8] y"),
            ("x", "int8"),
            ("y", "uint8"),
            "DequantizeLinear Gemm QuantizeLinear",
        ),
        (
            NOT_ALL["signed Y returned"][1],
            ("uint8[n,12] x", "int8[n,8] y"),
            ("x", "uint8"),
            ("y", "int8"),
            "DequantizeLinear Gemm QuantizeLinear",
        ),
        (
            NOT_ALL["X of floats"][1],
            ("float[n,12] a", "uint8[n,8] y"),
            ("a", "float"),
            ("y", "uint8"),
            "Gemm QuantizeLinear",
        ),
        (
            NOT_ALL["Y read twice"][1],
            ("uint8[n,12] x", "uint8[n,8] y"),
            ("x", "uint8"),
            ("h", "float"),
            "DequantizeLinear Gemm",
        ),
    ],
    ids=["unsigned", "signed", "signed from outside", "signed returned", "X of floats", "Y read twice"],
)
def test_a_layer_alone_takes_and_makes_codes(
    body: str, ends: tuple[str, str], x: tuple[str, str], y: tuple[str, str], operators: str
) -> None:
    """Dense and sparse have the same inputs and outputs; of the dense one ONNX Runtime makes a product of integers."""
    program = read(build(body, *ends))
    (layer,) = program.layers
    dense, rewritten = (layer_model(program, layer, 3, op) for op in (None, sparse(program)[layer.name]))
    for model in (dense, rewritten):
        for (value,), (name, kind), size in ((model.graph.inputs, x, 12), (model.graph.outputs, y, 8)):
            assert (value.name, value.dtype.name.lower(), value.shape.numpy()) == (name, kind, (3, size))
    chain = [node.op_type for node in dense.graph if node.outputs[0].name != "w"]
    assert " ".join(chain) == operators
    feeds = feeds_of(dense)
    for actual, expected in zip(run(rewritten, feeds), run_dense(onnx_ir.to_proto(dense), feeds), strict=True):
        assert_close(actual, expected)


# ---- What is planned ----


def test_codes_and_scales_are_kept() -> None:
    (layer,) = read(build(PLAIN)).layers
    for config in (
        CompileConfig(),
        CompileConfig(values="codebook16"),
        CompileConfig(values="int8", activations="dynamic"),
    ):
        matrix, x = pack(layer, layer.weight, Form("block:4x4", Int8()), config)
        assert (x, matrix.kind, matrix.together) == ("uint8", Int8(), DOT_INPUTS)
        np.testing.assert_array_equal(matrix.table, SCALES[:, None])
        np.testing.assert_array_equal(matrix.to_dense(), layer.weight)
    assert pack(layer, layer.weight, Form("block:4x3", Int8()), CompileConfig())[1] == "float"
    floats = CompileConfig(values="int8", activations="float")
    assert pack(layer, layer.weight, Form("block:4x4", Int8()), floats)[1] == "float"


def test_new_weights_are_rounded_onto_the_layers_own_grid() -> None:
    (layer,) = read(build(PLAIN)).layers
    new = np.where(KEEP, layer.weight * 0.9 + 0.001, 0).astype(np.float32)
    matrix, _ = pack(layer, new, Form("block:4x4", Int8()), CompileConfig())
    np.testing.assert_array_equal(matrix.table, SCALES[:, None])
    assert not matrix.to_dense()[~KEEP].any()
    assert np.abs(matrix.to_dense() - new).max() <= 0.5001 * SCALES.max()
    fitted = Int8().fit(new)
    np.testing.assert_array_equal(pack(layer, new, Form("block:4x4", Int8()), CompileConfig(), fitted)[0].table, fitted)


def test_pruning_makes_blocks_that_integers_can_be_multiplied_in() -> None:
    program = read(build(PLAIN))
    config = CompileConfig(layer_sparsity=(("*", 0.75),))
    candidate = make_plan(program, config).candidates["h"]
    assert (str(candidate.matrix.pattern), candidate.x) == ("block:16x4", "uint8")
    floats = read(build(NOT_ALL["X of floats"][1], "float[n,12] a"))
    candidate = make_plan(floats, config).candidates["h"]
    assert (str(candidate.matrix.pattern), candidate.x) == ("group:16", "float")


def test_gpus_have_no_operator_for_codes_yet() -> None:
    target = Target(CpuTarget("generic", "x86_64", 4, (), host=False), (TABLE["sm_90a"],))
    plan = make_plan(read(build(PLAIN)), CompileConfig(layer_sparsity=(("*", 0.5),)), target)
    assert plan.reasons["h"].startswith("weights of int8; their sparse operators need a CPU so far (--target cpu)")


def test_inspect_says_what_is_there(tmp_path: Path) -> None:
    onnx.save(build(f"{PLAIN} {SECOND}", outputs="uint8[n,12] z"), tmp_path / "model.onnx")
    first, second = inspect(tmp_path / "model.onnx").layers
    assert (first.op_type, first.dtype, first.shape, first.block) == ("Gemm", "int8", (8, 12), "block:4x4")
    assert first.reason.startswith("96 weights, below 16,384")
    assert second.reason.startswith("the model's last layer")
