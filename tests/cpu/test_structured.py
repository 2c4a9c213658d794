"""Channels left out, the whole way: a smaller model that needs nothing but ONNX Runtime, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest

import sparsec
from sparsec import CompileConfig, SparsecError, UsageError
from sparsec.compiler import runtime
from sparsec.compiler.config import Tune
from sparsec.compiler.context import Silent, make_context
from sparsec.compiler.driver import relative_error
from sparsec.compiler.frontend import read
from sparsec.compiler.removal import Removal
from sparsec.compiler.removal import removal as removal_module
from sparsec.compiler.runtime import Comparison
from sparsec.models.lstm_lm import lstm_lm
from sparsec.models.mlp import mlp, stack
from sparsec.models.tinyvgg16 import tinyvgg16
from sparsec.models.transformer import EncoderConfig, encoder
from sparsec.passes.channels import find_channels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

ASSETS = Path(__file__).resolve().parents[2].parent / "shared" / "assets" / "models"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the models of ../shared/assets are not on this machine")


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {"pattern": "structured", "cache": tmp_path, "tune": Tune.OFF, "threads": 2}


def redundant(seed: int = 0) -> onnx.ModelProto:
    """64 units of which every second is a copy of the one before, with other weights behind it."""
    rng = np.random.default_rng(seed)
    first = rng.standard_normal((32, 48)).astype(np.float32).repeat(2, axis=0)
    bias = rng.standard_normal(32).astype(np.float32).repeat(2)
    second = rng.standard_normal((10, 64)).astype(np.float32)
    return stack([(first, bias), (second, np.zeros(10, np.float32))], inputs="x", outputs="y")


def data(count: int = 160) -> dict[str, Array]:
    return {"x": np.random.default_rng(7).standard_normal((count, 48), dtype=np.float32)}


def samples(name: str = "x") -> list[dict[str, Array]]:
    """As calibration takes them: runs of 16 samples."""
    return [{name: part} for part in np.split(data()["x"], 10)]


def test_a_smaller_model_that_needs_no_operator(options: dict[str, Any], smaller_wins: None, tmp_path: Path) -> None:
    model = mlp((64, 128, 96, 10), seed=1)
    result = sparsec.compile(model, CompileConfig(sparsity=0.5, **options))
    report = result.report
    assert [d.choice for d in report.decisions] == ["smaller"] * 3
    first, second, last = (d.shape_after for d in report.decisions)
    assert first is not None and second is not None and last is not None
    assert first[1] == 64 and second[1] == first[0] and last == (10, second[0])
    assert "its outputs stay: they are those of the model's output 'output'" in report.decisions[-1].reason
    assert report.verification is not None and report.verification.error < 1e-5
    assert report.removed is not None and 0.5 <= report.removed < 0.65
    assert report.bytes_after < 0.6 * report.bytes_before
    assert "accuracy was not measured" in " ".join(report.notes)
    result.save(tmp_path / "out")
    path = tmp_path / "out" / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    np.testing.assert_array_equal(session.run(None, {"input": x})[0], result.run({"input": x})["output"])
    saved = onnx.load(path)
    onnx.checker.check_model(saved, full_check=True)
    assert {tuple(t.dims) for t in saved.graph.initializer} >= {first, second, last}


def test_what_others_can_replace_goes_with_data(options: dict[str, Any], smaller_wins: None) -> None:
    """Half of the units are copies: by their loss they can all go, by their norms they are as good as any."""
    by_norm = sparsec.compile(redundant(), CompileConfig(sparsity=0.49, **options))
    fitted = sparsec.compile(redundant(), CompileConfig(sparsity=0.49, calib=samples(), **options))
    x = data(50)
    expected = onnxruntime.InferenceSession(redundant().SerializeToString()).run(None, x)[0]
    lost = [relative_error(expected, result.run(x)["y"]) for result in (by_norm, fitted)]
    assert lost[1] < 0.03 < 0.2 < lost[0]
    report = fitted.report
    assert report.fidelity is not None and report.fidelity.worst < 0.03
    assert report.quality is not None and report.verification is not None and report.verification.error < 1e-5
    assert [d.shape_after for d in report.decisions] == [(32, 48), (10, 32)]


def test_what_the_fit_leaves_unread_goes(
    options: dict[str, Any], smaller_wins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as units that never fire on the data; what is left is no other model."""
    unread, solved = np.arange(64) % 8 < 3, Removal._solved

    def fitted(self: Removal, kept: Any) -> Any:
        weights = solved(self, kept)
        for new in weights.values():
            new.matrix[:, unread] = 0
        return weights

    monkeypatch.setattr(Removal, "_solved", fitted)
    monkeypatch.setattr(Removal, "_repaired", lambda self, kept, weights: weights)
    report = sparsec.compile(redundant(), CompileConfig(sparsity=0.1, calib=samples(), **options)).report
    assert report.decisions[0].shape_after == (24, 48)
    assert report.decisions[1].shape_after == (10, 24)


