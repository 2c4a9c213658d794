"""Models of 16-bit numbers from end to end, without a kernel: what is planned for them, and what would be written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import pytest

from sparsec.codegen.target import CpuTarget, Target, parse_target
from sparsec.codegen.target.cuda import TABLE
from sparsec.compiler.config import CompileConfig
from sparsec.compiler.exporter import SparseOp, export, save
from sparsec.compiler.frontend import read
from sparsec.compiler.inspect import inspect
from sparsec.compiler.plan import make_plan
from sparsec.ir import Activation, SparseMatrix, parse_pattern
from sparsec.ir.values.floats import DTYPES, Floats
from sparsec.models.lstm_lm import lstm_lm
from sparsec.models.mlp import ffn, mlp
from sparsec.models.transformer import EncoderConfig, encoder
from sparsec.passes.prune import prune_by_norm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HALVES = ["float16", "bfloat16"]
CPU = Target(CpuTarget("generic", "x86_64", 4, (), host=False))
GPU = Target(CPU.cpu, (TABLE["sm_90a"],))
PRUNE = CompileConfig(sparsity=0.8, pattern="block:64x16")
MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "mlp": lambda: mlp((128, 256, 128, 10)),
    "ffn": lambda: ffn(128, 256, 128),
    "encoder": lambda: encoder(EncoderConfig(layers=1, hidden=128, heads=4, ffn=256, vocabulary=50, positions=64)),
}


def narrow(model: onnx.ModelProto, dtype: str) -> onnx.ModelProto:
    """`model` with every float32 as `dtype`, as converters make it: finite numbers stay finite."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(DTYPES[dtype])
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)

    def convert(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = np.clip(onnx.numpy_helper.to_array(tensor), -largest, largest)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(DTYPES[dtype]), tensor.name))

    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    for tensor in model.graph.initializer:
        convert(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "value":
                convert(attribute.t)
            elif node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = kind
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_end_to_end(name: str, dtype: str, tmp_path: Path) -> None:
    """Read, pruned, packed, written: valid ONNX that holds the pruned weights exactly."""
    program = read(narrow(MODELS[name](), dtype))
    wide = read(MODELS[name]())
    assert [layer.epilogue for layer in program.layers] == [layer.epilogue for layer in wide.layers]
    assert {layer.dtype for layer in program.layers} == {dtype}
    plan = make_plan(program, PRUNE, GPU)
    assert plan.candidates.keys() == make_plan(wide, PRUNE, GPU).candidates.keys()
    assert plan.candidates
    ops = {name: SparseOp(candidate.matrix, "kernel", 1) for name, candidate in plan.candidates.items()}
    save(export(program, ops), tmp_path / "model.onnx")
    written = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(written, full_check=True)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    for node in written.graph.node:
        if node.op_type != "SparseLinear":
            continue
        layer = plan.candidates[node.name].layer
        values, indices, indptr = (tensors[tensor] for tensor in node.input[1:4])
        assert values.dtype == tensors[node.input[4]].dtype == DTYPES[dtype]
        stored = SparseMatrix(
            parse_pattern(PRUNE.pattern), layer.weight.shape, values, indices, indptr, Floats(dtype), dtype=dtype
        )
        expected = prune_by_norm(layer.weight, parse_pattern(PRUNE.pattern), 0.8)
        np.testing.assert_array_equal(stored.to_dense(), expected)
        np.testing.assert_array_equal(tensors[node.input[4]].astype(np.float32), layer.bias)


@pytest.mark.parametrize("dtype", HALVES)
def test_gelu_of_an_encoder_is_fused(dtype: str) -> None:
    layers = read(narrow(MODELS["encoder"](), dtype)).layers
    assert [layer.epilogue.activation for layer in layers].count(Activation.GELU) == 1


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bits_stay_dense_on_a_cpu(dtype: str) -> None:
    program = read(narrow(mlp((128, 256, 128, 10)), dtype))
    plan = make_plan(program, PRUNE, CPU)
    words = f"{dtype} weights; their sparse operators need a GPU (--target cuda:sm_90)"
    assert (plan.candidates, set(plan.reasons.values())) == ({}, {words})
    assert make_plan(read(mlp((128, 256, 128, 10))), PRUNE, CPU).candidates


@pytest.mark.parametrize("dtype", HALVES)
def test_zeros_of_16_bits_are_kept(dtype: str) -> None:
    """Found in the shape that they have, told where they cannot be used."""
    model = mlp((128, 256, 10))
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
    pruned = prune_by_norm(weight, parse_pattern("block:64x16"), 0.75)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(pruned, model.graph.initializer[0].name))
    program = read(narrow(model, dtype))
    (candidate,) = make_plan(program, CompileConfig(), GPU).candidates.values()
    assert str(candidate.matrix.pattern) == "block:64x16"
    assert not candidate.pruned
    np.testing.assert_array_equal(candidate.matrix.to_dense(), program.layers[0].weight)
    assert candidate.matrix.swizzled
    assert "(75.0% zeros in block:64x16, 25.0% stored)" in make_plan(program, CompileConfig(), CPU).reasons["/fc1/Gemm"]


@pytest.mark.parametrize("dtype", HALVES)
def test_bytes_are_those_of_the_graph(dtype: str) -> None:
    program = read(narrow(mlp((128, 256, 10)), dtype))
    assert [layer.nbytes for layer in program.layers] == [2 * 128 * 256, 2 * 256 * 10]
    dense = program.model.graph.initializers["fc1.weight"].const_value
    assert dense is not None
    assert program.layers[0].nbytes == dense.nbytes
    matrix = make_plan(program, PRUNE, GPU).candidates["/fc1/Gemm"].matrix
    assert matrix.nbytes < program.layers[0].nbytes / 4


@pytest.mark.parametrize("dtype", HALVES)
def test_dense_layers_of_16_bits_can_be_pruned_too(dtype: str) -> None:
    """`prune_all` on a CPU: linear layers that stay dense."""
    program = read(narrow(mlp((128, 256, 10)), dtype))
    config = PRUNE.model_copy(update={"prune_all": True})
    weight = make_plan(program, config, parse_target("cpu")).pruned["/fc1/Gemm"].weight
    again = read(onnx_ir.to_proto(export(program, {}, {"/fc1/Gemm": weight})))
    np.testing.assert_array_equal(again.layers[0].weight, weight)
    assert again.layers[0].dtype == dtype


def test_other_layers_say_what_they_are_in_any_type() -> None:
    program = read(narrow(lstm_lm(vocabulary=50, embedding=16, hidden=16), "float16"))
    assert "a recurrent layer; no sparse operator yet" in make_plan(program, PRUNE, GPU).reasons.values()


def test_inspect_says_where_16_bits_can_be_sparse(tmp_path: Path) -> None:
    for dtype in DTYPES:
        onnx.save(narrow(mlp((128, 256, 10)), dtype), tmp_path / "m.onnx")
        summary = inspect(tmp_path / "m.onnx")
        first = summary.layers[0]
        assert (first.dtype, first.outlook, summary.inputs[0].dtype) == (dtype, "prune", dtype)
        assert ("for GPUs only" in first.reason) == (dtype != "float32")
