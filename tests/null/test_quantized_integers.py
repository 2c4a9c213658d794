"""Operators on integers: their layers, and the sparse operators in their places."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir
import pytest
from quantized import CODES, assert_close, build, described, feeds_of, nodes, run, run_dense, sparse

from sparsec.compiler.config import CompileConfig
from sparsec.compiler.exporter import export
from sparsec.compiler.frontend import read
from sparsec.compiler.plan import make_plan

if TYPE_CHECKING:
    from pathlib import Path


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