def test_slower_is_declined(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "compare", lambda dense, sparse, pairs=7: Comparison(1.0, 2.0, 0.5, (0.5, 0.5)))
    result = sparsec.compile(redundant(), CompileConfig(sparsity=0.5, **options))
    assert {d.choice for d in result.report.decisions} == {"dense"}
    assert result.report.timings == () and result.report.removed == 0
    assert "No channel was left out: the smaller model is 2.00x slower at batch 1." in result.report.notes
    expected = onnxruntime.InferenceSession(redundant().SerializeToString()).run(None, data(4))[0]
    np.testing.assert_array_equal(result.run(data(4))["y"], expected)


def test_nothing_that_can_go(options: dict[str, Any], smaller_wins: None) -> None:
    result = sparsec.compile(mlp((16, 10)), CompileConfig(sparsity=0.5, **options))
    assert "no channel can be left out of this model" in result.report.missed
    assert "'/fc1/Gemm': its outputs stay: they are those of the model's output 'output'" in result.report.missed


def test_nothing_that_can_go_with_data(options: dict[str, Any], smaller_wins: None) -> None:
    config = CompileConfig(max_drop="1%", calib=[{"input": np.ones((2, 16), np.float32)}] * 3, **options)
    assert "no channel can be left out of this model" in sparsec.compile(mlp((16, 10)), config).report.missed


def test_as_much_as_there_is(options: dict[str, Any], smaller_wins: None) -> None:
    result = sparsec.compile(redundant(), CompileConfig(sparsity=0.99, **options))
    assert any("is all that can be left out; 99% was asked for" in note for note in result.report.notes)


def test_a_speedup_is_reached_with_the_least_error(options: dict[str, Any], as_fast_as_it_is_small: None) -> None:
    result = sparsec.compile(redundant(), CompileConfig(speedup=1.4, calib=samples(), **options))
    report = result.report
    assert report.missed == "" and report.timings[0].speedup >= 1.4
    (chosen,) = [point for point in report.frontier if point.chosen]
    assert chosen.speedups[0] == report.timings[0].speedup
    slower = [point for point in report.frontier if point.speedups < chosen.speedups]
    assert all(point.speedups[0] < 1.4 for point in slower)
    missed = sparsec.compile(redundant(), CompileConfig(speedup=99, calib=samples(), **options)).report
    assert missed.missed.startswith("99x the speed was not reached")
    assert missed.timings[0].speedup == max(point.speedups[0] for point in missed.frontier)


