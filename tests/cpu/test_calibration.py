"""Calibration data: its forms, its errors, what is gathered from it, and what the solver makes of it."""

from __future__ import annotations

import re
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
from sparsec.models.mlp import ffn, mlp

RNG = np.random.default_rng(0)


def session(outputs: Any = (), **inputs: list[Any]) -> Any:
    values = [SimpleNamespace(name=name, shape=shape, type="tensor(float)") for name, shape in inputs.items()]
    results = [SimpleNamespace(name=f"y{i}", shape=shape, type="tensor(float)") for i, shape in enumerate(outputs)]
    return SimpleNamespace(get_inputs=lambda: values, get_outputs=lambda: results)


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


def test_how_many_samples_there_were_is_known_where_it_is_cheap(tmp_path: Path) -> None:
    forms = sources(tmp_path)
    found = {name: open_samples(forms[name], ONE, limit=9).source_count for name in FORMS}
    assert found == {**dict.fromkeys(FORMS), **dict.fromkeys(("npz", "named npy", "npy of the only input"), 20)} | {
        "double": 20  # one run, which was read
    }
    samples = open_samples(forms["npz"], ONE, limit=9)
    assert [part.source_count for part in (*samples.split(0.2), samples.some(8))] == [20, 20, 20]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, r"'/fc1/Gemm': 205 rows, 512 inputs\): .* damping; took 256 of 400 samples, --samples 400 takes all\.$"),
        ({"samples": 400}, r"'/fc1/Gemm': 320 rows, 512 inputs\): .* damping; more samples fit better\.$"),
    ],
)
def test_few_rows_are_said_with_what_there_is(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", input=RNG.standard_normal((400, 512)).astype(np.float32))
    given = {**given, "calib": tmp_path / "data.npz", "method": "magnitude", "pattern": "unstructured"}  # no kernel
    config = sparsec.CompileConfig(sparsity=0.5, prune_all=True, cache=tmp_path, threads=1, **given)
    notes = sparsec.compile(mlp((512, 64, 10)), config).report.notes
    assert any(re.search(words, note) for note in notes), notes


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
        ([{"x": X[:0]}], "is empty"),
        ([{"x": [[1, 2], [3]]}], "input 'x' cannot be made an array"),
        ([{"x": X, 3: X}], r"has the inputs \['3', 'x'\]"),
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


def test_a_file_that_is_too_short_or_uneven(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=X[:3], y=X[:2])
    np.save(tmp_path / "x.npy", X[:3])
    with pytest.raises(SparsecError, match=r"data.npz': inputs have different numbers of samples \(x 3, y 2\)"):
        open_samples(tmp_path / "data.npz", session(x=["n", 4], y=["n", 4]), limit=10)
    with pytest.raises(SparsecError, match="has 3 samples, and the model takes 6 at once"):
        open_samples(tmp_path / "x.npy", session(x=[6, 4]), limit=10)


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


# ---- What is held back ----


def dynamic(**inputs: np.ndarray) -> Samples:
    """Samples in one run of a model whose inputs have a dynamic batch."""
    shapes = {name: ["batch", *array.shape[1:]] for name, array in inputs.items()}
    return open_samples([inputs], session(**shapes), limit=100)


@pytest.mark.parametrize(("count", "expected"), [(1, None), (2, (1, 1)), (4, (3, 1)), (8, (6, 2)), (20, (16, 4))])
def test_a_single_run_is_cut_where_the_batch_is_dynamic(count: int, expected: tuple[int, int] | None) -> None:
    samples = dynamic(x=X[:count], y=2 * X[:count])
    seen, held_back = samples.split(0.2)
    if expected is None:
        assert seen is samples and held_back is samples
        return
    assert (seen.count, held_back.count) == expected
    for name, scale in (("x", 1), ("y", 2)):
        parts = [feeds[name] for part in (seen, held_back) for feeds in part.runs]
        assert np.array_equal(np.concatenate(parts), scale * X[:count])


def test_the_part_may_begin_inside_any_run() -> None:
    samples = open_samples([{"x": X[:10]}, {"x": X[10:16]}, {"x": X[16:]}], ONE, limit=100)
    for share, lengths in (
        (0.2, ([10, 6], [4])),
        (0.3, ([10, 4], [2, 4])),
        (0.7, ([6], [4, 6, 4])),
        (1, ([1], [9, 6, 4])),
    ):
        parts = samples.split(share)
        assert tuple([len(feeds["x"]) for feeds in part.runs] for part in parts) == lengths
    assert [len(feeds["x"]) for feeds in samples.runs] == [10, 6, 4]


@pytest.mark.parametrize(
    ("shapes", "feeds"),
    [
        ({"x": [20, 4]}, {"x": X}),  # a fixed batch
        ({"x": ["n", 4], "y": ["m", 4]}, {"x": X, "y": X}),  # one of the two may be no batch
        ({"x": ["n", 4], "y": ["n", 4]}, {"x": X, "y": X[:5]}),  # other sizes
        ({"x": ["n", 4], "y": [4, 20]}, {"x": X, "y": X.T}),  # could be 20 samples too
    ],
)
def test_a_run_is_not_cut_where_its_batch_is_unclear(shapes: Any, feeds: Any) -> None:
    samples = open_samples([feeds], session(**shapes), limit=100)
    assert samples.split(0.2) == (samples, samples)
    several = open_samples([feeds] * 3, session(**shapes), limit=100)
    assert [len(part.runs) for part in several.split(0.2)] == [2, 1]


def test_what_all_samples_share_stays_whole_and_a_state_is_cut_along_its_batch() -> None:
    feeds = {"x": X, "state": np.stack([X, 2 * X]), "scale": X[0]}
    shapes = {"x": ["n", 4], "state": [2, "n", 4], "scale": [4]}
    samples = open_samples([feeds], session(**shapes), limit=100)
    assert samples.count == 20
    _, held_back = samples.split(0.2)
    assert {name: array.shape for name, array in held_back.runs[0].items()} == {
        "x": (4, 4),
        "state": (2, 4, 4),
        "scale": (4,),
    }
    assert np.array_equal(held_back.runs[0]["state"][1], 2 * X[16:])


@pytest.mark.parametrize(
    ("outputs", "axes"),
    [
        ([["n", 5]], {}),  # the time is gone, the batch is not
        ([["t", "n", 5], [1, "n", 4]], {}),  # a last state
        ([["t", "n", 5]], {"x": 0}),  # could be either
        ([["t", 5]], {"x": 0}),
        ([["made", 5]], {"x": 0}),  # a name that says nothing
        ([[5]], {"x": 0}),
    ],
)
def test_a_first_axis_that_outputs_lack_may_be_time(outputs: Any, axes: dict[str, int]) -> None:
    x = np.zeros((6, 2, 4), np.float32)
    assert open_samples([{"x": x}] * 3, session(outputs, x=["t", "n", 4]), limit=100).axes == axes


# ---- Labels ----

LABELS = np.arange(20)


def labelled_sources(folder: Path) -> dict[str, tuple[Any, Any]]:
    """The same samples with the same labels in every form: the source, and labels that stand apart."""
    plain = sources(folder)
    np.savez(folder / "labelled.npz", x=X, labels=LABELS)
    np.save(folder / "labels.npy", LABELS)
    (folder / "labelled").mkdir()
    for i in range(4):
        np.savez(folder / "labelled" / f"{i}.npz", x=X[5 * i : 5 * i + 5], labels=LABELS[5 * i : 5 * i + 5])
    (folder / "labelled.py").write_text(
        "import numpy as np\n"
        f"def samples():\n    for i, row in enumerate(np.load({str(folder / 'x.npy')!r})):\n"
        "        yield {'x': row[None], 'labels': i}\n"
    )
    return {
        "npz": (folder / "labelled.npz", None),
        "folder": (folder / "labelled", None),
        "function": (f"{folder / 'labelled.py'}:samples", None),
        "iterable": ([{"x": X[:7], "labels": LABELS[:7].tolist()}, {"x": X[7:], "labels": LABELS[7:]}], None),
        "npz and npy": (plain["npz"], folder / "labels.npy"),
        "npy and array": (plain["npy of the only input"], LABELS),
        "folder and npy": (plain["folder"], str(folder / "labels.npy")),
        "reader and list": (plain["reader"], LABELS.tolist()),
    }


LABELLED = (
    "npz",
    "folder",
    "function",
    "iterable",
    "npz and npy",
    "npy and array",
    "folder and npy",
    "reader and list",
)


@pytest.mark.parametrize("form", LABELLED)
def test_labels_go_with_their_samples(form: str, tmp_path: Path) -> None:
    source, labels = labelled_sources(tmp_path)[form]
    samples = open_samples(source, ONE, limit=100, labels=labels)
    assert samples.labels is not None
    assert np.array_equal(np.concatenate(samples.labels), LABELS)
    assert [len(part) for part in samples.labels] == [len(feeds["x"]) for feeds in samples.runs]
    seen, held_back = samples.split(0.2)
    assert seen.labels is not None and held_back.labels is not None
    assert np.concatenate(held_back.labels).tolist() == [16, 17, 18, 19]
    assert [len(part) for part in seen.labels] == [len(feeds["x"]) for feeds in seen.runs]


def test_without_labels_there_are_none() -> None:
    samples = open_samples([{"x": X}], ONE, limit=100)
    assert samples.labels is None
    assert [part.labels for part in samples.split(0.2)] == [None, None]


def test_a_limit_takes_the_first_labels(tmp_path: Path) -> None:
    for source, labels in labelled_sources(tmp_path).values():
        samples = open_samples(source, ONE, limit=3, labels=labels)
        assert samples.labels is not None
        assert np.concatenate(samples.labels).tolist() == list(range(samples.count))
    # What a fixed batch leaves over has labels that are left over.
    samples = open_samples(tmp_path / "labelled.npz", session(x=[6, 4]), limit=100)
    assert samples.labels is not None and np.concatenate(samples.labels).tolist() == list(range(18))


def test_an_input_called_labels_is_an_input() -> None:
    feeds = {"x": X, "labels": X}
    samples = open_samples([feeds], session(x=["n", 4], labels=["n", 4]), limit=100)
    assert samples.labels is None and set(samples.runs[0]) == {"x", "labels"}
    samples = open_samples([feeds], session(x=["n", 4], labels=["n", 4]), limit=100, labels=LABELS)
    assert samples.labels is not None


def test_labels_of_any_shape_and_truth_values_as_integers() -> None:
    samples = open_samples([{"x": X, "labels": np.zeros((20, 3, 2), np.float32)}], ONE, limit=100)
    assert samples.labels is not None and samples.labels[0].shape == (20, 3, 2)
    samples = open_samples([{"x": X, "labels": X[:, 0] > 0}], ONE, limit=100)
    assert samples.labels is not None and samples.labels[0].dtype == np.int64


HALVES = [{"x": X[:12]}, {"x": X[12:]}]


@pytest.mark.parametrize(
    ("source", "labels", "words"),
    [
        (HALVES, LABELS[:15], "15 labels for at least 20 samples"),
        (HALVES, np.arange(25), "25 labels for 20 samples; give one label a sample"),
        ([{"x": X, "labels": LABELS[:3]}], None, "3 labels for 20 samples"),
        ([{"x": X, "labels": 3}], None, "1 labels for 20 samples"),
        ([{**HALVES[0], "labels": LABELS[:12]}, HALVES[1]], None, "1 of 2 runs have labels; give them to all or"),
        ([{"x": X, "labels": ["cat"] * 20}], None, "labels are <U3, expected integers or floats"),
        ([{"x": X, "labels": np.array([None] * 20)}], None, "labels are object, expected"),
        ([{"x": X, "labels": [[1], [2, 3]] * 10}], None, "array of labels cannot be made an array"),
        ([{"x": X, "labels": np.full(20, np.nan)}], None, "labels have NaN or infinite values"),
        (
            [{**HALVES[0], "labels": LABELS[:12]}, {**HALVES[1], "labels": X[12:, 0]}],
            None,
            r"labels are int64\[12\] in one run and float32\[8\] in another",
        ),
        ([{"x": X, "labels": LABELS}], LABELS, "has labels of its own, and others are given"),
        ([{"x": X}], "missing.npy", "labels 'missing.npy': no such file"),
        ([{"x": X}], "labels.csv", "labels 'labels.csv': expected an .npy file"),
        ([{"x": X, "target": LABELS}], None, "an array of labels is called 'labels'"),
    ],
)
def test_what_is_wrong_with_labels_is_said(source: Any, labels: Any, words: str) -> None:
    with pytest.raises(SparsecError, match=words):
        open_samples(source, ONE, limit=100, labels=labels)


def test_labels_of_a_file_of_another_length(tmp_path: Path) -> None:
    """Said even where the limit ends before the difference."""
    np.savez(tmp_path / "data.npz", x=X, labels=LABELS[:19])
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "objects.npy", np.array([None] * 20), allow_pickle=True)
    with pytest.raises(SparsecError, match="19 labels for 20 samples"):
        open_samples(tmp_path / "data.npz", ONE, limit=5)
    with pytest.raises(SparsecError, match="21 labels for 20 samples"):
        open_samples(tmp_path / "x.npy", ONE, limit=5, labels=np.arange(21))
    with pytest.raises(SparsecError, match=r"labels '.*objects.npy': it is no .npy file \(ValueError: Object arrays"):
        open_samples(tmp_path / "x.npy", ONE, limit=5, labels=tmp_path / "objects.npy")
    with pytest.raises(UsageError, match="has labels of its own"):
        open_samples(tmp_path / "data.npz", ONE, limit=5, labels=LABELS)


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
        (statistics,) = found.statistics[layer.name]
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
