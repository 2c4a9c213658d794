"""Budgets of zeros, speed and accuracy, from the model and its data to the artifact.

Times are replaced by the bytes of a model's weights, which is what a product with few rows takes, so that every choice
is the same on a busy machine; one test measures.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.codegen.ort.library import build_library
from sparsec.codegen.tune import Tuner
from sparsec.compiler import cli, driver, outcome
from sparsec.compiler.budget import fitting, options, times
from sparsec.compiler.config import Tune
from sparsec.compiler.machine import Cpu
from sparsec.compiler.runtime import Comparison
from sparsec.compiler.sensitivity import sensitivity
from sparsec.ir import SparsecError, UsageError
from sparsec.models.mlp import mlp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from sparsec.compiler.driver import CompiledModel
    from sparsec.compiler.report import Report

RNG = np.random.default_rng(0)
MODEL = mlp((128, 128, 128, 128, 10))
FREE = ("/fc1/Gemm", "/fc2/Gemm", "/fc3/Gemm")  # the last layer is left alone
# Inputs of 24 directions, and the dense model's own choices as labels.
X = (RNG.standard_normal((200, 24)) @ RNG.standard_normal((24, 128)) / 24**0.5).astype(np.float32)
LEVELS = (0.5, 0.9)


def dense_outputs(x: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(Cpu(1).open(MODEL.SerializeToString()).run(None, {"input": x})[0])


LABELS = dense_outputs(X).argmax(1)


def opened(real: Callable[..., Any]) -> Callable[..., Any]:
    """`Cpu.open`, with the bytes of the model's weights noted."""

    def open_model(self: Cpu, source: Any, library: Path | None = None) -> Any:
        session = real(self, source, library)
        model = onnx.load(str(source)) if isinstance(source, Path) else onnx.ModelProto.FromString(source)
        session.weight = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
        return session

    return open_model


def compared(self: Cpu, dense: Any, sparse: Any, feeds: Any, pairs: int = 7) -> Comparison:
    ratio = dense.weight / sparse.weight
    return Comparison(dense.weight / 1000, sparse.weight / 1000, ratio, (ratio, ratio))


class Memo:
    """Kernels and libraries that were made before in this module."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kernels: dict[Any, Any] = {}
        self._libraries: dict[Any, Path] = {}
        self._tune = Tuner.kernel

    def kernel(self, tuner: Tuner, problem: Any, rows: Any) -> Any:
        key = problem, tuple(rows)
        if key not in self._kernels:
            self._kernels[key] = self._tune(tuner, problem, rows)
        return self._kernels[key]

    def library(self, kernels: Any, path: Path, requires: Any) -> None:
        key = tuple(kernel.name for kernel in kernels)
        if key not in self._libraries:
            self._libraries[key] = self._folder / f"{len(self._libraries)}.so"
            build_library(kernels, self._libraries[key], requires)
        shutil.copyfile(self._libraries[key], path)


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Few levels, times from bytes, and each kernel compiled once."""
    memo = Memo(tmp_path_factory.mktemp("libraries"))
    with pytest.MonkeyPatch.context() as patch:
        usual = fitting.Fitting.__init__.__defaults__ or ()
        fewer = tuple(LEVELS if value is fitting.LEVELS else value for value in usual)
        patch.setattr(fitting.Fitting.__init__, "__defaults__", fewer)
        patch.setattr(fitting, "LEVELS", LEVELS)
        patch.setattr(Cpu, "open", opened(Cpu.open))
        patch.setattr(Cpu, "compare", compared)
        patch.setattr(Tuner, "kernel", lambda tuner, problem, rows: memo.kernel(tuner, problem, rows))
        for module in (driver, outcome, times):
            patch.setattr(module, "build_library", memo.library)
        yield patch


