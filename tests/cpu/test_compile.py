"""The whole way: a model in, an artifact out, run by ONNX Runtime."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import sparsec
from sparsec.compiler import decide, runtime
from sparsec.compiler.config import Tune
from sparsec.compiler.runtime import Comparison
from sparsec.ir import SparsecError
from sparsec.models import BUILDERS
from sparsec.models.digits import GROUP16
from sparsec.models.mlp import ffn, mlp

FAST = {"tune": Tune.OFF, "threads": 2, "survey": False}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings that do not depend on how busy the machine is: sparse is twice as fast as dense."""
    monkeypatch.setattr(runtime, "compare", lambda dense, sparse, pairs=7: Comparison(2.0, 1.0, 2.0, (2.0, 2.0)))


@pytest.fixture
def dense_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "compare", lambda dense, sparse, pairs=7: Comparison(1.0, 2.0, 0.5, (0.5, 0.5)))


def run_dense(model: onnx.ModelProto | Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, feeds)


def masked(model: onnx.ModelProto, patterns: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A copy with some initialisers replaced."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in patterns:
            tensor.CopyFrom(onnx.numpy_helper.from_array(patterns[tensor.name], tensor.name))
    return copy


def test_plain_command_keeps_every_weight_and_result(cache: Path, sparse_wins: None) -> None:
    result = sparsec.compile(GROUP16, sparsec.CompileConfig(cache=cache, batch=(1, 16), **FAST))
    choices = {decision.layer: decision for decision in result.report.decisions}
    assert [d.choice for d in choices.values()] == ["sparse", "sparse", "dense"]
    wide = choices["/fc2/Gemm"]
    assert wide.pattern == "group:16"
    assert not wide.pruned
    assert wide.zeros_before == wide.zeros_after == pytest.approx(0.9, abs=0.01)
    assert "below 16,384" in choices["/fc3/Gemm"].reason
    assert result.report.verification is not None
    assert result.report.verification.error < 1e-5
    x = np.random.default_rng(1).random((33, 64), dtype=np.float32)
    np.testing.assert_allclose(result.run({"pixels": x})["logits"], run_dense(GROUP16, {"pixels": x})[0], atol=2e-5)


@pytest.mark.parametrize("pattern", ["group:16", "block:32x32", "block:3x5", "block:1x1", "block:100x7"])
def test_pruned_model_equals_dense_model_with_the_same_weights(cache: Path, sparse_wins: None, pattern: str) -> None:
    model = mlp((150, 210, 190, 10), seed=3)
    config = sparsec.CompileConfig(cache=cache, sparsity=0.7, pattern=pattern, **FAST)
    result = sparsec.compile(model, config)
    first, second, last = result.report.decisions
    assert (first.choice, second.choice, last.choice) == ("sparse", "sparse", "dense")
    assert first.pruned
    assert first.zeros_after == pytest.approx(0.7, abs=0.05)
    weights = {f"fc{i}.weight": sparse_weight(result, f"/fc{i}/Gemm") for i in (1, 2)}
    for rows in (1, 2, 7, 50):
        x = np.random.default_rng(rows).standard_normal((rows, 150)).astype(np.float32)
        expected = run_dense(masked(model, weights), {"input": x})[0]
        actual = result.run({"input": x})["output"]
        bound = 4 * np.finfo(np.float32).eps * np.sqrt(210) * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, atol=bound)


def sparse_weight(result: sparsec.CompiledModel, node: str) -> np.ndarray:
    """The dense weight [out, in] that a SparseLinear node of the artifact stands for, from its initialisers alone."""
    from sparsec.ir import SparseMatrix, parse_pattern

    model = onnx.load(result._folder / "model.onnx")
    found = next(n for n in model.graph.node if n.name == node)
    assert (found.domain, found.op_type) == ("ai.sparsec", "SparseLinear")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in found.attribute}
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    shape = (attributes["out_features"], attributes["in_features"])
    pattern = parse_pattern(attributes["pattern"].decode())
    return SparseMatrix(pattern, shape, *(arrays[name] for name in found.input[1:4])).to_dense()


