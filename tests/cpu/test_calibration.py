"""Calibration data: its forms, its errors, what is gathered from it, and what the solver makes of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.compiler.calibration import gather, open_samples
from sparsec.compiler.calibration.samples import BATCH, Samples
from sparsec.compiler.config import Tune
from sparsec.compiler.frontend import read
from sparsec.compiler.machine import Cpu
from sparsec.ir import SparsecError, UsageError
from sparsec.models.mlp import ffn

RNG = np.random.default_rng(0)


def session(**inputs: list[Any]) -> Any:
    values = [SimpleNamespace(name=name, shape=shape, type="tensor(float)") for name, shape in inputs.items()]
    return SimpleNamespace(get_inputs=lambda: values)


ONE = session(x=["batch", 4])
X = RNG.standard_normal((20, 4)).astype(np.float32)


def sources(folder: Path) -> dict[str, Any]:
    """The same 20 samples in every form."""
    np.savez(folder / "stacked.npz", x=X)
    np.save(folder / "x.npy", X)
    (folder / "runs").mkdir()
    for i in range(4):
        np.savez(folder / "runs" / f"{i}.npz", x=X[5 * i : 5 * i + 5])
    (folder / "loader.py").write_text(
        "import numpy as np\n"
        f"def samples():\n    for row in np.load({str(folder / 'x.npy')!r}):\n        yield {{'x': row[None]}}\n"
    )

    class Reader:
        def __init__(self) -> None:
            self.rest = list(X)

        def get_next(self) -> dict[str, Any] | None:
            return {"x": self.rest.pop(0)[None]} if self.rest else None

    return {
        "npz": folder / "stacked.npz",
        "named npy": f"x:{folder / 'x.npy'}",
        "npy of the only input": folder / "x.npy",
        "folder": folder / "runs",
        "function": f"{folder / 'loader.py'}:samples",
        "iterable": ({"x": row[None]} for row in X),
        "reader": Reader(),
        "double": [{"x": X.astype(np.float64)}],
    }


FORMS = ("npz", "named npy", "npy of the only input", "folder", "function", "iterable", "reader", "double")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples(form: str, tmp_path: Path) -> None:
    samples = open_samples(sources(tmp_path)[form], ONE, limit=100)
    assert np.array_equal(np.concatenate([feeds["x"] for feeds in samples.runs]), X)
    assert samples.count == 20
    assert all(feeds["x"].dtype == np.float32 for feeds in samples.runs)


def test_the_limit_and_the_share_held_back(tmp_path: Path) -> None:
    source = sources(tmp_path)["npz"]
    assert [len(feeds["x"]) for feeds in open_samples(source, ONE, limit=100).runs] == [BATCH, BATCH, 4]
    assert open_samples(source, ONE, limit=9).count == 2 * BATCH
    # A model of a fixed batch gets whole batches only.
    assert [len(feeds["x"]) for feeds in open_samples(source, session(x=[6, 4]), limit=100).runs] == [6, 6, 6]
    seen, held_back = open_samples(source, ONE, limit=100).split(0.2)
    assert (seen.count, held_back.count) == (16, 4)
    single = Samples("one", [{"x": X}])
    assert single.split(0.2) == (single, single)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "is empty"),
        ([{"y": X}], r"has the inputs \['y'\], the model expects \['x'\]"),
        ([{"x": X[:, :3]}], r"input 'x' is \[20, 3\], the model expects \['batch', 4\]"),
        ([{"x": X[0]}], r"input 'x' is \[4\]"),
        ([{"x": X.astype(np.complex64)}], "input 'x' is complex64, the model expects float32"),
        ([{"x": np.full((1, 4), np.nan)}], "input 'x' has NaN or infinite values"),
        ([X], "has the inputs ndarray"),
        ("missing.npz", "no such file"),
        ("x:missing.npy", "no such file"),
        ("missing.py:f", "cannot be run"),
    ],
)
def test_what_is_wrong_is_said(source: Any, words: str) -> None:
    with pytest.raises(SparsecError, match=words):
        open_samples(source, ONE, limit=10)


def test_a_file_with_other_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", y=X)
    with pytest.raises(SparsecError, match=r"has the inputs \['y'\], the model expects \['x'\]"):
        open_samples(tmp_path / "data.npz", ONE, limit=10)


def test_options_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="add --sparsity"):
        sparsec.compile(ffn(), sparsec.CompileConfig(calib=[{"x": X}]))
    with pytest.raises(UsageError, match="add --calib DATA"):
        sparsec.compile(ffn(), sparsec.CompileConfig(sparsity=0.5, method="obs"))


def test_a_loader_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "loader.py").write_text("def samples():\n    raise ValueError('no disk')\n")
    with pytest.raises(SparsecError, match=r"samples\(\) failed \(ValueError: no disk\)"):
        open_samples(f"{tmp_path / 'loader.py'}:samples", ONE, limit=10)
    with pytest.raises(SparsecError, match="has no 'other'"):
        open_samples(f"{tmp_path / 'loader.py'}:other", ONE, limit=10)


@pytest.mark.parametrize("source", ["data.csv", 7])
def test_no_form_of_data(source: Any) -> None:
    with pytest.raises(UsageError, match="calibration data"):
        open_samples(source, ONE, limit=10)


def test_a_file_for_several_inputs_needs_a_name(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(UsageError, match=r"the model has 2 inputs \(x, y\), so a .npy needs the name"):
        open_samples(tmp_path / "x.npy", session(x=["n", 4], y=["n", 4]), limit=10)


# ---- What is gathered ----


def test_second_moments_are_those_of_the_layers_inputs(tmp_path: Path) -> None:
    """Two layers that share an input share its statistics; the second's input is what the first two made."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[n,64] x) => (float[n,64] y) {
        a = MatMul(x, A)  b = MatMul(x, B)  h = Mul(a, b)  t = Transpose<perm = [1, 0]>(h)  y = Gemm<transA = 1>(t, C)
    }"""
    model = onnx.parser.parse_model(text)
    weights = {name: RNG.standard_normal((64, 64)).astype(np.float32) for name in "ABC"}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    program = read(model)
    layers = [layer for layer in program.layers if not layer.obstacle]
    x = RNG.standard_normal((50, 64)).astype(np.float32)
    samples = Samples("test", [{"x": x[:30]}, {"x": x[30:]}])
    found = gather(program, layers, samples, Cpu(1), tmp_path)
    h = (x @ weights["A"]) * (x @ weights["B"])
    inputs = [x, x, h]
    assert found.statistics[layers[0].name] is found.statistics[layers[1].name]
    for layer, expected in zip(layers, inputs, strict=True):
        statistics = found.statistics[layer.name]
        moment = statistics.hessian - statistics.damping * np.eye(64)
        exact = expected.astype(np.float64).T @ expected.astype(np.float64) / 50
        assert np.abs(moment - exact).max() < 1e-5 * np.abs(exact).max()
        assert found.rows[layer.name] == 50
        assert found.samples == 50


# ---- What comes of it ----


def test_fitted_weights_keep_more_of_the_outputs(tmp_path: Path) -> None:
    """Inputs of few directions: weights fitted to them lose far less than the same zeros by norm, on unseen data."""
    inputs = 256
    mixing = RNG.standard_normal((24, inputs)).astype(np.float32)
    x = RNG.standard_normal((240, 24)).astype(np.float32) @ mixing
    model = ffn(inputs=inputs, hidden=512, outputs=64)
    name = model.graph.input[0].name
    data = [{name: x[i : i + 8]} for i in range(0, len(x), 8)]
    worst, scarce = {}, []
    for method in ("magnitude", "obs"):
        config = sparsec.CompileConfig(
            layer_sparsity=(("/fc1/Gemm", 0.7),),
            calib=data,
            method=method,
            tune=Tune.OFF,
            prune_all=True,
            threads=2,
            cache=tmp_path,
        )
        compiled = sparsec.compile(model, config)
        fidelity = compiled.report.fidelity
        compiled.close()
        assert fidelity is not None and fidelity.held_back
        assert (fidelity.samples, fidelity.calibrated) == (48, 192)
        assert not any("accuracy was not measured" in note for note in compiled.report.notes)
        worst[method] = fidelity.worst
        scarce += [note for note in compiled.report.notes if "fewer rows" in note]
    config = config.model_copy(update={"calib": None, "method": "auto"})
    by_norm = sparsec.compile(model, config)
    expected = dense_outputs(model, x[192:])
    found = by_norm.run({name: x[192:]})
    norm = float(np.linalg.norm(next(iter(found.values())) - expected) / np.linalg.norm(expected))
    by_norm.close()
    assert len(scarce) == 2 and "'/fc1/Gemm': 192 rows, 256 inputs" in scarce[0]
    assert worst["obs"] <= worst["magnitude"] * 1.05
    assert worst["obs"] < norm / 50


def dense_outputs(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    opened = Cpu(1).open(model.SerializeToString())
    return np.asarray(opened.run(None, {opened.get_inputs()[0].name: x})[0])
