"""Channels left out and what is left trained: as exact as without, better where it is used, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import sparsec
from sparsec import CompileConfig, UsageError
from sparsec.compiler.budget.judge import Judge
from sparsec.compiler.config import Tune
from sparsec.compiler.exporter import session_source
from sparsec.compiler.frontend import read
from sparsec.compiler.machine import Cpu
from sparsec.compiler.runtime import random_feeds
from sparsec.models.lstm_lm import lstm_lm
from sparsec.models.mlp import mlp
from sparsec.models.tinyvgg16 import tinyvgg16
from sparsec.models.transformer import EncoderConfig, encoder

if TYPE_CHECKING:
    from sparsec.compiler.report import Report

pytest.importorskip("torch")

ASSETS = Path(__file__).resolve().parents[2].parent / "shared" / "assets" / "models"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the models of ../shared/assets are not on this machine")

RNG = np.random.default_rng(0)
MODEL = mlp((128, 128, 128, 10))
# Inputs of 24 directions, and the dense model's own choices as labels.
X = (RNG.standard_normal((1500, 24)) @ RNG.standard_normal((24, 128)) / 24**0.5).astype(np.float32)
LABELS = np.asarray(Cpu(1).open(MODEL.SerializeToString()).run(None, {"input": X})[0]).argmax(1)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    np.savez(tmp_path / "data.npz", input=X, labels=LABELS)
    own = {"calib": tmp_path / "data.npz", "cache": tmp_path, "tune": Tune.OFF, "threads": 1, "samples": 1500}
    return {"pattern": "structured", "sparsity": 0.85, **own}


def report_of(model: Any = MODEL, **given: Any) -> Report:
    return sparsec.compile(model, CompileConfig(**given)).report


def test_training_brings_accuracy_back(options: dict[str, Any], smaller_wins: None) -> None:
    plain, trained = (report_of(**{**options, "heal": heal}) for heal in (None, "200"))
    record = trained.healing
    assert plain.healing is None and record is not None
    assert (record.steps, record.samples, record.kept, record.note) == (200, 1200, True, "")
    assert record.before is not None and record.after is not None and record.after > record.before + 0.05
    # What is said of training is true of the artifact.
    assert trained.quality is not None and trained.quality.value == pytest.approx(record.after, abs=0.01)
    assert trained.verification is not None and trained.verification.error < 1e-5
    shapes = [decision.shape_after for decision in trained.decisions]
    assert shapes == [decision.shape_after for decision in plain.decisions] and shapes[0] is not None
    assert trained.bytes_after == pytest.approx(plain.bytes_after, rel=0.01)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(tinyvgg16(channels=(16, 16, 32, 32, 32), dense=64, classes=10), id="tinyvgg16"),
        pytest.param(encoder(EncoderConfig(layers=2, hidden=24, heads=3, ffn=64, vocabulary=50)), id="encoder"),
        pytest.param(ASSETS / "resnet20_cifar10.onnx", id="resnet20", marks=needs_assets),
    ],
)
def test_the_smaller_model_equals_the_masked_one_after_training(
    options: dict[str, Any], smaller_wins: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Any
) -> None:
    looks = iter(range(1000))
    # The last state is always liked best.
    monkeypatch.setattr(Judge, "rank", lambda self, error, value: (float(next(looks)), -error))
    session = Cpu(1).open(session_source(read(model).model, tmp_path))
    runs = [random_feeds(session, 2, {}, seed, other=8) for seed in range(5)]
    report = report_of(model, **{**options, "sparsity": 0.5, "calib": runs, "heal": "3"})
    assert report.healing is not None and report.healing.kept and report.healing.steps == 3
    assert report.smaller_layers and report.verification is not None and report.verification.error < 1e-5


def test_the_same_steps_give_the_same_and_more_go_on(
    options: dict[str, Any], smaller_wins: None, tmp_path: Path
) -> None:
    kept = {**options, "solutions": tmp_path / "out" / "cache"}
    first = sparsec.compile(MODEL, CompileConfig(heal="20", **kept))
    first.save(tmp_path / "out")
    assert [path.suffix for path in (tmp_path / "out" / "cache").glob("training-*")] == [".pt"]
    second = sparsec.compile(MODEL, CompileConfig(heal="20", **options))
    assert np.array_equal(first.run({"input": X[:7]})["output"], second.run({"input": X[:7]})["output"])
    longer = report_of(heal="30", **kept).healing
    assert longer is not None and longer.steps == 30


def test_a_limit_of_the_metric_counts_what_training_brings(
    options: dict[str, Any], as_fast_as_it_is_small: None
) -> None:
    budget = {**options, "sparsity": None, "max_drop": "25%"}
    plain, trained = (report_of(**{**budget, "heal": heal}) for heal in (None, "300"))
    assert plain.quality is not None and trained.quality is not None and trained.healing is not None
    assert trained.quality.value >= 0.75 * trained.quality.dense
    assert not any(point.healed for point in plain.frontier)
    (chosen,) = [point for point in trained.frontier if point.chosen]
    assert chosen.healed == pytest.approx(trained.quality.value, abs=0.01)
    assert sum(point.healed is not None for point in trained.frontier) <= 4  # by halves
    assert chosen.metric is not None and chosen.healed is not None and chosen.healed > chosen.metric
    assert trained.timings[0].speedup >= plain.timings[0].speedup


def test_few_samples_to_judge_training_by_are_said(options: dict[str, Any], smaller_wins: None) -> None:
    runs = [{"input": part} for part in np.split(X[:50], 10)]
    for given in ({"sparsity": 0.5}, {"sparsity": None, "speedup": 1.5, "pick": 1}):
        notes = report_of(mlp((128, 64, 10)), **{**options, "calib": runs, "heal": "1", **given}).notes
        assert any("by only 10 samples that no weight is fitted to" in note for note in notes), notes


def test_units_of_recurrent_layers_stay(options: dict[str, Any], smaller_wins: None) -> None:
    model = lstm_lm(vocabulary=60, embedding=32, hidden=32)
    session = Cpu(1).open(model.SerializeToString())
    runs = [random_feeds(session, 2, {}, seed, other=8) for seed in range(5)]
    given = {**options, "sparsity": 0.2, "calib": runs, "heal": "2"}
    recurrent = [d for d in report_of(model, **given).decisions if d.op_type == "LSTM"]
    assert len(recurrent) == 2 and all(d.shape_after is None or d.shape_after[0] == d.shape[0] for d in recurrent)
    assert all(d.reason.endswith("units of recurrent layers stay with --heal") for d in recurrent)


def test_nothing_to_train_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--heal: nothing is pruned"):
        report_of(**{**options, "sparsity": None, "heal": "5"})
    with pytest.raises(UsageError, match="channels that make no difference leave nothing to train"):
        report_of(**{**options, "sparsity": None, "layer_sparsity": (("/fc1/*", 0.0),), "heal": "5"})
