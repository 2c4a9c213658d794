"""The reference networks: every builder's model is valid and runs; the trained files are what they claim."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sparsec.compiler import cli
from sparsec.models import BUILDERS, build
from sparsec.models._training import Network, Recipe, group_masks, shifted, train
from sparsec.models.digits import DENSE, GROUP16, HELD_OUT, accuracy, load_split, predictor
from sparsec.models.lstm_lm import lstm_lm
from sparsec.models.mlp import ffn, mlp, stack
from sparsec.models.tinyvgg16 import tinyvgg16
from sparsec.models.transformer import BERT_BASE, MINILM_L6, EncoderConfig, encoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

ort = pytest.importorskip("onnxruntime")
needs_digits = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")

SMALL_ENCODER = EncoderConfig(layers=2, hidden=24, heads=3, ffn=40, vocabulary=50, positions=16)
SMALL: dict[str, Callable[[int], onnx.ModelProto]] = {
    "mlp": lambda seed: mlp((32, 64, 10), seed=seed),
    "ffn": lambda seed: ffn(16, 64, 16, seed=seed),
    "tinyvgg16": lambda seed: tinyvgg16(channels=(8, 8, 16, 16, 16), dense=32, classes=5, seed=seed),
    "encoder": lambda seed: encoder(SMALL_ENCODER, seed=seed),
    "lstm_lm": lambda seed: lstm_lm(vocabulary=30, embedding=12, hidden=16, seed=seed),
    "lstm_lm tied": lambda seed: lstm_lm(vocabulary=30, embedding=16, hidden=16, tied=True, seed=seed),
}
small = pytest.mark.parametrize("builder", SMALL.values(), ids=SMALL.keys())


def session(model: onnx.ModelProto) -> Any:
    """A CPU session without graph optimisation, so that the model runs as written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(model: onnx.ModelProto, batch: int, sequence: int = 7) -> dict[str, NDArray[Any]]:
    """Normal floats, small token ids, and a mask whose last two places of the first row are off."""
    rng = np.random.default_rng(1)
    result: dict[str, NDArray[Any]] = {}
    for value in model.graph.input:
        sizes = {"batch": batch, "sequence": sequence}
        shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            result[value.name] = rng.standard_normal(shape, dtype=np.float32)
        else:
            result[value.name] = rng.integers(0, 2, shape)
    if "attention_mask" in result:
        result["attention_mask"][:] = 1
        result["attention_mask"][0, -2:] = 0
    return result


def initialisers(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def first_dim(model: onnx.ModelProto) -> set[str]:
    values = [*model.graph.input, *model.graph.output]
    return {value.type.tensor_type.shape.dim[0].dim_param for value in values}


@small
def test_model_is_valid_and_runs_at_any_batch(builder: Callable[[int], onnx.ModelProto]) -> None:
    model = builder(0)
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (10, [("", 17)])
    assert first_dim(model) == {"batch"}
    run = session(model)
    for batch in (1, 3):
        (output,) = run.run(None, feeds(model, batch))
        assert output.shape[0] == batch
        assert output.dtype == np.float32
        assert 0.1 < output.std() < 10


@small
def test_rows_of_a_batch_do_not_meet(builder: Callable[[int], onnx.ModelProto]) -> None:
    model = builder(0)
    run, batch = session(model), feeds(model, 3)
    (together,) = run.run(None, batch)
    (alone,) = run.run(None, {name: value[1:2] for name, value in batch.items()})
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-4, atol=1e-5)


@small
def test_seed_fixes_the_bytes(builder: Callable[[int], onnx.ModelProto]) -> None:
    assert builder(3).SerializeToString() == builder(3).SerializeToString()
    assert builder(3).SerializeToString() != builder(4).SerializeToString()


@small
def test_every_name_is_unique(builder: Callable[[int], onnx.ModelProto]) -> None:
    graph = builder(0).graph
    for names in (
        [node.name for node in graph.node],
        [*(tensor.name for tensor in graph.initializer), *(name for node in graph.node for name in node.output)],
    ):
        assert len(names) == len(set(names))


def test_build_knows_the_names_and_says_them() -> None:
    assert list(BUILDERS) == ["mlp", "ffn", "tinyvgg16", "minilm_l6", "bert_base", "lstm_lm"]
    with pytest.raises(ValueError, match=r"'resnet' is not a reference model: expected one of mlp, ffn, tinyvgg16"):
        build("resnet")