def test_another_point_is_picked(options: dict[str, Any], as_fast_as_it_is_small: None) -> None:
    def report(pick: int) -> Any:
        return sparsec.compile(redundant(), CompileConfig(speedup=1.4, pick=pick, calib=samples(), **options)).report

    for pick in (0, 2):
        found = report(pick)
        chosen = [i for i, point in enumerate(found.frontier) if point.chosen]
        assert chosen == [pick]
        reached = min(found.frontier[pick].speedups)
        words = f"point {pick} is {reached:.2f}x as fast, 1.4x was asked for"
        assert found.missed.startswith(words) if reached < 1.4 else found.missed == ""
        assert bool(found.smaller_layers) == bool(pick)
    with pytest.raises(UsageError, match=rf"--pick 99: the frontier has points 0 to {len(found.frontier) - 1};"):
        report(99)


def test_a_picked_point_beyond_the_limit_is_said(options: dict[str, Any], as_fast_as_it_is_small: None) -> None:
    config = CompileConfig(max_drop="1%", pick=7, metric="cosine", calib=samples(), **options)
    report = sparsec.compile(redundant(), config).report
    assert report.smaller_layers and report.quality is not None
    lost = 1 - report.quality.value / report.quality.dense
    assert f"point 7: cosine 1 -> {report.quality.value:.4g} loses {lost:.2%}"[:-2] in report.missed
    assert "allowed to lose 1% (--max-drop)" in report.missed


def test_a_limit_on_the_metric_is_kept(options: dict[str, Any], as_fast_as_it_is_small: None) -> None:
    config = CompileConfig(max_drop="1%", metric="cosine", calib=samples(), **options)
    report = sparsec.compile(redundant(), config).report
    assert report.quality is not None and report.quality.value >= 0.99 * report.quality.dense
    assert report.timings and report.timings[0].speedup > 1.3  # the copies, at least
    tight = CompileConfig(max_drop="0.0001%", metric="cosine", calib=samples("input"), **options)
    none = sparsec.compile(mlp((48, 64, 10)), tight).report
    assert "no smaller model with cosine within 0.0001% of 1 is faster" in none.missed
    assert {d.choice for d in none.decisions} == {"dense"}


