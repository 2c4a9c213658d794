"""Quantised models: which layers are found in them, and what is not taken."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from quantized import (
    CODES,
    CONSTANTS,
    FLOATS,
    FOUND,
    GEMM,
    NOT_ALL,
    PLAIN,
    SCALES,
    SIGNED,
    WEIGHT,
    X,
    Y,
    build,
    describe,
    layers_of,
)

from sparsec.compiler.config import CompileConfig
from sparsec.compiler.frontend import read
from sparsec.compiler.plan import make_plan
from sparsec.ir import SparsecError


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
