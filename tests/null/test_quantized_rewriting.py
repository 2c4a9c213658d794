"""Models in QDQ form, rewritten: they compute the same codes, and what stays keeps every byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir
import pytest
from quantized import (
    FLOATS,
    FOUND,
    KEEP,
    NOT_ALL,
    PLAIN,
    SCALES,
    SIGNED,
    WEIGHT,
    X,
    Y,
    assert_close,
    build,
    check,
    describe,
    feeds_of,
    initializers,
    nodes,
    run,
    run_dense,
    sparse,
)

from sparsec.codegen.target import CpuTarget, Target
from sparsec.codegen.target.cuda import TABLE
from sparsec.compiler.config import CompileConfig
from sparsec.compiler.exporter import SparseOp, export, layer_model
from sparsec.compiler.formats import Form, pack
from sparsec.compiler.frontend import read
from sparsec.compiler.inspect import inspect
from sparsec.compiler.plan import make_plan
from sparsec.ir import BlockPattern
from sparsec.ir.sparse_matrix import DOT_INPUTS
from sparsec.ir.values import Int8
from sparsec.passes.prune import prune_by_norm

if TYPE_CHECKING:
    from pathlib import Path


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
