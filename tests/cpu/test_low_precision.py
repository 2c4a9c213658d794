"""Few bits, from the model to the artifact: values, activations, chains, and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.compiler import cli, runtime
from sparsec.compiler.cli.result import _facts
from sparsec.compiler.config import Tune
from sparsec.compiler.runtime import Comparison
from sparsec.ir import SparsecError, UsageError
from sparsec.models.mlp import mlp

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MODEL = mlp((96, 128, 128))
RNG = np.random.default_rng(0)
X = (RNG.standard_normal((160, 24)) @ RNG.standard_normal((24, 96)) / 24**0.5).astype(np.float32)
# The hidden layer and, because it is named, the last one.
ALL = (("*", 0.7),)


@pytest.fixture(autouse=True)
def _sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings that do not depend on how busy the machine is: sparse is twice as fast as dense."""
    monkeypatch.setattr(runtime, "compare", lambda dense, sparse, pairs=7: Comparison(2.0, 1.0, 2.0, (2.0, 2.0)))


@pytest.fixture
def data(tmp_path: Path) -> str:
    np.savez(tmp_path / "x.npz", input=X)
    return str(tmp_path / "x.npz")


def compiled(tmp_path: Path, **options: Any) -> sparsec.CompiledModel:
    given = {"layer_sparsity": ALL, "pattern": "block:16x4", "tune": Tune.OFF, "threads": 2} | options
    return sparsec.compile(MODEL, sparsec.CompileConfig(cache=tmp_path / "cache", **given))


def dense(x: NDArray[Any], model: onnx.ModelProto = MODEL) -> NDArray[Any]:
    session = runtime.open_session(model.SerializeToString(), 2)
    return np.asarray(session.run(None, {"input": x})[0])


def distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def nodes(result: sparsec.CompiledModel) -> list[onnx.NodeProto]:
    return list(onnx.load(result._folder / "model.onnx").graph.node)


@pytest.mark.parametrize("values", ["bf16", "int8", "int8:32", "codebook256", "codebook16"])
def test_values_alone(tmp_path: Path, values: str) -> None:
    """The artifact is the dense model with its own stored weights, and these are near those of float32."""
    result, plain = compiled(tmp_path, values=values), compiled(tmp_path)
    assert result.report.verification is not None
    assert result.report.verification.error < 1e-5
    assert all((d.choice, d.values, d.inputs) == ("sparse", values, "float") for d in result.report.decisions)
    far = distance(result.run({"input": X})["output"], plain.run({"input": X})["output"])
    assert 0 < far < {"codebook16": 0.2}.get(values, 0.02)
    share = sum(d.bytes_sparse for d in result.report.decisions) / sum(d.bytes_sparse for d in plain.report.decisions)
    # Beside the values there are an index a block, and scales or a codebook.
    assert share < {"bf16": 0.55, "codebook16": 0.2, "int8:32": 0.4}.get(values, 0.35)
    assert result.report.bytes_after < plain.report.bytes_after


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_products_of_integers(tmp_path: Path, data: str, activations: str) -> None:
    calib = {"calib": data, "method": "magnitude"} if activations == "static" else {}
    result = compiled(tmp_path, values="int8", activations=activations, **calib)
    plain = compiled(tmp_path, **calib)
    assert all(d.choice == "sparse" and d.inputs != "float" for d in result.report.decisions)
    # ONNX's own quantisation of the same inputs, with the same weights; a value near a tie goes either way.
    assert result.report.verification is not None
    assert result.report.verification.error < 0.02
    assert distance(result.run({"input": X})["output"], plain.run({"input": X})["output"]) < 0.05