def test_a_layer_can_be_kept(options: dict[str, Any], smaller_wins: None) -> None:
    config = CompileConfig(sparsity=0.5, layer_sparsity=(("/fc1/*", 0.0),), **options)
    first, second, _ = sparsec.compile(mlp((64, 128, 96, 10)), config).report.decisions
    assert first.reason == "its outputs stay, as was asked for"
    assert first.shape_after is None and second.shape_after is not None and second.shape_after[1] == 128


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"values": "int8"}, "--values int8 is for weights with zeros"),
        ({"sparsity": 0.5, "values": "int8"}, "--values int8 is for weights with zeros"),
        ({"sparsity": 0.5, "prune_all": True}, "--prune-all is for weights with zeros"),
        ({"sparsity": 0.5, "method": "obs", "calib": {"x": np.zeros((4, 48), np.float32)}}, "--method obs is for"),
        ({"sparsity": 0.5, "layer_sparsity": (("/fc1/Gemm", 0.5),)}, "/fc1/Gemm=0 keeps a layer's outputs"),
        ({"sparsity": 0.5, "layer_sparsity": (("nothing", 0.0),)}, "names no layer"),
        ({"speedup": 2.0}, "--speedup needs calibration data"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        sparsec.compile(redundant(), CompileConfig(**given, **options))


def test_structured_stands_alone() -> None:
    with pytest.raises(ValueError, match="by itself structured"):
        CompileConfig(pattern="structured,group:16")


def test_data_that_does_not_fit(options: dict[str, Any]) -> None:
    calib = [{"x": np.full((8, 48), np.nan, np.float32)}] * 5
    with pytest.raises(SparsecError, match="NaN"):
        sparsec.compile(redundant(), CompileConfig(sparsity=0.5, calib=calib, **options))


def unread(channels: int = 16) -> onnx.ModelProto:
    """Of 64 units the last `channels` are read by zeros."""
    rng = np.random.default_rng(3)
    first, second = rng.standard_normal((64, 48)), rng.standard_normal((10, 64))
    second[:, 64 - channels :] = 0
    bias = rng.standard_normal(64).astype(np.float32)
    return stack(
        [(first.astype(np.float32), bias), (second.astype(np.float32), np.zeros(10, np.float32))],
        inputs="x",
        outputs="y",
    )


@pytest.mark.parametrize("sparsity", [None, 0.0])
def test_without_a_share_only_dead_channels_go(
    options: dict[str, Any], smaller_wins: None, sparsity: float | None
) -> None:
    result = sparsec.compile(unread(), CompileConfig(sparsity=sparsity, **options))
    report = result.report
    assert [d.shape_after for d in report.decisions] == [(48, 48), (10, 48)]
    assert report.decisions[0].reason == "without 16 of 64 outputs, all dead"
    assert not any(d.pruned for d in report.decisions) and not report.notes and not report.missed
    assert report.removed == pytest.approx(1 / 4) and report.verification is not None
    expected = onnxruntime.InferenceSession(unread().SerializeToString()).run(None, data(20))[0]
    assert report.verification.error < 1e-6 and relative_error(expected, result.run(data(20))["y"]) < 1e-6


def test_data_changes_no_weight_without_a_share(options: dict[str, Any], smaller_wins: None) -> None:
    report = sparsec.compile(unread(), CompileConfig(calib=samples(), **options)).report
    assert [d.shape_after for d in report.decisions] == [(48, 48), (10, 48)]
    assert report.fidelity is not None and report.fidelity.worst < 1e-6
    assert report.fidelity.calibrated == 0 and report.fidelity.samples == 32
    assert report.quality is not None and report.quality.value == pytest.approx(report.quality.dense)


def test_without_a_share_and_dead_channels_nothing_goes(options: dict[str, Any], smaller_wins: None) -> None:
    whole, few = (sparsec.compile(unread(n), CompileConfig(**options)).report for n in (0, 3))
    for report, words in ((whole, "none of the 64 that"), (few, "3 of the 64 that could go are dead")):
        assert {d.choice for d in report.decisions} == {"dense"} and not report.missed and report.removed == 0
        assert any(note.startswith(f"No channel was left out: {words}") for note in report.notes)
    assert whole.decisions[0].reason == "no channel was left out of the model"
    assert "its outputs stay: they are those of the model's output 'y'" in whole.decisions[1].reason


def test_nothing_can_go_without_a_share(options: dict[str, Any], smaller_wins: None) -> None:
    report = sparsec.compile(mlp((16, 10)), CompileConfig(**options)).report
    assert "No channel was left out: none can go." in report.notes and not report.missed


def test_dead_channels_of_a_layer_can_be_kept(options: dict[str, Any], smaller_wins: None) -> None:
    (layer, _) = read(unread()).layers
    config = CompileConfig(layer_sparsity=((layer.name, 0.0),), **options)
    report = sparsec.compile(unread(), config).report
    assert report.smaller_layers == 0 and report.decisions[0].reason == "its outputs stay, as was asked for"


def test_slower_is_declined_without_a_share(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "compare", lambda dense, sparse, pairs=7: Comparison(1.0, 2.0, 0.5, (0.5, 0.5)))
    report = sparsec.compile(unread(), CompileConfig(**options)).report
    assert report.smaller_layers == 0
    assert "No channel was left out: the smaller model is 2.00x slower at batch 1." in report.notes


def test_one_of_only_dead_channels_stays(options: dict[str, Any], smaller_wins: None) -> None:
    report = sparsec.compile(unread(64), CompileConfig(**options)).report
    assert [d.shape_after for d in report.decisions] == [(8, 48), (10, 8)]
    assert report.verification is not None and report.verification.error == 0


def test_a_wrong_model_is_not_written(
    options: dict[str, Any], smaller_wins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal_module, "live_channels", lambda p, c, found: {d: np.arange(d.size) < 8 for d in found})
    with pytest.raises(SparsecError, match="this is a bug of sparsec"):
        sparsec.compile(unread(), CompileConfig(**options))


@needs_assets
def test_channels_that_a_second_convolution_does_not_read(
    options: dict[str, Any], smaller_wins: None, tmp_path: Path
) -> None:
    """ResNet-20, of whose blocks half of the inner channels are read by zeros: half of their multiplications go."""
    model = onnx.load(ASSETS / "resnet20_cifar10.onnx")
    program = read(model)
    inner = [d for d in find_channels(program).dimensions.values() if len(d.rows) == len(d.columns) == 1]
    assert len(inner) == 9
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    weights = {layer.name: layer.nodes[0].inputs[1] for layer in program.layers}
    rng = np.random.default_rng(0)
    for dimension in inner:
        name = weights[dimension.columns[0].name]
        assert name is not None
        arrays[name.name][:, rng.permutation(dimension.size)[: dimension.size // 2]] = 0
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
    result = sparsec.compile(model, CompileConfig(**options))
    report = result.report
    assert len(report.decisions) == 20 and report.smaller_layers == 18
    assert report.verification is not None and report.verification.error < 1e-5
    result.save(tmp_path / "out")
    before, after = multiplications(model), multiplications(onnx.load(tmp_path / "out" / "model.onnx"))
    touched = {place.name for d in inner for place in (*d.rows, *d.columns)}
    halved = sum(count for name, count in before.items() if name in touched)
    assert sum(after.values()) == sum(before.values()) - halved // 2


def multiplications(model: onnx.ModelProto) -> dict[str, int]:
    """Of one sample in each convolution."""
    inferred = onnx.shape_inference.infer_shapes(model)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info}
    weights = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    return {
        node.name or node.output[0]: weights[node.input[1]] * int(np.prod(shapes[node.output[0]][2:]))
        for node in model.graph.node
        if node.op_type == "Conv"
    }


ZOO = {
    "mlp": mlp((48, 64, 32, 10)),
    "tinyvgg16": tinyvgg16(channels=(16, 16, 32, 32, 32), dense=64, classes=10),
    "encoder": encoder(EncoderConfig(layers=2, hidden=24, heads=3, ffn=64, vocabulary=50, positions=128)),
    "lstm_lm": lstm_lm(vocabulary=60, embedding=32, hidden=48),
    "tied lstm_lm": lstm_lm(vocabulary=60, embedding=32, hidden=32, tied=True),
}
FILES = (
    "magika_standard_v3_3",
    "mnist_cnn_opset7",
    "mnist_cnn_opset8",
    "resnet20_cifar10",
    "squeezenet_dc_sparse",
    "ultraface_version-RFB-320",
)


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("name", [*ZOO, *(pytest.param(name, marks=needs_assets) for name in FILES)])
def test_the_smaller_model_equals_the_masked_one(
    options: dict[str, Any], smaller_wins: None, name: str, share: float
) -> None:
    model = ZOO[name] if name in ZOO else ASSETS / f"{name}.onnx"
    report = sparsec.compile(model, CompileConfig(sparsity=share, **options)).report
    assert report.removed and report.smaller_layers
    assert report.verification is not None and report.verification.error < 1e-5
    assert all(decision.reason for decision in report.decisions)


def test_weights_in_constant_nodes(options: dict[str, Any], tmp_path: Path) -> None:
    model = redundant()
    for tensor in list(model.graph.initializer):
        node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        model.graph.node.insert(0, node)
        model.graph.initializer.remove(tensor)
    removal = Removal(read(model), make_context(CompileConfig(sparsity=0.5, **options), tmp_path, Silent()))
    (dimension,) = removal.cuts
    assert dimension.size == 64
    assert [layer.weight.shape for layer in removal.make({dimension: np.arange(16)}).program.layers] == [
        (16, 48),
        (10, 16),
    ]
