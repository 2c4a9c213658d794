"""Training of pruned models: the same function in PyTorch, batches, what training brings and what it refuses."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparsec
from sparsec.compiler.calibration import Weights, has_rows, open_samples
from sparsec.compiler.calibration.samples import Samples
from sparsec.compiler.config import Tune
from sparsec.compiler.context import Silent
from sparsec.compiler.exporter import session_source
from sparsec.compiler.frontend import read
from sparsec.compiler.healing import Limit, check_operators, check_torch, make_trainer, with_vectors
from sparsec.compiler.machine import Cpu
from sparsec.compiler.runtime import random_feeds, run_session
from sparsec.ir import SparsecError, UsageError, parse_pattern
from sparsec.models.lstm_lm import lstm_lm
from sparsec.models.mlp import mlp
from sparsec.models.tinyvgg16 import tinyvgg16
from sparsec.models.transformer import EncoderConfig, encoder
from sparsec.passes.prune import prune_by_norm

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparsec.compiler.driver import CompiledModel
    from sparsec.ir import Program

torch = pytest.importorskip("torch")

from sparsec.compiler.healing import network, training  # noqa: E402
from sparsec.compiler.healing.batches import Batches  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT.parent / "shared" / "assets" / "models"
SMALL_ENCODER = EncoderConfig(layers=2, hidden=24, heads=3, ffn=40, vocabulary=50, positions=16)
BUILT: dict[str, Callable[[], onnx.ModelProto]] = {
    "mlp": lambda: mlp((32, 64, 10)),
    "tinyvgg16": lambda: tinyvgg16(channels=(8, 8, 16, 16, 16), dense=32, classes=5),
    "encoder": lambda: encoder(SMALL_ENCODER),
    "lstm_lm": lambda: lstm_lm(vocabulary=30, embedding=16, hidden=16),
    "lstm_lm tied": lambda: lstm_lm(vocabulary=30, embedding=16, hidden=16, tied=True),
}
FILES = (
    "magika_standard_v3_3",
    "mnist_cnn_opset7",
    "mnist_cnn_opset8",
    "resnet20_cifar10",
    "resnet32_cifar10_external",
    "squeezenet_dc_sparse",
    "ultraface_version-RFB-320",
)


# ---- The same function ----


def source(name: str) -> Any:
    if name in BUILT:
        return BUILT[name]()
    path = ROOT / "build" / "minilm" / "model.onnx" if name == "minilm" else ASSETS / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


def pruned(program: Program, pattern: str = "group:4", share: float = 0.5) -> dict[str, Weights]:
    """By norm, in all layers whose weight can be trained."""
    return {
        layer.name: Weights(prune_by_norm(layer.weight, parse_pattern(pattern), share))
        for layer in program.layers
        if has_rows(layer)
    }


def opened(program: Program) -> Any:
    with tempfile.TemporaryDirectory() as folder:  # for models whose tensors lie outside
        return Cpu(1).open(session_source(program.model, Path(folder)))


def random_samples(session: Any, runs: int = 3) -> Samples:
    feeds = [random_feeds(session, 2, {}, seed, other=6) for seed in range(runs)]
    return open_samples(feeds, session, 10**6)


def outputs_of(session: Any) -> Callable[[Any], dict[str, Any]]:
    names = [value.name for value in session.get_outputs()]
    return lambda feeds: dict(zip(names, run_session(session, feeds), strict=True))


@pytest.mark.parametrize("name", [*BUILT, *FILES, "minilm"])
def test_real_models_are_computed_as_onnx_runtime_does_and_their_zeros_stay(name: str) -> None:
    program = read(source(name))
    session = opened(program)
    weights = pruned(program)
    trainer = make_trainer(program, weights, random_samples(session), 0, 1)
    trainer.check(outputs_of(session))
    before = {name: value.detach().clone() for name, value in trainer.student.parameters.items()}
    # A judge that always likes the last state best.
    looks = iter(range(1000))
    trained = trainer.train(Limit(3, False), lambda healed: ((float(next(looks)),), ""), Silent(), None)
    assert (trained.steps, trained.note) == (3, "")
    for layer, new in trained.healed.weights.items():
        assert not new.matrix[weights[layer].matrix == 0].any()
        assert np.isfinite(new.matrix).all()
    changed = [name for name, value in trainer.student.parameters.items() if not torch.equal(value, before[name])]
    assert set(trainer.student.masks) & set(changed), "no weight was trained"


@pytest.mark.parametrize("name", ["silero_vad", "silero_vad_op18_ifless"])
def test_branches_and_recurrent_layers_are_computed_too(name: str) -> None:
    program = read(source(name))
    rng = np.random.default_rng(0)
    feeds = {
        "input": rng.standard_normal((2, 576)).astype(np.float32),
        "state": rng.standard_normal((2, 2, 128)).astype(np.float32),
        "sr": np.array(16000),
    }
    expected = outputs_of(opened(program))(feeds)
    given = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
    found = network.Network(program.model)(given, list(expected))
    for output, y in expected.items():
        # Half of float32's digits: the outputs are sigmoids far from one half.
        assert np.abs(found[output].numpy() - y).max() <= 2**-11.5 * np.abs(y).max()


def test_one_wrong_operator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = read(mlp((32, 64, 10)))
    monkeypatch.setitem(network.OPS, "Relu", lambda call, x: torch.nn.functional.leaky_relu(x, 0.02))
    session = opened(program)
    trainer = make_trainer(program, pruned(program), random_samples(session), 0, 1)
    with pytest.raises(SparsecError, match=r"output 'output' differs from ONNX Runtime's by .* nothing was trained"):
        trainer.check(outputs_of(session))


def test_an_operator_without_a_mapping_is_named() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Det2", ["h"], ["y"], name="odd", domain="somebody"),
    ]
    graph = helper.make_graph(nodes, "odd", [x], [y], [weight])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("somebody", 1)]
    program = read(helper.make_model(graph, ir_version=8, opset_imports=opsets))
    with pytest.raises(SparsecError, match=r"node 'odd' \(Det2\): there is no mapping of the operator somebody::Det2"):
        check_operators(program.model)


def test_without_pytorch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SparsecError, match=r"pip install 'sparsec\[torch\]'"):
        check_torch()
    # Before the model and the data are read, which may take long.
    given = sparsec.CompileConfig(sparsity=0.5, calib="missing.npz", heal="5m")
    with pytest.raises(SparsecError, match=r"pip install 'sparsec\[torch\]'"):
        sparsec.compile("missing.onnx", given)


@pytest.mark.parametrize(
    ("cuda", "devices", "wanted", "words"),
    [
        (None, 0, "cuda", "--heal-on cuda: PyTorch .* was built for processors only. Leave --heal-on out"),
        ("13.0", 0, "cuda:0", "--heal-on cuda:0: PyTorch .* finds no GPU that it can use. Leave --heal-on out"),
        ("13.0", 2, "cuda:2", "--heal-on cuda:2: PyTorch has 2 of them: expected cuda:0 to cuda:1"),
    ],
)
def test_a_gpu_that_is_not_there_is_named(
    cuda: str | None, devices: int, wanted: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    with pytest.raises(SparsecError, match=words):
        check_torch(wanted)
    given = sparsec.CompileConfig(sparsity=0.5, calib="missing.npz", heal="5m", heal_on=wanted)
    with pytest.raises(SparsecError, match=words):
        sparsec.compile("missing.onnx", given)
    if devices:
        check_torch("cuda:1")


# ---- Batches ----


def labelled(runs: int, batch: int) -> Samples:
    """Inputs that are their own number, and so are their labels."""
    numbers = np.arange(runs * batch).reshape(runs, batch)
    feeds = [{"x": np.tile(part[:, None], (1, 3)).astype(np.float32), "one": np.ones(1)} for part in numbers]
    return Samples("numbers", feeds, list(numbers), {"x": 0})


@pytest.mark.parametrize("fixed", [False, True])
def test_an_epoch_has_every_sample_once_with_its_label(fixed: bool) -> None:
    samples = labelled(7, 1 if fixed else 3)
    samples = replace_axes(samples) if fixed else samples
    batches = Batches(samples)
    seen: list[float] = []
    for batch in batches.epoch(4, (0, 1)):
        x = batch.run(lambda inputs: {"x": inputs["x"] * inputs["one"]})["x"]
        assert x.shape[1:] == (3,)
        assert len(x) <= 4
        assert torch.equal(x[:, 0], batch.labels.reshape(-1).to(x.dtype))
        seen += x[:, 0].tolist()
    assert sorted(seen) == list(range(samples.count))
    again = [batch.labels.tolist() for batch in batches.epoch(4, (0, 1))]
    assert again == [batch.labels.tolist() for batch in batches.epoch(4, (0, 1))]
    assert again != [batch.labels.tolist() for batch in batches.epoch(4, (0, 2))]


def replace_axes(samples: Samples) -> Samples:
    return Samples(samples.name, samples.runs, samples.labels)


def test_runs_of_all_shapes_are_taken() -> None:
    """Inputs whose first axes differ cannot be joined, and scalars have no axis to lose."""
    rng = np.random.default_rng(0)
    runs = [
        {"x": rng.standard_normal((size, 3)), "row": rng.standard_normal((1, 3)), "scale": np.array(float(size))}
        for size in (2, 4, 2, 4, 4)
    ]
    batches = Batches(Samples("runs", runs, None, {"x": 0, "row": 0}))
    assert batches.count == 5
    sums: list[float] = []
    for batch in batches.epoch(8, (0, 0)):
        found = batch.run(lambda inputs: {"y": (inputs["x"] + inputs["row"]) * inputs["scale"]})["y"]
        expected = np.concatenate([(run["x"] + run["row"]) * run["scale"] for run in batch.feeds()])
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        sums.append(float(found.sum()))
        assert batch.keep is None
    whole = sum(float(((run["x"] + run["row"]) * run["scale"]).sum()) for run in runs)
    assert sum(sums) == pytest.approx(whole)


def test_a_model_of_one_sample_is_run_on_many_at_once() -> None:
    """A constant batch in Reshape: the same numbers as sample by sample."""
    rng = np.random.default_rng(0)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 2, 6]), ("y", [1, 5])))
    tensors = [
        numpy_helper.from_array(rng.standard_normal((12, 5)).astype(np.float32), "w"),
        numpy_helper.from_array(np.array([1, 12]), "shape"),
    ]
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    opsets = [helper.make_opsetid("", 17)]
    program = read(
        helper.make_model(helper.make_graph(nodes, "one", [x], [y], tensors), ir_version=8, opset_imports=opsets)
    )
    session = opened(program)
    runs = [{"x": rng.standard_normal((1, 2, 6)).astype(np.float32)} for _ in range(5)]
    (batch,) = Batches(Samples("runs", runs)).first(5)
    found = batch.run(lambda inputs: network.Network(program.model)(inputs, ["y"]))["y"]
    expected = np.concatenate([run_session(session, run)[0] for run in runs])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# ---- From the file to the artifact ----

RNG = np.random.default_rng(0)
MODEL = mlp((128, 128, 128, 128, 10))
# Inputs of 24 directions, and the dense model's own choices as labels.
X = (RNG.standard_normal((1000, 24)) @ RNG.standard_normal((24, 128)) / 24**0.5).astype(np.float32)
LABELS = np.asarray(Cpu(1).open(MODEL.SerializeToString()).run(None, {"input": X})[0]).argmax(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", input=X, labels=LABELS)
    return tmp_path


def healed(folder: Path, model: Any = MODEL, **chosen: Any) -> CompiledModel:
    """Groups of 16 in the three large layers, whatever their speed; the first guess of a schedule."""
    common = {"calib": folder / "data.npz", "tune": Tune.OFF, "threads": 1, "cache": folder, "prune_all": True}
    return sparsec.compile(model, sparsec.CompileConfig(**{**common, "sparsity": 0.9, "permute": False, **chosen}))


def test_training_brings_accuracy_back_and_keeps_the_zeros(folder: Path) -> None:
    with_training = healed(folder, heal="150").report
    record = with_training.healing
    assert record is not None and record.before is not None and record.after is not None
    assert (record.steps, record.samples, record.kept, record.note) == (150, 800, True, "")
    assert record.after > record.before + 0.1
    assert with_training.quality is not None and with_training.quality.value == pytest.approx(record.after, abs=0.01)
    plain = healed(folder).report
    assert plain.healing is None
    zeros = [decision.zeros_after for decision in plain.decisions]
    assert [decision.zeros_after for decision in with_training.decisions] == pytest.approx(zeros, abs=0.02)


def test_the_same_steps_and_seed_give_the_same_bytes(folder: Path) -> None:
    first, second = (healed(folder, heal="20", seed=3) for _ in range(2))
    feeds = {"input": X[:7]}
    assert np.array_equal(first.run(feeds)["output"], second.run(feeds)["output"])
    other = healed(folder, heal="20", seed=4)
    assert not np.array_equal(first.run(feeds)["output"], other.run(feeds)["output"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here")
def test_a_gpu_trains_too(folder: Path) -> None:
    record = healed(folder, heal="150", heal_on="cuda").report.healing
    assert record is not None and record.before is not None and record.after is not None
    assert record.kept and record.after > record.before + 0.1


def test_a_longer_time_goes_on_from_a_shorter_one(folder: Path) -> None:
    first = healed(folder, heal="60", solutions=folder / "out" / "cache")
    first.save(folder / "out")
    assert first.report.healing is not None and first.report.healing.resumed_steps == 0
    assert [path.suffix for path in (folder / "out" / "cache").glob("training-*")] == [".pt"]
    steps: list[float] = []

    class Watched(training.Trainer):
        def _step(self, *arguments: Any) -> bool:
            steps.append(1)
            return super()._step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Trainer", Watched)
        longer = healed(folder, heal="100", solutions=folder / "out" / "cache").report
        assert longer.healing is not None
        assert (len(steps), longer.healing.steps, longer.healing.resumed_steps) == (40, 100, 60)
        assert 0 < longer.healing.resumed_seconds < longer.healing.seconds
        again = healed(folder, heal="60", solutions=folder / "out" / "cache").report
        assert again.healing is not None
        assert (len(steps), again.healing.steps, again.healing.resumed_steps) == (40, 60, 60)


def test_integer_values_are_rounded_after_training(folder: Path) -> None:
    compiled = healed(folder, sparsity=0.7, heal="40", values="int8", pattern="block:16x4")
    assert compiled.report.healing is not None and compiled.report.healing.kept
    assert compiled.report.verification is not None


def test_a_loss_that_is_no_number_ends_training_at_the_best_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10**6))
    usual = training.Trainer._loss
    monkeypatch.setattr(
        training.Trainer, "_loss", lambda self, batch: usual(self, batch) * (np.nan if next(calls) >= 30 else 1)
    )
    record = healed(folder, heal="100").report.healing
    assert record is not None
    assert record.note == "the loss was no number any more at step 31"
    assert record.before is not None and record.after is not None and record.after >= record.before


def test_what_is_no_better_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RATE", 100.0)  # only ever worse
    compiled = healed(folder, heal="60")
    record = compiled.report.healing
    assert record is not None
    assert (record.kept, record.before) == (False, record.after)
    assert "no better than one before" in record.note
    monkeypatch.setattr(training, "RATE", 0.0)  # what it began with
    feeds = {"input": X[:7]}
    assert np.array_equal(compiled.run(feeds)["output"], healed(folder, heal="1").run(feeds)["output"])


CONVOLUTIONS = """<ir_version: 8, opset_import: ["" : 17]>
convolutions (float[1, 3, 12, 12] x) => (float[1, 10] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1)
    b = BatchNormalization (a, scale, shift, mean, var)
    c = Relu (b)
    d = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (c, w2, b2)
    e = HardSwish (d)
    f = GlobalAveragePool (e)
    g = Reshape (f, shape)
    y = Gemm <transB = 1> (g, w3, b3)
}"""
HALF = """<ir_version: 8, opset_import: ["" : 17]>
half (float16[N, 32] x) => (float16[N, 8] y) {
    a = MatMul (x, w1)
    b = Add (a, b1)
    c = Tanh (b)
    y = MatMul (c, w2)
}"""


@pytest.mark.parametrize(
    ("text", "tensors", "shape", "dtype"),
    [
        (
            CONVOLUTIONS,
            {"w1": (16, 3, 3, 3), "scale": (16,), "shift": (16,), "mean": (16,), "var": (16,)}
            | {"w2": (32, 16, 3, 3), "b2": (32,), "w3": (10, 32), "b3": (10,)},
            (1, 3, 12, 12),
            np.float32,
        ),
        (HALF, {"w1": (32, 64), "b1": (64,), "w2": (64, 8)}, (1, 32), np.float16),
    ],
    ids=["batch norm, one sample at once, no kernel_shape", "half precision"],
)
def test_other_kinds_of_models(text: str, tensors: Any, shape: Any, dtype: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(text)
    for name, size in tensors.items():
        # Positive, so that it may be a variance.
        array = np.abs(rng.standard_normal(size)) + 0.1 if name == "var" else 0.3 * rng.standard_normal(size)
        model.graph.initializer.append(numpy_helper.from_array(array.astype(dtype), name))
    if text is CONVOLUTIONS:
        model.graph.initializer.append(numpy_helper.from_array(np.array([1, 32]), "shape"))
    runs = [{"x": rng.standard_normal(shape).astype(dtype)} for _ in range(40)]
    compiled = healed(
        tmp_path, model, calib=runs, sparsity=None, layer_sparsity=(("*", 0.5),), heal="12", pattern="block:2x1"
    )
    record = compiled.report.healing
    assert record is not None
    assert record.samples == 32
    assert record.steps > 0
    assert record.before is not None and record.after is not None and record.after >= record.before


def test_what_weights_are_solved_for_and_what_they_are_trained_with(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", input=RNG.standard_normal((400, 512)).astype(np.float32))
    given = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.5, "heal": "1"}
    notes = healed(tmp_path, mlp((512, 64, 10)), **given).report.notes
    words = "256 rows, 512 inputs): their weights are fitted with damping; they are solved for 256 samples, and "
    assert any(words + "trained (--heal) with 320." in note for note in notes), notes


def test_few_samples_to_judge_training_by_are_said(tmp_path: Path) -> None:
    given = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.5, "heal": "1"}
    for count, words in ((5, "by only 1 sample that"), (95, "by only 19 samples"), (100, "")):
        np.savez(tmp_path / "data.npz", input=X[:count])
        notes = healed(tmp_path, mlp((128, 128, 10)), **given).report.notes
        assert [words in note for note in notes if "--heal" in note] == [True] * bool(words), notes


@pytest.mark.parametrize("batch", ["N", "1"])
def test_an_output_may_be_a_scalar(batch: str, tmp_path: Path) -> None:
    """Of each sample, or of all that are in a batch."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[{batch}, 32] x) => (float[{batch}, 8] y, float z) {{
        a = MatMul (x, w1)  b = Relu (a)  y = MatMul (b, w2)  z = ReduceMean <keepdims = 0> (y)
    }}"""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(text)
    for name, size in {"w1": (32, 64), "w2": (64, 8)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(size).astype(np.float32), name))
    runs = [{"x": rng.standard_normal((1, 32)).astype(np.float32)} for _ in range(40)]
    compiled = healed(tmp_path, model, calib=runs, sparsity=None, layer_sparsity=(("*", 0.5),), heal="3")
    assert compiled.report.healing is not None and compiled.report.healing.steps == 3


def test_one_run_has_nothing_to_hold_back(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", input=X[:1])
    with pytest.raises(
        SparsecError, match=r"--heal: calibration data .* has one run, of which nothing can be held back"
    ):
        healed(tmp_path, heal="10")


def test_training_needs_data_and_something_pruned(folder: Path) -> None:
    with pytest.raises(UsageError, match="--heal needs calibration data"):
        sparsec.compile(MODEL, sparsec.CompileConfig(sparsity=0.5, heal="5m"))
    with pytest.raises(UsageError, match="--heal: nothing is pruned"):
        sparsec.compile(MODEL, sparsec.CompileConfig(heal="5m"))
    with pytest.raises(UsageError, match="--heal-on cuda: nothing is trained; add --heal"):
        sparsec.compile(MODEL, sparsec.CompileConfig(sparsity=0.5, heal_on="cuda"))


def test_nothing_pruned_is_nothing_trained_and_said_so(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4, 8, 8] x) => (float[N, 8, 8, 8] y) {
        y = Conv (x, w)
    }"""
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((8, 4, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    data = np.random.default_rng(1).standard_normal((40, 4, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=data)
    nothing = "Nothing was pruned, so nothing was trained (--heal)"
    for given, advice in (
        ({"sparsity": 0.5, "prune_all": False}, "--prune-all prunes layers without a sparse operator too"),
        ({"sparsity": 0.5}, "'LAYER=0.5' prunes small layers"),
        ({"sparsity": 0.5, "pattern": "structured", "prune_all": False}, "the decisions say why"),
    ):
        report = healed(tmp_path, model, heal="5", **given).report
        assert report.healing is None
        assert report.notes[-1].startswith(nothing) and advice in report.notes[-1]
    by_name = healed(tmp_path, model, heal="5", sparsity=None, layer_sparsity=(("*", 0.5),), pattern="block:2x1").report
    assert by_name.healing is not None and not any(nothing in note for note in by_name.notes)


def test_vectors_go_back_by_name_and_nothing_else_changes() -> None:
    program = read(source("encoder"))
    trainer = make_trainer(program, pruned(program), random_samples(opened(program)), 0, 1)
    own = trainer.student.healed().vectors
    name = next(name for name in own if "LayerNorm" in name)
    changed = with_vectors(program, {name: own[name] + 1})
    before, after = (onnx_ir.to_proto(one.model) for one in (program, changed))
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        same = numpy_helper.to_array(old) == numpy_helper.to_array(new)
        assert (old.name != name) == bool(np.all(same))
    del before.graph.initializer[:], after.graph.initializer[:]
    assert before == after
    assert own[name].dtype == np.float32