@pytest.fixture(scope="module")
def folder(patched: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.onnx`, its data, a metric, and `first`, the artifact of a generous limit with its solved options."""
    folder = tmp_path_factory.mktemp("budget")
    patched.setenv("XDG_CACHE_HOME", str(folder))
    onnx.save(MODEL, folder / "model.onnx")
    np.savez(folder / "data.npz", input=X)
    np.save(folder / "labels.npy", LABELS)
    (folder / "exact.py").write_text(
        "import numpy as np, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(folder / 'model.onnx')!r})\n"
        "def exact(outputs, labels, feeds):\n"
        "    pairs = zip(feeds['input'], outputs['output'])\n"
        "    return float(all(np.allclose(session.run(None, {'input': x})[0], y, 1e-4, 1e-4) for x, y in pairs))\n"
    )
    with compiling(folder, max_drop="5%") as compiled:
        compiled.save(folder / "first")
    return folder


def configured(folder: Path, solved: str = "first", **chosen: Any) -> sparsec.CompileConfig:
    """Data, one thread, no tuning, and the options that were solved for another artifact, where they serve."""
    common = {"calib": folder / "data.npz", "tune": Tune.OFF, "threads": 1, "cache": folder, "method": "obs"}
    return sparsec.CompileConfig(**{**common, "solutions": folder / solved / "cache", **chosen})


class compiling:  # noqa: N801  # reads as contextlib.closing does
    """A compilation of the model, for the length of a block."""

    def __init__(self, folder: Path, model: Any = MODEL, **chosen: Any) -> None:
        self._compiled = sparsec.compile(model, configured(folder, **chosen))

    def __enter__(self) -> CompiledModel:
        return self._compiled

    def __exit__(self, *error: object) -> None:
        self._compiled.close()


def zeros(report: Report) -> dict[str, float]:
    return {decision.layer: decision.zeros_after for decision in report.decisions}


def sparse(report: Report) -> list[str]:
    return [decision.layer for decision in report.decisions if decision.choice == "sparse"]


@pytest.fixture
def no_solving(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("solved again")

    monkeypatch.setattr(options, "solve_all", refuse)


def run(*words: object) -> int:
    """The command line: the exit code."""
    return int(cli.main([str(word) for word in words]))


def common(folder: Path) -> list[object]:
    return [folder / "model.onnx", "--calib", folder / "data.npz", "--tune", "off", "--threads", 1, "--method", "obs"]


# ---- A share of zeros ----


def test_the_share_of_zeros_is_that_of_all_layers_together(folder: Path) -> None:
    share = 0.7
    with compiling(folder, sparsity=share) as compiled:
        report = compiled.report
    found = zeros(report)
    assert abs(np.mean([found[name] for name in FREE]) - share) < 0.02
    assert found["/fc4/Gemm"] == 0
    assert (report.zeros, report.asked) == (pytest.approx(np.mean([found[name] for name in FREE])), share)
    assert sparse(report) == list(FREE)
    assert report.fidelity is not None and report.quality is not None
    assert (report.quality.metric, report.quality.dense) == ("cosine", pytest.approx(1))
    assert (report.frontier, report.missed) == ((), "")


def test_layers_that_are_named_keep_their_own(folder: Path) -> None:
    named = (("/fc2/*", 0.9), ("/fc3/Gemm", 0.0))
    with compiling(folder, sparsity=0.75, layer_sparsity=named) as compiled:
        found = zeros(compiled.report)
    assert found["/fc1/Gemm"] == pytest.approx(0.75, abs=0.02)  # the only one that is free
    assert found["/fc2/Gemm"] == pytest.approx(0.9, abs=0.01)
    assert found["/fc3/Gemm"] == 0


def test_only_named_layers(folder: Path) -> None:
    with compiling(folder, layer_sparsity=(("/fc2/Gemm", 0.75),)) as compiled:
        found = zeros(compiled.report)
    assert found == {**dict.fromkeys(found, 0), "/fc2/Gemm": pytest.approx(0.75, abs=0.01)}


# ---- A speed ----


def test_a_speed_is_reached(folder: Path) -> None:
    with compiling(folder, speedup=2) as compiled:
        report = compiled.report
    assert min(timing.speedup for timing in report.timings) >= 2
    assert report.missed == ""
    assert_frontier(report)
    # No more is pruned than that takes: the point before the chosen one is slower.
    at = [point.chosen for point in report.frontier].index(True)
    assert report.frontier[at - 1].speedups[0] < 2


def test_a_speed_that_nothing_reaches(folder: Path) -> None:
    with compiling(folder, speedup=1000) as compiled:
        report = compiled.report
    reached = report.timings[0].speedup
    assert f"1000x the speed was not reached, {reached:.2f}x was: this is the fastest" in report.missed
    assert all(f"'{name}'" in report.missed for name in FREE)
    assert report.frontier[-1].chosen and reached > 2


def test_a_speed_at_every_batch_size(folder: Path) -> None:
    with compiling(folder, speedup=1.5, batch=(1, 4)) as compiled:
        report = compiled.report
    assert [timing.batch for timing in report.timings] == [1, 4]
    assert min(timing.speedup for timing in report.timings) >= 1.5
    assert all(len(point.speedups) == 2 for point in report.frontier)


# ---- A metric ----


def assert_frontier(report: Report) -> None:
    """From dense to the fastest, and one of them is the artifact."""
    first, points = report.frontier[0], report.frontier
    assert len(points) >= 3
    assert (first.zeros, first.layers, first.speedups) == (0, 0, (1,) * len(report.batch))
    assert report.quality is not None and first.metric == report.quality.dense
    speedups = [point.speedups[0] for point in points]
    assert speedups == sorted(speedups)
    assert [point.nbytes for point in points] == sorted((point.nbytes for point in points), reverse=True)
    assert all(point.metric is not None for point in points)
    (chosen,) = (point for point in points if point.chosen)
    assert chosen.layers == report.sparse_layers


def assert_dense(report: Report, artifact: Path) -> None:
    """The model as it came."""
    assert not sparse(report) and not any(zeros(report).values())
    assert [point.chosen for point in report.frontier][:1] in ([True], [])
    written = onnx.load(artifact / "model.onnx")
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    for tensor in MODEL.graph.initializer:
        assert np.array_equal(weights[tensor.name], onnx.numpy_helper.to_array(tensor))
    assert {node.domain for node in written.graph.node} == {""}
    (found,) = sparsec.load(artifact).run(None, {"input": X})
    assert np.array_equal(found, dense_outputs(X))


def test_a_generous_limit_gives_a_sparse_model(folder: Path) -> None:
    report = json.loads((folder / "first" / "report.json").read_text())
    quality = report["quality"]
    assert (quality["metric"], quality["limit"], report["missed"]) == ("cosine", "5%", "")
    assert 0.95 * quality["dense"] <= quality["value"] <= 1
    assert quality["against"] == "the dense model's outputs"
    layers = {decision["layer"]: decision for decision in report["decisions"]}
    assert any(layers[name]["choice"] == "sparse" and layers[name]["pruned"] for name in FREE)
    assert report["timings"][0]["speedup"] > 1
    # What is written does what the report says.
    (found,) = sparsec.load(folder / "first").run(None, {"input": X[160:]})
    dense = dense_outputs(X[160:])
    cosine = (found * dense).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(dense, axis=1)
    assert cosine.mean() == pytest.approx(quality["value"], abs=1e-5)


def test_more_may_be_lost_more_is_gained(folder: Path, no_solving: None) -> None:
    speeds = []
    for limit in ("0.1%", "5%", "60%"):
        with compiling(folder, max_drop=limit) as compiled:
            assert_frontier(compiled.report)
            assert compiled.report.missed == ""
            speeds.append(compiled.report.timings[0].speedup)
    assert speeds == sorted(speeds) and speeds[0] < speeds[1] < speeds[2]


def test_a_metric_that_any_change_destroys(folder: Path) -> None:
    """The model as it came, and which layers stood in the way."""
    with compiling(folder, max_drop="1%", metric=f"{folder / 'exact.py'}:exact") as compiled:
        report = compiled.report
        compiled.save(folder / "exact")
    assert "within 1% of the dense model's (1) is faster than dense: the artifact is the model as it" in report.missed
    assert all(f"'{name}'" in report.missed for name in FREE)
    assert report.quality is not None and (report.quality.dense, report.quality.value) == (1, 1)
    assert [point.metric for point in report.frontier[1:]] == [0] * (len(report.frontier) - 1)
    assert_dense(report, folder / "exact")


def test_exit_code_3_and_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "missed"
    assert run(*common(folder), "-o", out, "--max-drop", "1%", "--metric", f"{folder / 'exact.py'}:exact") == 3
    shown = capsys.readouterr()
    words = " ".join(shown.err.split())
    assert "the frontier" in shown.out and "missed: no point with" in words
    assert all(f"'{name}'" in words for name in FREE)
    report = json.loads((out / "report.json").read_text())
    assert report["missed"] in words
    assert [point["chosen"] for point in report["frontier"]].index(True) == 0
    assert run(*common(folder), "-o", out, "--speedup", 1000, "-q") == 3
    assert "missed: 1000x the speed was not reached" in capsys.readouterr().err


def test_a_whole_model_that_is_no_faster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers win by themselves, the model with them does not: every slower point is tried, and none is left."""
    whole = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in MODEL.graph.initializer)

    def compare(self: Cpu, dense: Any, sparse: Any, feeds: Any, pairs: int = 7) -> Comparison:
        slow = dense.weight == whole and sparse.weight != whole
        return Comparison(1, 2, 0.5, (0.5, 0.5)) if slow else compared(self, dense, sparse, feeds)

    monkeypatch.setattr(Cpu, "compare", compare)
    with compiling(folder, max_drop="5%") as compiled:
        report = compiled.report
        compiled.save(folder / "no-faster")
    assert "is faster than dense: the artifact is the model as it came" in report.missed
    assert_dense(report, folder / "no-faster")
    with compiling(folder, speedup=2) as compiled:
        assert "2x the speed was not reached, 1.00x was" in compiled.report.missed


def test_labels_beside_the_data(folder: Path) -> None:
    with compiling(folder, max_drop="0.2", labels=folder / "labels.npy") as compiled:
        quality = compiled.report.quality
    assert quality is not None
    assert (quality.metric, quality.against, quality.dense) == ("top1", "labels", 1)
    assert quality.value >= 0.8


def test_data_to_judge_by_may_be_separate(folder: Path) -> None:
    data = [{"input": X[160:], "labels": LABELS[160:]}]
    with compiling(folder, max_drop="20%", calib=[{"input": X[:160]}], eval_data=data) as compiled:
        fidelity, quality = compiled.report.fidelity, compiled.report.quality
    assert fidelity is not None and (fidelity.samples, fidelity.calibrated, fidelity.held_back) == (40, 160, True)
    assert quality is not None and (quality.metric, quality.against) == ("top1", "labels")


def test_a_function_as_the_metric(folder: Path) -> None:
    def distance(outputs: Any, labels: Any, feeds: Any) -> float:
        pairs = zip(outputs["output"], feeds["input"], strict=True)
        return float(np.mean([np.abs(y - dense_outputs(x)).mean() for y, x in pairs]))

    distance.higher_is_better = False  # type: ignore[attr-defined]
    with compiling(folder, max_drop="0.1", metric=distance) as compiled:
        report = compiled.report
    assert report.quality is not None and not report.quality.higher_is_better
    assert report.quality.metric == "distance"
    assert report.quality.value <= report.quality.dense + 0.1
    assert sparse(report)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"labels": LABELS[:150]}, "150 labels for 200 samples; give one label a sample"),
        ({"eval_data": [{"input": X[:8]}], "eval_labels": LABELS[:7]}, "7 labels for at least 8 samples"),
        ({"eval_data": [{"input": X[:8, :5]}]}, r"input 'input' is \[8, 5\], the model expects \['batch', 128\]"),
        ({"eval_data": [{"x": X[:8]}]}, r"has the inputs \['x'\], the model expects \['input'\]"),
        ({"metric": lambda outputs, labels, feeds: 1 / 0}, "it failed .ZeroDivisionError: division by zero"),
        ({"metric": lambda outputs, labels, feeds: None}, "it returned a value of type NoneType"),
        ({"metric": lambda outputs, labels, feeds: float("nan")}, "it returned nan, expected a finite number"),
        ({"metric": "top2"}, "--metric top2: expected top1, top5"),
        ({"metric": "perplexity"}, "--metric perplexity needs labels"),
        ({"metric": "missing.py:f"}, "the file cannot be run"),
        ({"labels": RNG.standard_normal((200, 3)).astype(np.float32)}, "no metric is for labels of float32"),
    ],
)
def test_what_cannot_be_judged_is_said(folder: Path, chosen: Any, words: str) -> None:
    with pytest.raises(SparsecError, match=words):
        sparsec.compile(MODEL, configured(folder, max_drop="1%", **chosen))


def test_a_metric_that_fails_for_pruned_models_only(folder: Path) -> None:
    """A point whose outputs have no metric is outside any limit."""

    def touchy(outputs: Any, labels: Any, feeds: Any) -> float:
        pairs = zip(outputs["output"], feeds["input"], strict=True)
        if not all(np.allclose(y, dense_outputs(x), atol=1e-4) for y, x in pairs):
            raise ValueError("not the dense model")
        return 1.0

    with compiling(folder, max_drop="50%", metric=touchy) as compiled:
        report = compiled.report
        compiled.save(folder / "touchy")
    assert "is faster than dense" in report.missed
    assert [point.metric for point in report.frontier[1:]] == [None] * (len(report.frontier) - 1)
    assert_dense(report, folder / "touchy")


# ---- Training ----


def test_a_limit_of_the_metric_is_searched_with_training(folder: Path) -> None:
    pytest.importorskip("torch")
    plain, trained = (
        compile_report(folder, max_drop="20%", labels=folder / "labels.npy", heal=heal) for heal in (None, "160")
    )
    assert all(point.healed is None for point in plain.frontier)
    tried = [point for point in trained.frontier if point.healed is not None]
    assert tried
    # A state that is no better is not used, and sketches are fitted, which the other column is not.
    assert all(point.healed >= point.metric - 0.05 for point in tried if point.metric and point.healed)
    assert trained.healing is not None
    assert trained.healing.steps <= 80, "half of the limit is for the point that is made"
    assert trained.timings[0].speedup >= 0.98 * plain.timings[0].speedup


def test_what_is_fast_enough_is_trained_in_the_end(folder: Path) -> None:
    pytest.importorskip("torch")
    report = compile_report(folder, speedup=2, labels=folder / "labels.npy", heal="40")
    assert report.healing is not None and report.healing.steps == 40
    assert min(timing.speedup for timing in report.timings) >= 2
    (at,) = [number for number, point in enumerate(report.frontier) if point.healed is not None]
    assert report.frontier[at].chosen


def compile_report(folder: Path, **chosen: Any) -> Report:
    with compiling(folder, **chosen) as compiled:
        return compiled.report


# ---- Another point ----


def first_frontier(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "first" / "report.json").read_text())["frontier"]
    return found


def assert_point(report: Report, point: dict[str, Any], number: int) -> None:
    assert [one.chosen for one in report.frontier].index(True) == number
    found = zeros(report)
    assert np.mean([found[name] for name in FREE]) == pytest.approx(point["zeros"], abs=1e-6)
    assert report.sparse_layers == point["layers"]


def test_a_point_is_picked_and_nothing_solved_again(folder: Path, no_solving: None) -> None:
    """Also one outside the limit, which then was chosen by a person, and is said."""
    points = first_frontier(folder)
    lost = []
    for number in (1, len(points) // 2, len(points) - 1):
        with compiling(folder, max_drop="5%", pick=number) as compiled:
            report = compiled.report
        assert_point(report, points[number], number)
        assert report.quality is not None
        lost.append(1 - report.quality.value / report.quality.dense)
        words = (
            f"point {number}: {report.quality.metric} {report.quality.dense:.4g} -> {report.quality.value:.4g} loses"
        )
        assert (words in report.missed and "allowed to lose 5%" in report.missed) == (lost[-1] > 0.05)
        assert bool(report.missed) == (lost[-1] > 0.05)
    assert lost[-1] > 0.05


def test_point_0_is_the_dense_model(folder: Path, no_solving: None) -> None:
    with compiling(folder, max_drop="5%", pick=0) as compiled:
        report = compiled.report
        compiled.save(folder / "point-0")
    assert report.missed == ""
    assert_dense(report, folder / "point-0")


def test_a_point_that_is_not_there_leaves_the_artifact_as_it_is(
    folder: Path, no_solving: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out, last = folder / "kept", len(first_frontier(folder)) - 1
    shutil.copytree(folder / "first", out)
    before = (out / "manifest.json").read_bytes()
    assert run(*common(folder), "-o", out, "--max-drop", "5%", "--pick", last + 1, "-q") == 2
    words = f"--pick {last + 1}: the frontier has points 0 to {last};"
    assert words in " ".join(capsys.readouterr().err.split())
    assert (out / "manifest.json").read_bytes() == before


def test_a_point_that_a_speed_put_in_between(folder: Path) -> None:
    """The numbers are those of the table that was shown."""
    with compiling(folder, speedup=2) as compiled:
        points = compiled.report.frontier
        compiled.save(folder / "twice")
    number = [point.chosen for point in points].index(True)
    for picked in (number - 1, number, number + 1):
        with compiling(folder, solved="twice", speedup=2, pick=picked) as compiled:
            assert compiled.report.frontier[picked].chosen
            assert compiled.report.frontier[picked].zeros == points[picked].zeros
            reached = compiled.report.timings[0].speedup
            words = f"point {picked} is {reached:.2f}x as fast, 2x was asked for (--speedup)"
            assert compiled.report.missed.startswith(words) if reached < 2 else compiled.report.missed == ""


def test_the_same_command_again_with_a_point(folder: Path, no_solving: None) -> None:
    """In place: the folder is replaced, and what was solved goes along."""
    out = folder / "again"
    with compiling(folder, max_drop="5%") as compiled:
        compiled.save(out)
    points = first_frontier(folder)
    for number in (2, len(points) - 1):
        command = [*common(folder), "-o", out, "--max-drop", "5%", "--pick", number, "-q"]
        code = run(*command)
        report = json.loads((out / "report.json").read_text())
        assert code == (3 if report["missed"] else 0)
        assert [point["chosen"] for point in report["frontier"]].index(True) == number
        assert (out / "cache").is_dir()


@pytest.mark.parametrize(
    "damage", ["deleted", "no table", "an empty table", "other layers", "no arrays", "another key"]
)
def test_solutions_that_are_gone_are_made_again(folder: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = 0
    real = options.solve_all

    def solve_all(*arguments: Any) -> Any:
        nonlocal solved
        solved += 1
        return real(*arguments)

    monkeypatch.setattr(options, "solve_all", solve_all)
    kept = folder / "damaged" / "cache"
    kept.mkdir(parents=True, exist_ok=True)
    for file in (folder / "first" / "cache").iterdir():
        (kept / file.name).write_bytes(file.read_bytes())
    table, arrays = kept / "options.json", kept / "options.npz"
    if damage == "deleted":
        shutil.rmtree(kept)
    elif damage == "no table":
        table.write_text("{")
    elif damage == "an empty table":
        table.write_text("{}")
    elif damage == "other layers":
        table.write_text(table.read_text().replace("/fc2/", "/fc9/"))
    elif damage == "no arrays":
        arrays.write_bytes(b"not an archive")
    else:
        table.write_text(table.read_text().replace('"key": "', '"key": "0'))
    with compiling(folder, solved="damaged", method="magnitude", max_drop="5%", pick=1) as compiled:
        assert compiled.report.sparse_layers == 1
    assert solved == len(FREE)


def test_other_options_other_solutions(folder: Path, no_solving: None) -> None:
    """What the weights depend on; a metric, a limit and a target are not among it."""
    for other in ({"method": "magnitude"}, {"pattern": "group:8"}, {"samples": 100}, {"calib": [{"input": X}]}):
        with pytest.raises(AssertionError, match="solved again"):
            sparsec.compile(MODEL, configured(folder, max_drop="5%", **other))
    for same in ({"max_drop": "1%"}, {"speedup": 1.5}, {"max_drop": "0.5", "metric": "mse"}):
        with compiling(folder, **same) as compiled:
            assert compiled.report.frontier


# ---- What contradicts itself ----


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"sparsity": 0.5, "speedup": 2}, "--sparsity and --speedup: give one target"),
        ({"sparsity": 0.5, "max_drop": "1%"}, "--sparsity and --max-drop: give one target"),
        ({"speedup": 2, "max_drop": "1%"}, "--speedup and --max-drop: give one target"),
        ({"speedup": 2, "max_drop": "1%", "sparsity": 0.5}, "--sparsity and --speedup and --max-drop: give one"),
        ({}, "--calib: nothing is pruned that could be fitted to the data; add --sparsity"),
        ({"pick": 3}, "--pick chooses a point of the frontier of --speedup or --max-drop: add the one it came from"),
        ({"sparsity": 0.5, "pick": 1}, "--pick chooses a point of the frontier of --speedup or --max-drop"),
        (
            {"sparsity": 0.5, "metric": "top2"},
            "--metric top2: expected top1, top5, .*FILE.py:FUNCTION or MODULE:FUNCTION",
        ),
        ({"calib": None, "speedup": 2}, "--speedup needs calibration data: add --calib DATA"),
        ({"calib": None, "max_drop": "1%"}, "--max-drop needs calibration data"),
        ({"calib": None, "sparsity": 0.5, "metric": "mse"}, "--metric needs calibration data"),
        ({"calib": None, "sparsity": 0.5, "labels": LABELS}, "--labels needs calibration data"),
        ({"calib": None, "sparsity": 0.5, "eval_data": "x.npz"}, "--eval needs calibration data"),
        ({"calib": None, "sparsity": 0.5, "method": "obs"}, "--method obs needs calibration data"),
        (
            {"calib": None, "sparsity": 0.5, "pattern": "group:16,block:16x4"},
            "--pattern group:16,block:16x4 needs calibration data",
        ),
        ({"sparsity": 0.5, "values": "fp32,int8"}, "--values fp32,int8: which layer gets which"),
        (
            {"max_drop": "1%", "target": "cpu:skylake"},
            "--speedup and --max-drop need times, and .* is not this machine",
        ),
    ],
)
def test_options_that_contradict_each_other(tmp_path: Path, chosen: Any, words: str) -> None:
    config = {"calib": tmp_path / "missing.npz", "cache": tmp_path, **chosen}
    with pytest.raises(UsageError, match=words):
        sparsec.compile(MODEL, sparsec.CompileConfig(**config))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--speedup", "1"), "--speedup 1.0: should be greater than 1"),
        (("--max-drop", "much"), "--max-drop: 'much' is no drop: expected a share"),
        (("--max-drop", "-1%"), "--max-drop: '-1%' is no drop: expected a share"),
        (("--speedup", "2", "--max-drop", "1%"), "give one target"),
    ],
)
def test_what_is_no_budget(folder: Path, words: Any, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*common(folder), "-o", folder / "none", *words) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
    assert not (folder / "none").exists()


# ---- More ----


def test_of_several_patterns_each_layer_gets_one(folder: Path) -> None:
    with compiling(folder, sparsity=0.6, pattern="group:16,group:32") as compiled:
        report = compiled.report
    assert {decision.pattern for decision in report.decisions if decision.choice == "sparse"} <= {
        "group:16",
        "group:32",
    }
    assert np.mean([zeros(report)[name] for name in FREE]) == pytest.approx(0.6, abs=0.02)


def test_fewer_bits_before_zeros(folder: Path) -> None:
    """Where inputs are independent, rounding to 8 bits loses less than zeros do; by bytes it is four times as fast."""
    np.savez(folder / "independent.npz", input=RNG.standard_normal((400, 128)).astype(np.float32))
    with compiling(folder, speedup=2.5, values="int8", calib=folder / "independent.npz") as compiled:
        report = compiled.report
    chosen = [decision for decision in report.decisions if decision.choice == "sparse"]
    assert [decision.layer for decision in chosen] == list(FREE)
    assert {(decision.values, decision.pattern) for decision in chosen} == {("int8", "block:32x4")}
    assert "float" not in {decision.inputs for decision in chosen}
    # Only what was rounded to zero.
    assert max(zeros(report).values()) < 0.03
    assert report.fidelity is not None and report.fidelity.worst < 0.02


def test_each_layer_gets_its_zeros_and_its_bits(folder: Path) -> None:
    several = {"values": "fp32,int8,codebook16", "pattern": "group:16,block:16x4"}
    with compiling(folder, speedup=5, **several) as compiled:
        report = compiled.report
        compiled.save(folder / "several")
    faster, forms = min(timing.speedup for timing in report.timings), {(d.values, d.pattern) for d in report.decisions}
    assert faster >= 5
    assert {"int8", "codebook16"} & {values for values, _ in forms}, "all in float32"
    assert all(values != "int8" or "x4" in pattern for values, pattern in forms), "integers were not multiplied"
    # Pruned alone it would take more zeros, and more of the outputs.
    with compiling(folder, speedup=faster) as compiled:
        plain = compiled.report
    assert report.fidelity is not None and plain.fidelity is not None
    assert report.fidelity.worst < plain.fidelity.worst


def test_the_same_bytes_each_time(folder: Path) -> None:
    """Of the weights: solving, choosing and fitting depend on nothing but the model, the data and the options."""
    found = []
    for name in ("one", "two"):
        with compiling(folder, solved="nowhere", max_drop="5%") as compiled:
            compiled.save(folder / name)
        found.append((folder / name / "model.onnx").read_bytes())
    assert found[0] == found[1] == (folder / "first" / "model.onnx").read_bytes()


def test_a_table_of_sensitivity(folder: Path) -> None:
    table = sensitivity(MODEL, configured(folder, solutions=None))
    assert [layer.name for layer in table.layers] == list(FREE)
    assert (table.batch, table.samples) == ((1,), 160)
    for layer in table.layers:
        assert layer.shape == (128, 128) and layer.obstacle == ""
        assert [option.zeros for option in layer.options] == pytest.approx(LEVELS, abs=0.01)
        for errors in ([option.error for option in layer.options], [option.layer_error for option in layer.options]):
            assert errors == sorted(errors) and errors[0] > 0
        speeds = [option.speedups[0] for option in layer.options]
        assert speeds == sorted(speeds)


def test_sensitivity_by_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sensitivity", *common(folder), "--json", folder / "table.json") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "model.onnx, group:16" in shown and "relative error of the model's outputs" in shown
    assert all(name in shown for name in FREE)
    document = json.loads((folder / "table.json").read_text())
    assert [layer["name"] for layer in document["layers"]] == list(FREE)
    assert set(document["layers"][0]["options"][0]) == {"pattern", "zeros", "layer_error", "error", "speedups"}
    assert run("sensitivity", folder / "model.onnx") == 2
    assert "sensitivity needs calibration data: add --calib DATA" in " ".join(capsys.readouterr().err.split())


def test_measured(tmp_path: Path) -> None:
    """With the clock, whatever it says: the report agrees with itself."""
    model = mlp((256, 512, 512))
    x = (RNG.standard_normal((64, 32)) @ RNG.standard_normal((32, 256))).astype(np.float32)
    config = sparsec.CompileConfig(
        calib=[{"input": x}],
        speedup=1.3,
        method="magnitude",
        layer_sparsity=(("*", 0.9),),
        tune=Tune.OFF,
        threads=1,
        cache=tmp_path,
    )
    compiled = sparsec.compile(model, config)
    report = compiled.report
    compiled.close()
    reached = min((timing.speedup for timing in report.timings), default=1.0)
    assert (report.missed == "") == (reached >= 1.3)
    assert bool(sparse(report)) == bool(report.timings)
    assert report.missed == "" or "1.3x the speed" in report.missed