def test_a_layer_that_loses_keeps_its_weights(cache: Path, dense_wins: None) -> None:
    model = mlp((256, 256, 256, 10))
    result = sparsec.compile(model, sparsec.CompileConfig(cache=cache, sparsity=0.8, **FAST))
    assert all(decision.choice == "dense" and not decision.pruned for decision in result.report.decisions)
    assert "2.0x slower at batch 1" in result.report.decisions[0].reason
    assert result.report.notes[-1] == "No layer became sparse: the artifact is the model as it came."
    assert onnx.load(result._folder / "model.onnx").SerializeToString() == model.SerializeToString()


def test_prune_all_leaves_zeros_in_dense_layers(cache: Path, dense_wins: None) -> None:
    model = mlp((256, 256, 256, 10))
    result = sparsec.compile(model, sparsec.CompileConfig(cache=cache, sparsity=0.8, prune_all=True, **FAST))
    assert [round(d.zeros_after, 1) for d in result.report.decisions] == [0.8, 0.8, 0.0]
    words = "No layer became sparse: the weights that --prune-all pruned stay dense, with zeros in them."
    assert result.report.notes[-1] == words
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(result._folder / "model.onnx").graph.initializer}
    assert (stored["fc1.weight"] == 0).mean() == pytest.approx(0.8, abs=0.01)


def test_layers_are_taken_back_until_the_model_is_not_slower() -> None:
    gains = {f"layer{i}": float(i) for i in range(8)}

    def measure(names: set[str]) -> tuple[sparsec.compiler.decide.Timing, ...]:  # type: ignore[name-defined]
        speedup = 1.5 if names <= {"layer6", "layer7"} else 0.9
        return (Comparison(1.0, 1.0, speedup, (1.0, 1.0)).timing(1, 1),)

    stay, timings = decide.settle(gains, measure)
    assert stay == {"layer6", "layer7"}
    assert timings[0].speedup == 1.5