def test_layers_hand_over_codes(tmp_path: Path, data: str) -> None:
    result = compiled(tmp_path, values="int8", calib=data, method="magnitude")
    assert [d.inputs for d in result.report.decisions] == ["static", "uint8"]
    assert [n.op_type for n in nodes(result)] == ["QSparseLinear", "SparseLinear"]
    first, second = nodes(result)
    assert second.input[0] == first.output[0]
    a, b = ({a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in (first, second))
    assert (a["y_scale"], a["y_zero_point"]) == (b["x_scale"], b["x_zero_point"])
    # Behind a ReLU nothing is negative.
    assert a["y_zero_point"] == 0


def test_rows_by_themselves(tmp_path: Path) -> None:
    """With a scale for each row a large row leaves the others as they are."""
    result = compiled(tmp_path, values="int8", activations="dynamic")
    x = X[:8].copy()
    alone = result.run({"input": x})["output"]
    x[0] *= 1000
    np.testing.assert_array_equal(result.run({"input": x})["output"][1:], alone[1:])


def test_the_data_chooses_the_range(tmp_path: Path, data: str) -> None:
    scales = {}
    for ranges in ("minmax", "mse", "percentile", "entropy"):
        result = compiled(tmp_path, values="int8", calib=data, method="magnitude", ranges=ranges)
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes(result)[0].attribute}
        scales[ranges] = attributes["x_scale"]
    fitted = X[: len(X) * 4 // 5]
    assert scales["minmax"] == pytest.approx((fitted.max() - fitted.min()) / 255, rel=1e-2)
    assert all(scale <= scales["minmax"] * 1.001 for scale in scales.values())


def test_rounding_is_fitted_with_data(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codebooks of 16: errors of rounding are made good by the weights that follow. Few zeros, so that these matter."""
    held = X[-32:]
    wanted = dense(held)
    options = {"layer_sparsity": (("*", 0.1),), "pattern": "block:4x4", "permute": False}
    options |= {"calib": data, "method": "magnitude"}

    def error(**values: str) -> float:
        return distance(compiled(tmp_path, **options, **values).run({"input": held})["output"], wanted) ** 2

    pruned, fitted = error(), error(values="codebook16")
    # The same, with every weight rounded to the nearest.
    for module in ("compiler.budget.fitting", "compiler.calibration.repair"):
        monkeypatch.setattr(import_module(f"sparsec.{module}"), "round_weights", nearest)
    assert fitted - pruned < 0.7 * (error(values="codebook16") - pruned)


def nearest(weight: Any, mask: Any, reference: Any, statistics: Any, values: Any, table: Any) -> tuple[Any, Any]:
    assert table is None, "the layers came as floats"
    table = values.fit(weight, statistics.diagonal)
    return values.round(weight, table), table


def test_inputs_that_never_vary(tmp_path: Path) -> None:
    """Their variance, left by rounding, may be less than nothing."""
    x = X.copy()
    x[:, ::3] = np.linspace(100, 2000, x[:, ::3].shape[1], dtype=np.float32)
    np.savez(tmp_path / "still.npz", input=x)
    result = compiled(tmp_path, values="int8", calib=str(tmp_path / "still.npz"), method="magnitude")
    assert result.report.quality is not None
    assert result.report.quality.value > 0.9


def test_patterns_without_whole_fours_keep_floats(tmp_path: Path, data: str) -> None:
    result = compiled(tmp_path, values="int8", pattern="group:16", calib=data, method="magnitude")
    assert all((d.values, d.inputs) == ("int8", "float") for d in result.report.decisions)


def test_auto_pattern_has_whole_fours(tmp_path: Path, data: str) -> None:
    result = compiled(tmp_path, values="int8", pattern="auto", calib=data, method="magnitude")
    assert {d.pattern for d in result.report.decisions} == {"block:16x4"}
    assert {d.pattern for d in compiled(tmp_path, values="int8", pattern="auto").report.decisions} == {"group:16"}


@pytest.mark.parametrize("calib", [True, False])
def test_dense_int8_is_measured(tmp_path: Path, data: str, calib: bool) -> None:
    options = {"calib": data, "method": "magnitude"} if calib else {}
    result = compiled(tmp_path, values="int8", dense_baseline="int8", **options)
    assert [d.reason for d in result.report.decisions] == ["faster than dense int8"] * 2
    assert {t.baseline for d in result.report.decisions for t in d.timings} == {"int8"}
    dense_int8 = result.report.dense_int8
    assert dense_int8 is not None
    assert (dense_int8.failure, dense_int8.speedups) == ("", (2.0,))
    assert dense_int8.metric == (pytest.approx(1, abs=1e-3) if calib else None)
    lines = dict(_facts(result.report))
    assert lines["dense int8"].startswith("2.00x at batch 1")
    assert ("its accuracy was not measured" in lines["dense int8"]) is not calib
    # As fast, so not the better choice; were it faster, the table would say so.
    assert "better choice" not in lines["dense int8"]
    faster = replace(result.report, dense_int8=replace(dense_int8, speedups=(3.0,)))
    assert ("the better choice here" in dict(_facts(faster))["dense int8"]) is calib


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activations": "dynamic"}, "--activations dynamic goes with --values int8; the values are fp32"),
        ({"values": "int8", "activations": "static"}, "--activations static needs calibration data: add --calib DATA"),
        ({"values": "int8", "target": "cuda:sm_90"}, "keep the model's own type so far"),
    ],
)
def test_what_cannot_be(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compiled(tmp_path, **options)


def test_data_without_a_layer_to_use_it(tmp_path: Path, data: str) -> None:
    """Both layers are too small or the last: nothing is pruned or rounded, and the data only measures."""
    result = compiled(tmp_path, layer_sparsity=(), sparsity=0.7, values="int8", calib=data)
    assert [d.choice for d in result.report.decisions] == ["dense", "dense"]
    assert result.report.quality is not None
    assert result.report.quality.value == pytest.approx(result.report.quality.dense)


def test_the_command_says_what_is_stored(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    onnx.save(MODEL, tmp_path / "m.onnx")
    command = [str(tmp_path / "m.onnx"), "-o", str(tmp_path / "out"), "--sparsity", "*=0.7", "--calib", data]
    command += ["--values", "int8", "--tune", "off", "--method", "magnitude"]
    assert cli.main(command) == 0
    # In a narrow terminal the words stand below each other, beside the numbers.
    assert "int8" in (shown := capsys.readouterr().out)
    assert "products" in shown
    assert cli.main([*command[:-6], "--values", "int4"]) == 2
    assert "'int4' is no kind of values: expected fp32, bf16" in capsys.readouterr().err
    assert cli.main([*command, "--ranges", "widest"]) == 2
    assert "'widest' is no way to find ranges: expected mse, minmax" in capsys.readouterr().err


def test_dense_layers_that_a_codebook_holds_exactly(tmp_path: Path) -> None:
    """They become smaller and stay what they were; the others stay as they came."""
    model = onnx.ModelProto()
    model.CopyFrom(MODEL)
    table = RNG.standard_normal(40).astype(np.float32)
    few = np.where(RNG.random((128, 96)) < 0.5, np.float32(0), table[RNG.integers(0, 40, (128, 96))])
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(few, model.graph.initializer[0].name))
    config = sparsec.CompileConfig(cache=tmp_path / "cache", values="codebook256", survey=False, tune=Tune.OFF)
    result = sparsec.compile(model, config)
    first, second = result.report.decisions
    assert (first.choice, first.values, second.values) == ("dense", "codebook256", "")
    assert first.bytes_sparse < first.bytes_dense / 5
    np.testing.assert_array_equal(result.run({"input": X})["output"], dense(X, model))


def gated(tmp_path: Path, kept: bool) -> tuple[onnx.ModelProto, str]:
    """Two layers, the second of which works on the rows that an input lets through; and data where it lets none."""
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 17]>\n'
        "g (float[n,96] x, bool[n] let) => (float[n,128] y, float[m,128] z) {"
        " y = Gemm<transB: int = 1>(x, A, a) rows = Compress<axis: int = 0>(y, let)"
        " z = Gemm<transB: int = 1>(rows, B, a) }"
    )
    arrays = {"A": (128, 96), "B": (128, 128), "a": (128,)}
    for name, shape in arrays.items():
        array = RNG.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    np.savez(tmp_path / "gated.npz", x=X, let=np.full(len(X), kept))
    return model, str(tmp_path / "gated.npz")


@pytest.mark.parametrize("pruned", ["z", "*"])
def test_data_that_never_reaches_a_layer(tmp_path: Path, pruned: str) -> None:
    config = {"values": "int8", "pattern": "block:16x4", "tune": Tune.OFF, "cache": tmp_path / "cache", "threads": 2}
    config |= {"layer_sparsity": ((pruned, 0.7),), "permute": False}
    model, data = gated(tmp_path, kept=False)
    words = "nothing ever flowed into layer 'z', so its weight cannot be fitted; add samples that reach it, or leave it"
    with pytest.raises(SparsecError, match=words):
        sparsec.compile(model, sparsec.CompileConfig(calib=data, **config))
    # Nothing is needed of the data where rows are rounded by themselves.
    result = sparsec.compile(model, sparsec.CompileConfig(activations="dynamic", **config))
    assert {d.inputs for d in result.report.decisions if d.choice == "sparse"} == {"dynamic"}
    result.close()
    model, data = gated(tmp_path, kept=True)
    result = sparsec.compile(model, sparsec.CompileConfig(calib=data, **config))
    assert {d.inputs for d in result.report.decisions if d.choice == "sparse"} == {"static"}


def test_data_that_never_reaches_a_layer_that_is_kept(tmp_path: Path) -> None:
    """No weight is fitted, but a range is wanted."""
    model, data = gated(tmp_path, kept=False)
    for tensor in model.graph.initializer:
        if tensor.name in "AB":
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[:, 16:] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    config = {"values": "int8", "tune": Tune.OFF, "cache": tmp_path / "cache", "threads": 2}
    with pytest.raises(
        SparsecError, match="nothing ever flowed into layer 'z', so no range of its input is known; add"
    ):
        sparsec.compile(model, sparsec.CompileConfig(calib=data, **config))