def test_default_sizes() -> None:
    assert [w.shape for w in initialisers(build("mlp")).values() if w.ndim == 2] == [
        (4096, 1024),
        (1024, 4096),
        (10, 1024),
    ]
    assert [w.shape for w in initialisers(build("ffn")).values() if w.ndim == 2] == [(4096, 1024), (1024, 4096)]
    assert (MINILM_L6.layers, MINILM_L6.hidden, MINILM_L6.heads, MINILM_L6.ffn) == (6, 384, 12, 1536)
    assert (BERT_BASE.layers, BERT_BASE.hidden, BERT_BASE.heads, BERT_BASE.ffn) == (12, 768, 12, 3072)


def test_tinyvgg16_has_vgg16s_layers() -> None:
    model = tinyvgg16(dense=8, classes=4)
    weights = initialisers(model)
    assert [node.op_type for node in model.graph.node].count("Conv") == 13
    assert weights["features.28.weight"].shape == (512, 512, 3, 3)
    assert weights["classifier.0.weight"].shape == (8, 2048)


def test_ffn_takes_weights() -> None:
    rng = np.random.default_rng(0)
    layers = [
        (rng.standard_normal(shape, dtype=np.float32), rng.standard_normal(shape[0], dtype=np.float32))
        for shape in ((6, 4), (3, 6))
    ]
    model = ffn(4, 6, 3, weights=layers)
    x = rng.standard_normal((5, 4), dtype=np.float32)
    expected = np.maximum(x @ layers[0][0].T + layers[0][1], 0) @ layers[1][0].T + layers[1][1]
    np.testing.assert_allclose(session(model).run(None, {"input": x})[0], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"weights are \[\(6, 4\), \(3, 6\)\], expected \[\(7, 4\), \(3, 7\)\]"):
        ffn(4, 7, 3, weights=layers)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "no layers"),
        ([(np.ones((3, 2), np.float32), np.ones(4, np.float32))], r"fc1 is \(3, 2\), expected \(4, 2\)"),
        ([(np.ones((3, 2), np.float32), np.ones(3, np.float32))] * 2, r"fc2 is \(3, 2\), expected \(3, 3\)"),
    ],
)
def test_stack_names_the_layer_that_does_not_fit(layers: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stack(layers)


def test_encoder_is_built_like_the_exporters() -> None:
    model = encoder(SMALL_ENCODER)
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("LayerNormalization") == 1 + 2 * SMALL_ENCODER.layers
    assert ops.count("Erf") == SMALL_ENCODER.layers
    assert ops.count("MatMul") == 8 * SMALL_ENCODER.layers
    assert initialisers(model)["encoder.layer.1.intermediate.dense.weight"].shape == (24, 40)
    assert any(node.name == "/encoder/layer.1/attention/self/query/MatMul" for node in model.graph.node)
    with pytest.raises(ValueError, match="hidden=10 is not a multiple of heads=4"):
        EncoderConfig(layers=1, hidden=10, heads=4, ffn=8)


def test_encoder_does_not_look_at_masked_tokens() -> None:
    model = encoder(SMALL_ENCODER)
    run, first = session(model), feeds(model, 1)
    second = {**first, "input_ids": first["input_ids"].copy()}
    second["input_ids"][0, -2:] = 40
    (a,), (b,) = run.run(None, first), run.run(None, second)
    np.testing.assert_array_equal(a[:, :-2], b[:, :-2])
    assert not np.array_equal(a, b)


def test_lstm_lm_ties_its_decoder() -> None:
    tied = lstm_lm(vocabulary=30, embedding=16, hidden=16, tied=True)
    assert "decoder.weight" not in initialisers(tied)
    with pytest.raises(ValueError, match="tied=True needs embedding == hidden, got 12 and 16"):
        lstm_lm(vocabulary=30, embedding=12, hidden=16, tied=True)


def test_lstm_lm_does_not_look_ahead() -> None:
    model = lstm_lm(vocabulary=30, embedding=12, hidden=16)
    run, inputs = session(model), feeds(model, 2)["input_ids"]
    (whole,), (start,) = run.run(None, {"input_ids": inputs}), run.run(None, {"input_ids": inputs[:, :4]})
    np.testing.assert_allclose(whole[:, :4], start, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", [DENSE, GROUP16], ids=lambda path: path.stem)
def test_trained_file_is_valid_and_small(path: Path) -> None:
    assert path.stat().st_size <= 5_000_000
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [w.shape for w in initialisers(model).values() if w.ndim == 2] == [(1024, 64), (1024, 1024), (10, 1024)]
    assert {w.dtype for w in initialisers(model).values()} == {np.dtype(np.float32)}
    assert first_dim(model) == {"batch"}


def test_group16_has_whole_groups_and_90_percent_zeros() -> None:
    weights = initialisers(onnx.load(GROUP16))
    for name in ("fc1.weight", "fc2.weight"):
        out, inputs = weights[name].shape
        kept = (weights[name] != 0).reshape(out // 16, 16, inputs)
        np.testing.assert_array_equal(kept.any(axis=1), kept.all(axis=1))
        assert 0.9 <= 1 - kept.mean() < 0.9 + 1 / kept[:, 0].size
    assert np.all(weights["fc3.weight"])


@needs_digits
def test_trained_files_are_as_accurate_as_they_say() -> None:
    _, _, pixels, labels = load_split()
    reached = {}
    for path in (DENSE, GROUP16):
        model = onnx.load(path)
        reached[path] = accuracy(predictor(session(model)), pixels, labels)
        said = {prop.key: prop.value for prop in model.metadata_props}
        assert said["accuracy"] == f"{reached[path]:.4f}"
        assert reached[path] >= 0.975
    assert reached[GROUP16] >= reached[DENSE] - 0.005
    assert said["pattern"] == "group:16"


@needs_digits
def test_split_is_disjoint_and_fixed() -> None:
    x_train, y_train, x_test, y_test = load_split()
    assert (len(x_train), len(x_test)) == (len(y_train), len(y_test)) == (1797 - HELD_OUT, HELD_OUT)
    assert x_train.dtype == np.float32
    assert y_test.dtype == np.int64
    assert (x_train.min(), x_train.max()) == (0, 1)
    assert not {row.tobytes() for row in x_train} & {row.tobytes() for row in x_test}


def test_missing_scikit_learn_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"install it with `pip install 'sparsec\[demo\]'`"):
        load_split()


def test_the_demo_prints_no_path_that_is_gone_when_it_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsec.models import demo  # which imports onnxruntime

    seen: list[tuple[list[str], Path]] = []

    def compile_command(words: list[str]) -> int:
        seen.append((words, Path.cwd()))
        return 1

    monkeypatch.setattr(cli, "main", compile_command)
    before = Path.cwd()
    assert demo.main() == 1
    ((words, folder),) = seen
    assert words[1:3] == ["-o", "out"] and Path(words[0]).is_absolute()
    assert "-o out" in capsys.readouterr().out
    assert Path.cwd() == before != folder and not folder.exists()


def _task(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """256 images, one bright row of eight each; the label is the row."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 8, 256)
    x = rng.uniform(0, 0.3, (256, 8, 8)).astype(np.float32)
    x[np.arange(256), labels] += 0.7
    return x.reshape(256, 64), labels


def test_training_learns_prunes_and_repeats() -> None:
    x, labels = _task()
    recipe = Recipe(epochs=20, rate=1e-2, shift=0.0, sparsity=0.75)
    networks = [Network.random((64, 128, 128, 10), np.random.default_rng(5)) for _ in range(2)]
    for network in networks:
        train(network, x, labels, recipe, seed=6)
    assert accuracy(networks[0].logits, *_task(1)) > 0.9
    for weight, again in zip(networks[0].weights, networks[1].weights, strict=True):
        assert weight.tobytes() == again.tobytes()
    for weight, mask in zip(networks[0].weights, group_masks(networks[0], 0.75), strict=False):
        np.testing.assert_array_equal(weight != 0, mask)
        assert mask.mean() == 0.25


def test_gradients_are_the_slopes() -> None:
    x, labels = _task()
    network: Any = Network.random((64, 16, 16, 10), np.random.default_rng(0))
    # In float64, so that the difference of two losses has digits left.
    network.weights = [weight.astype(np.float64) for weight in network.weights]
    network.biases = [bias.astype(np.float64) for bias in network.biases]

    def loss() -> float:
        logits = network.logits(x)
        logits -= logits.max(axis=1, keepdims=True)
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return float(-np.log(chances[np.arange(len(x)), labels]).mean())

    gradients = network.gradients(x, np.eye(10)[labels])
    for value, gradient in zip([*network.weights, *network.biases], gradients, strict=True):
        place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        losses = []
        for move in (1e-6, -2e-6):
            value[place] += move
            losses.append(loss())
        value[place] += 1e-6
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(gradient[place], rel=1e-4)


def test_shift_moves_the_image_along_both_axes() -> None:
    image = np.zeros((1, 8, 8), dtype=np.float32)
    image[0, 4, 4] = 1

    class Fixed(np.random.Generator):
        def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
            return np.full(size, high)

    moved = shifted(image.reshape(1, 64), 1.0, Fixed(np.random.PCG64(0))).reshape(8, 8)
    assert moved[5, 5] == 1
    assert moved.sum() == 1