def test_same_input_and_seed_give_the_same_bytes(cache: Path, sparse_wins: None, tmp_path: Path) -> None:
    model = mlp((256, 256, 256, 10))
    for name in ("a", "b"):
        result = sparsec.compile(model, sparsec.CompileConfig(cache=cache, sparsity=0.8, **FAST))
        result.save(tmp_path / name)
        result.close()
    for file in ("model.onnx", "libsparsec_ops.so", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_artifact_needs_nothing_but_onnxruntime(cache: Path, sparse_wins: None, tmp_path: Path) -> None:
    """In a process where sparsec and TVM cannot be imported."""
    result = sparsec.compile(GROUP16, sparsec.CompileConfig(cache=cache, **FAST))
    out = tmp_path / "out"
    result.save(out)
    assert sorted(path.name for path in out.iterdir()) == [
        "libsparsec_ops.so",
        "manifest.json",
        "model.onnx",
        "report.json",
    ]
    code = (
        "import sys\n"
        "for name in ('sparsec', 'tvm', 'onnx', 'onnx_ir'): sys.modules[name] = None\n"
        "import numpy, onnxruntime\n"
        "o = onnxruntime.SessionOptions()\n"
        "o.register_custom_ops_library('./libsparsec_ops.so')\n"
        "s = onnxruntime.InferenceSession('model.onnx', o, providers=['CPUExecutionProvider'])\n"
        "print(s.run(None, {'pixels': numpy.zeros((3, 64), 'float32')})[0].shape)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "(3, 10)", ran.stderr
    report = json.loads((out / "report.json").read_text())
    assert len(report["decisions"]) == 3


def test_saving_replaces_only_what_sparsec_made(cache: Path, dense_wins: None, tmp_path: Path) -> None:
    result = sparsec.compile(GROUP16, sparsec.CompileConfig(cache=cache, **FAST))
    out = tmp_path / "out"
    result.save(out)
    result.save(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(sparsec.SparsecError, match="was not made by sparsec"):
        result.save(out)
    assert (out / "notes.txt").read_text() == "mine"
    result.save(out, force=True)
    assert not (out / "notes.txt").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_no_layer_at_all(cache: Path, tmp_path: Path) -> None:
    """The library is there all the same: loading is one recipe."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 13]> agraph (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }'
    )
    result = sparsec.compile(model, sparsec.CompileConfig(cache=cache, **FAST))
    result.save(tmp_path / "out")
    session = sparsec.load(tmp_path / "out")
    assert (session.run(None, {"x": -np.ones((2, 4), np.float32)})[0] == 0).all()


def test_an_output_of_another_shape_than_declared_is_timed_all_the_same(cache: Path) -> None:
    """As PyTorch's exporter writes it of recurrent layers; `run` forgives it, bound outputs do not."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> wrong (float[N, 256] x) => (float[32, 256] y) {
            a = MatMul (x, w)
            y = Reshape (a, s)
        }"""
    )
    weight = np.repeat(np.random.default_rng(0).standard_normal((256, 16)), 16, axis=1).astype(np.float32)
    weight[:200] = 0
    for name, array in (("w", weight), ("s", np.array([-1, 256]))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    result = sparsec.compile(model, sparsec.CompileConfig(cache=cache, batch=(8,), **FAST))
    assert result.report.decisions[0].timings[0].dense_us > 0
    x = np.random.default_rng(2).standard_normal((8, 256)).astype(np.float32)
    exact = x.astype(np.float64) @ weight
    bound = 4 * np.finfo(np.float32).eps * np.sqrt(256) * np.abs(exact).max()
    np.testing.assert_allclose(result.run({"x": x})["y"], exact, rtol=0, atol=bound)


def test_survey_leaves_the_artifact_alone(cache: Path, sparse_wins: None) -> None:
    model = mlp((256, 256, 256, 10))
    config = sparsec.CompileConfig(cache=cache, **{**FAST, "survey": True})
    result = sparsec.compile(model, config)
    assert [point.sparsity for point in result.report.survey] == [0.5, 0.7, 0.8, 0.9]
    assert onnx.load(result._folder / "model.onnx").SerializeToString() == model.SerializeToString()


def test_another_cpu_is_predicted_and_said_so(cache: Path) -> None:
    config = sparsec.CompileConfig(cache=cache, sparsity=0.8, target="cpu:znver5", **FAST)
    report = sparsec.compile(ffn(64, 1024, 64), config).report
    assert "predicted, not measured" in report.decisions[0].reason
    assert any("not this machine" in note for note in report.notes)


@pytest.mark.parametrize("name", sorted(BUILDERS.keys() & {"lstm_lm"}))
def test_builders_compile(name: str, cache: Path) -> None:
    report = sparsec.compile(BUILDERS[name](), sparsec.CompileConfig(cache=cache, dims={"sequence": 4}, **FAST)).report
    assert report.decisions


def test_failed_compilation_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(sparsec.SparsecError, match="no C compiler"):
        sparsec.compile(GROUP16, sparsec.CompileConfig(cache=tmp_path / "cache", **FAST))
    assert shutil.which("cc") is None
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_external_data(cache: Path, sparse_wins: None, tmp_path: Path) -> None:
    """Weights beside the model, the small ones too; several sessions are open on it at once."""
    model = mlp((256, 256, 256, 10))
    source = tmp_path / "model.onnx"
    onnx.save(model, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    result = sparsec.compile(source, sparsec.CompileConfig(cache=cache, sparsity=0.8, batch=(1, 16), **FAST))
    assert result.report.sparse_layers == 2
    assert result.report.verification is not None
    assert result.report.verification.error < 1e-5
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx.data").exists()
    x = np.random.default_rng(0).standard_normal((5, 256)).astype(np.float32)
    (y,) = sparsec.load(tmp_path / "out").run(None, {"input": x})
    np.testing.assert_allclose(y, result.run({"input": x})["output"])


def test_an_artifact_replaced_while_a_session_holds_the_old_one(tmp_path: Path, cache: Path, sparse_wins: None) -> None:
    """The loader gives the library that is held; the message says so, and without that session all is well."""
    out, model = tmp_path / "out", mlp((150, 210, 190, 10), seed=3)
    held = []
    for pattern in ("group:16", "group:32"):
        result = sparsec.compile(model, sparsec.CompileConfig(cache=cache, sparsity=0.7, pattern=pattern, **FAST))
        result.save(out)
        result.close()
        if held:
            with pytest.raises(SparsecError, match="a session of this process still holds an older library"):
                sparsec.load(out)
            held.clear()
        held.append(sparsec.load(out))
