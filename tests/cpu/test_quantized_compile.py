"""Models that ONNX Runtime quantised, the whole way: what becomes sparse multiplies their own codes, the rest stays."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

import sparsec
from sparsec.compiler import runtime
from sparsec.compiler.config import Tune
from sparsec.compiler.exporter import layer_model
from sparsec.compiler.frontend import read
from sparsec.compiler.runtime import Comparison
from sparsec.models.mlp import mlp
from sparsec.models.transformer import EncoderConfig, encoder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Feeds = dict[str, NDArray[Any]]

ASSETS = Path(__file__).resolve().parents[2].parent / "shared" / "assets" / "models"
WIDTHS = (128, 256, 128)
ENCODER = EncoderConfig(layers=1, hidden=64, heads=2, ffn=256, vocabulary=50, positions=32)


@pytest.fixture(autouse=True)
def _sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings that do not depend on how busy the machine is: sparse is twice as fast as dense."""
    monkeypatch.setattr(runtime, "compare", lambda dense, sparse, pairs=7: Comparison(2.0, 1.0, 2.0, (2.0, 2.0)))


class Data(CalibrationDataReader):  # type: ignore[misc]
    """Some feeds, once."""

    def __init__(self, feeds: list[Feeds]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> Feeds | None:
        return next(self._left, None)


def numbers(seed: int = 0) -> Feeds:
    return {"input": np.random.default_rng(seed).standard_normal((16, WIDTHS[0])).astype(np.float32)}


def tokens(seed: int = 0) -> Feeds:
    ids = np.random.default_rng(seed).integers(0, 50, (2, 16))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def in_blocks(model: onnx.ModelProto, rows: int, cols: int, zeros: float = 0.9) -> onnx.ModelProto:
    """`model` with whole blocks of its weights [out, in] (MatMul's: [in, out]) set to zero."""
    rng = np.random.default_rng(0)
    read_by = {name: node.op_type for node in model.graph.node for name in node.input}
    for tensor in model.graph.initializer:
        if read_by.get(tensor.name) in ("Gemm", "MatMul") and len(tensor.dims) == 2:
            array = onnx.numpy_helper.to_array(tensor)
            block = (rows, cols) if read_by[tensor.name] == "Gemm" else (cols, rows)
            keep = rng.random([-(-size // side) for size, side in zip(array.shape, block, strict=True)]) >= zeros
            mask = np.kron(keep, np.ones(block))[: array.shape[0], : array.shape[1]]
            tensor.CopyFrom(onnx.numpy_helper.from_array((array * mask).astype(np.float32), tensor.name))
    return model


def quantized(model: onnx.ModelProto, folder: Path, feeds: list[Feeds], **options: Any) -> onnx.ModelProto:
    """By ONNX Runtime's own tool, in QDQ form with scales by output unless `options` say otherwise."""
    onnx.save(model, folder / "float.onnx")
    given = {"quant_format": QuantFormat.QDQ, "per_channel": True, "activation_type": QuantType.QUInt8} | options
    logging.disable(logging.WARNING)
    try:
        quantize_static(folder / "float.onnx", folder / "quantized.onnx", Data(feeds), **given)
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load(folder / "quantized.onnx")


def compiled(model: onnx.ModelProto | Path, tmp_path: Path, **options: Any) -> sparsec.CompiledModel:
    given = {"tune": Tune.OFF, "threads": 2, "survey": False, "cache": tmp_path / "cache"} | options
    return sparsec.compile(model, sparsec.CompileConfig(**given))


def run_dense(model: onnx.ModelProto | Path, feeds: Feeds) -> NDArray[Any]:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def run(result: sparsec.CompiledModel, feeds: Feeds) -> NDArray[Any]:
    return next(iter(result.run(feeds).values()))


def written(result: sparsec.CompiledModel) -> onnx.ModelProto:
    return onnx.load(result._folder / "model.onnx")


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def constant(model: onnx.ModelProto, name: str) -> NDArray[Any]:
    return next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)


def steps(model: onnx.ModelProto, actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference, in steps of the model's last grid."""
    scale = constant(model, model.graph.node[-1].input[1])
    return float(np.abs(actual - expected).max() / scale)


@pytest.mark.parametrize("per_channel", [True, False], ids=["by output", "one scale"])
@pytest.mark.parametrize("kind", [QuantType.QUInt8, QuantType.QInt8], ids=["uint8", "int8"])
def test_sparse_products_of_the_models_own_codes(tmp_path: Path, kind: QuantType, per_channel: bool) -> None:
    options = {"activation_type": kind, "per_channel": per_channel}
    model = quantized(in_blocks(mlp(WIDTHS), 32, 4), tmp_path, [numbers(seed) for seed in range(4)], **options)
    result = compiled(model, tmp_path, batch=(1, 16))
    for decision in result.report.decisions:
        assert (decision.choice, decision.pattern, decision.pruned) == ("sparse", "block:32x4", False)
        assert (decision.values, decision.inputs, decision.bytes_dense) == ("int8", "uint8", 128 * 256)
        assert decision.bytes_sparse < decision.bytes_dense / 4
    assert operators(written(result)) == ["QuantizeLinear", "QSparseLinear", "QSparseLinear", "DequantizeLinear"]
    assert result.report.bytes_after < result.report.bytes_before / 2
    for seed in range(5, 8):
        assert steps(model, run(result, numbers(seed)), run_dense(model, numbers(seed))) < 1.01
    # Codes and scales are the model's, not fitted anew.
    scales = constant(written(result), "fc1.weight_DequantizeLinear_Output.table")
    np.testing.assert_array_equal(scales, np.broadcast_to(constant(model, "fc1.weight_scale"), 256))


def test_a_model_without_zeros_leaves_as_it_came(tmp_path: Path) -> None:
    model = quantized(mlp(WIDTHS), tmp_path, [numbers()])
    result = compiled(model, tmp_path)
    assert {decision.choice for decision in result.report.decisions} == {"dense"}
    assert operators(written(result)) == operators(model)
    np.testing.assert_array_equal(run(result, numbers(1)), run_dense(model, numbers(1)))


def test_asymmetric_weights_stay_floats(tmp_path: Path) -> None:
    """No int8 without zero point holds them: the weight becomes float32, and the result is rounded to codes at once."""
    model = quantized(in_blocks(mlp(WIDTHS), 32, 4), tmp_path, [numbers(seed) for seed in range(4)])
    for tensor in model.graph.initializer:
        if tensor.name.startswith("fc") and tensor.name.endswith("weight_quantized"):
            codes = onnx.numpy_helper.to_array(tensor).astype(np.int16)
            tensor.CopyFrom(onnx.numpy_helper.from_array((codes + 137).clip(0, 255).astype(np.uint8), tensor.name))
        elif tensor.name.startswith("fc") and tensor.name.endswith("weight_zero_point"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tensor.dims, 137, np.uint8), tensor.name))
    # A code of 0 would be -137, which no int8 is.
    weight = next(t for t in model.graph.initializer if t.name == "fc1.weight_quantized")
    codes = onnx.numpy_helper.to_array(weight).copy()
    codes[codes != 137] = np.where(np.arange((codes != 137).sum()) % 50, codes[codes != 137], 0)
    weight.CopyFrom(onnx.numpy_helper.from_array(codes, weight.name))
    result = compiled(model, tmp_path)
    first, second = result.report.decisions
    assert (first.values, first.inputs) == ("fp32", "float")
    assert (second.values, second.inputs) == ("int8", "uint8")
    wanted = ["QuantizeLinear", "DequantizeLinear", "QSparseLinear", "QSparseLinear", "DequantizeLinear"]
    assert operators(written(result)) == wanted
    assert steps(model, run(result, numbers(9)), run_dense(model, numbers(9))) < 2.01


def test_pruning_keeps_the_grid(tmp_path: Path) -> None:
    model = quantized(mlp(WIDTHS), tmp_path, [numbers(seed) for seed in range(4)])
    result = compiled(model, tmp_path, layer_sparsity=(("*", 0.75),))
    for decision in result.report.decisions:
        assert (decision.choice, decision.pattern, decision.inputs) == ("sparse", "block:16x4", "uint8")
        assert decision.zeros_after == pytest.approx(0.75, abs=0.02)
    assert result.report.verification is not None
    assert result.report.verification.error < 0.01
    # The same model with the same codes set to zero.
    for name in ("fc1", "fc2"):
        tensor = next(t for t in model.graph.initializer if t.name == f"{name}.weight_quantized")
        codes = onnx.numpy_helper.to_array(tensor)
        blocks = codes.reshape(codes.shape[0] // 16, 16, codes.shape[1] // 4, 4).transpose(0, 2, 1, 3)
        scaled = blocks * constant(model, f"{name}.weight_scale").reshape(-1, 1, 16, 1)
        norms = np.square(scaled, dtype=np.float64).sum(axis=(2, 3))
        keep = norms >= np.sort(norms, axis=None)[-norms.size // 4]
        pruned = (blocks * keep[:, :, None, None]).transpose(0, 2, 1, 3).reshape(codes.shape)
        tensor.CopyFrom(onnx.numpy_helper.from_array(pruned.astype(np.int8), tensor.name))
    assert steps(model, run(result, numbers(9)), run_dense(model, numbers(9))) < 1.01


def test_an_encoder(tmp_path: Path) -> None:
    """Products of three axes, weights [in, out], codes that several layers read."""
    model = quantized(in_blocks(encoder(ENCODER), 16, 4), tmp_path, [tokens(seed) for seed in range(3)])
    named = (("*query*", 0.01), ("*key*", 0.01))
    result = compiled(model, tmp_path, dims={"sequence": 16}, layer_sparsity=named)
    chosen = [(d.choice, d.inputs) for d in result.report.decisions if "below 16,384 weights" not in d.reason]
    assert chosen.count(("sparse", "uint8")) == 4
    expected = run_dense(model, tokens(7))
    assert np.abs(run(result, tokens(7)) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["resnet20_cifar10_int8_qdq", "squeezenet_dc_sparse_int8_qdq"])
def test_models_of_convolutions(tmp_path: Path, name: str) -> None:
    path = ASSETS / f"{name}.onnx"
    if not path.exists():
        pytest.skip("the shared models are not here")
    model = onnx.load(path)
    (x,) = model.graph.input
    shape = [2, *(dim.dim_value for dim in x.type.tensor_type.shape.dim[1:])]
    feeds = {x.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    result = compiled(path, tmp_path)
    np.testing.assert_array_equal(run(result, feeds), run_dense(path, feeds))
    assert operators(written(result)) == operators(model)
    # Pruned but dense, it stays in 8 bits.
    pruned = compiled(path, tmp_path, sparsity=0.5, prune_all=True)
    assert sum(decision.pruned for decision in pruned.report.decisions) > 1
    assert operators(written(pruned)) == operators(model)
    assert pruned.report.bytes_after < result.report.bytes_after * 1.05


def of_integer_operators(source: onnx.ModelProto, folder: Path, feeds: list[Feeds], form: str) -> onnx.ModelProto:
    """`source` in the forms of ONNX Runtime's tool that are not QDQ."""
    if form == "operators":
        return quantized(source, folder, feeds, quant_format=QuantFormat.QOperator, per_channel=False)
    onnx.save(source, folder / "float.onnx")
    quantize_dynamic(folder / "float.onnx", folder / "quantized.onnx", per_channel=True)
    return onnx.load(folder / "quantized.onnx")


@pytest.mark.parametrize("form", ["dynamic", "operators"])
def test_integer_operators(tmp_path: Path, form: str) -> None:
    model = of_integer_operators(in_blocks(mlp(WIDTHS), 32, 4), tmp_path, [numbers(seed) for seed in range(4)], form)
    result = compiled(model, tmp_path, batch=(1, 16))
    for decision in result.report.decisions:
        assert (decision.choice, decision.pattern, decision.pruned) == ("sparse", "block:32x4", False)
        assert (decision.values, decision.inputs) == ("int8", "dynamic" if form == "dynamic" else "uint8")
    ours = {"dynamic": ["SparseLinear", "SparseLinear"], "operators": ["QuantizeLinear", "QSparseLinear"]}
    assert operators(written(result))[:2] == ours[form]
    expected, actual = run_dense(model, numbers(9)), run(result, numbers(9))
    # A scale of their own makes rows of X finer, never coarser.
    assert np.abs(actual - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("form", ["dynamic", "operators"])
def test_integer_operators_are_pruned_in_their_own_codes(tmp_path: Path, form: str) -> None:
    model = of_integer_operators(mlp(WIDTHS), tmp_path, [numbers(seed) for seed in range(4)], form)
    result = compiled(model, tmp_path, layer_sparsity=(("*", 0.75),))
    for decision in result.report.decisions:
        assert (decision.choice, decision.pattern, decision.values) == ("sparse", "block:16x4", "int8")
        assert decision.zeros_after == pytest.approx(0.75, abs=0.02)
    assert result.report.verification is not None
    assert result.report.verification.error < 0.02


@pytest.mark.parametrize("form", ["dynamic", "operators"])
def test_integer_operators_without_zeros_leave_as_they_came(tmp_path: Path, form: str) -> None:
    model = of_integer_operators(mlp(WIDTHS), tmp_path, [numbers()], form)
    result = compiled(model, tmp_path)
    assert operators(written(result)) == operators(model)
    np.testing.assert_array_equal(run(result, numbers(3)), run_dense(model, numbers(3)))


def test_an_encoder_that_rounds_when_it_runs(tmp_path: Path) -> None:
    """One DynamicQuantizeLinear before three layers; activations behind the scales."""
    model = of_integer_operators(in_blocks(encoder(ENCODER), 16, 4), tmp_path, [tokens()], "dynamic")
    named = (("*query*", 0.01), ("*key*", 0.01), ("*value*", 0.01))
    result = compiled(model, tmp_path, dims={"sequence": 16}, layer_sparsity=named)
    chosen = [(d.choice, d.inputs) for d in result.report.decisions if "below 16,384 weights" not in d.reason]
    assert chosen.count(("sparse", "dynamic")) >= 4
    expected = run_dense(model, tokens(7))
    assert np.abs(run(result, tokens(7)) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("kind", [QuantType.QUInt8, QuantType.QInt8], ids=["uint8", "int8"])
def test_the_dense_side_multiplies_integers(tmp_path: Path, kind: QuantType) -> None:
    """A layer timed alone is what ONNX Runtime makes of it in the whole model."""
    model = quantized(mlp(WIDTHS), tmp_path, [numbers()], activation_type=kind)
    program = read(model)
    for layer in program.layers:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 4
        alone = onnx_ir.to_proto(layer_model(program, layer, 16)).SerializeToString()
        onnxruntime.InferenceSession(alone, options, providers=["CPUExecutionProvider"])
        assert operators(onnx.load(tmp_path / "optimised.onnx")) == ["QGemm"]
