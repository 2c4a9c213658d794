"""Metrics against references written out by hand, what chooses them, and what they say of data that does not fit."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsec.compiler.calibration import Drop, Metric, Run, default_metric, find_metric, parse_drop
from sparsec.compiler.calibration.metrics import NAMES
from sparsec.ir import SparsecError, UsageError

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def labelled(outputs: np.ndarray, labels: np.ndarray, cuts: tuple[int, ...] = (3,)) -> list[Run]:
    """Samples in two runs or more: a metric is of all samples, not a mean of runs."""
    pairs = zip(np.split(outputs, cuts), np.split(labels, cuts), strict=True)
    return [Run({}, {"other": np.zeros(1, np.int64), "y": y}, labels=label) for y, label in pairs]


def compared(found: dict[str, np.ndarray], dense: dict[str, np.ndarray], cut: int = 3) -> list[Run]:
    return [
        Run({}, {name: y[part] for name, y in found.items()}, {name: y[part] for name, y in dense.items()})
        for part in (slice(cut), slice(cut, None))
    ]


def score(name: str, runs: list[Run]) -> float:
    return find_metric(name, runs[0].labels is not None).score(iter(runs))


# ---- With labels ----


@pytest.mark.parametrize("extra", [(), (1,), (1, 1)])
@pytest.mark.parametrize(("name", "k"), [("top1", 1), ("top5", 5)])
def test_top(name: str, k: int, extra: tuple[int, ...]) -> None:
    y, labels = floats(50, 12), RNG.integers(0, 12, 50)
    hits = [label in sorted(range(12), key=lambda i: -row[i])[:k] for row, label in zip(y, labels, strict=True)]
    runs = labelled(y.reshape(50, 12, *extra), labels)
    assert score(name, runs) == pytest.approx(sum(hits) / 50, abs=1e-12)


def test_a_model_that_has_no_preference_is_not_right() -> None:
    """All classes the same: the first counts as chosen, so that ties are not hits."""
    assert score("top1", labelled(np.zeros((10, 10), np.float32), np.arange(10))) == pytest.approx(0.1)
    assert score("top5", labelled(np.zeros((10, 10), np.float32), np.arange(10))) == pytest.approx(0.5)


def test_mse() -> None:
    y, labels = floats(7, 3), floats(7, 3)
    mean = sum((float(a) - float(b)) ** 2 for a, b in zip(y.flat, labels.flat, strict=True)) / 21
    assert score("mse", labelled(y, labels)) == pytest.approx(mean, rel=1e-6)
    assert score("mse", labelled(y[:, :1], labels[:, 0])) == pytest.approx(
        float(np.mean((y[:, 0].astype(float) - labels[:, 0]) ** 2)), rel=1e-6
    )


def test_cosine() -> None:
    y, labels = floats(7, 3, 2), floats(7, 3, 2)
    cosines = [
        float(a.ravel() @ b.ravel()) / math.sqrt(float(a.ravel() @ a.ravel()) * float(b.ravel() @ b.ravel()))
        for a, b in zip(y.astype(float), labels.astype(float), strict=True)
    ]
    assert score("cosine", labelled(y, labels)) == pytest.approx(sum(cosines) / 7, rel=1e-6)


def ranks(values: list[float]) -> list[float]:
    """The mean rank of those that are equal."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    x, y = ranks(a.ravel().tolist()), ranks(b.ravel().tolist())
    return float(np.corrcoef(x, y)[0, 1])


@pytest.mark.parametrize("shape", [(20,), (20, 1)])
def test_spearman(shape: tuple[int, ...]) -> None:
    y = RNG.integers(0, 6, shape).astype(np.float32)  # with ties
    labels = (y.reshape(20) + RNG.integers(0, 4, 20)).astype(np.float64)
    assert score("spearman", labelled(y, labels)) == pytest.approx(spearman(y, labels), rel=1e-12)
    assert score("spearman", labelled(y, y.reshape(20) ** 3)) == pytest.approx(1.0)
    assert score("spearman", labelled(np.ones(shape, np.float32), labels)) == 0  # a model that tells nothing


def test_perplexity() -> None:
    logits, labels = 3 * floats(4, 5, 11), RNG.integers(0, 11, (4, 5))
    labels[1, 2:], labels[3, 0] = -100, -1
    lost, count = 0.0, 0
    for n, t in np.ndindex(4, 5):
        if labels[n, t] >= 0:
            row = [math.exp(v) for v in logits[n, t].astype(float)]
            lost -= math.log(row[labels[n, t]] / sum(row))
            count += 1
    expected = math.exp(lost / count)
    assert score("perplexity", labelled(logits, labels, (1,))) == pytest.approx(expected, rel=1e-6)
    flat = labelled(logits.reshape(20, 11), labels.reshape(20))
    assert score("perplexity", flat) == pytest.approx(expected, rel=1e-6)
    # Log probabilities and probabilities are taken for what they are; runs may have other lengths.
    wide = np.exp(logits.astype(float))
    shares = (wide / wide.sum(-1, keepdims=True)).astype(np.float32)
    assert score("perplexity", labelled(shares, labels)) == pytest.approx(expected, rel=1e-5)
    assert score("perplexity", labelled(np.log(shares), labels)) == pytest.approx(expected, rel=1e-5)
    parts = [Run({}, {"y": logits[:2, :3]}, labels=labels[:2, :3]), Run({}, {"y": logits[2:]}, labels=labels[2:])]
    assert math.isfinite(score("perplexity", parts))
    assert score("perplexity", labelled(np.zeros((4, 5, 11), np.float32), labels)) == pytest.approx(11)


def test_a_token_that_is_impossible_is_worse_than_any_limit() -> None:
    logits = np.array([[0.0, -np.inf]], np.float32)
    assert 1e300 < score("perplexity", [Run({}, {"y": logits}, labels=np.array([1]))]) < math.inf


# ---- Against the dense model ----


@pytest.mark.parametrize("name", [name for name in NAMES if name != "perplexity"])
@pytest.mark.parametrize("shape", [(90, 8), (90, 4, 8), (90, 8, 1, 1)])
def test_the_dense_model_is_like_itself(name: str, shape: tuple[int, ...]) -> None:
    outputs = {"y": floats(*shape), "z": floats(90, 3)}
    metric = find_metric(name, False)
    assert metric.reference and not metric.needs_labels
    perfect = 0.0 if name == "mse" else 1.0
    assert metric.score(compared(outputs, outputs)) == pytest.approx(perfect, abs=1e-12)
    worse = metric.score(compared({k: v + 3 * floats(*v.shape) for k, v in outputs.items()}, outputs))
    assert metric.drop(perfect, worse)[0] > 0.05


def test_agreement_is_with_the_dense_choice() -> None:
    dense, y = floats(40, 9), floats(40, 9)
    agree = [int(a.argmax() == b.argmax()) for a, b in zip(dense, y, strict=True)]
    assert score("top1", compared({"y": y}, {"y": dense})) == pytest.approx(sum(agree) / 40)
    tokens = compared({"y": y.reshape(8, 5, 9)}, {"y": dense.reshape(8, 5, 9)})
    assert score("top1", tokens) == pytest.approx(sum(agree) / 40)
    near = [int((b > b[a.argmax()]).sum() < 5) for a, b in zip(dense, y, strict=True)]
    assert score("top5", compared({"y": y}, {"y": dense})) == pytest.approx(sum(near) / 40)


def test_every_output_counts_the_same_whatever_its_size() -> None:
    dense = {"y": floats(6, 10), "z": 1000 * floats(6, 10)}
    found = {"y": -dense["y"], "z": dense["z"]}
    assert score("cosine", compared(found, dense)) == pytest.approx(0)
    assert score("mse", compared(found, dense)) == pytest.approx(2)
    assert score("spearman", compared(found, dense)) == pytest.approx(0)


def test_relative_error_is_summed_over_runs() -> None:
    dense, y = floats(6, 10).astype(np.float64), floats(6, 10).astype(np.float64)
    expected = ((y - dense) ** 2).sum() / (dense**2).sum()
    assert score("mse", compared({"y": y}, {"y": dense})) == pytest.approx(expected, rel=1e-9)
    zero = np.zeros((6, 10), np.float32)
    assert score("mse", compared({"y": zero}, {"y": zero})) == 0
    assert score("mse", compared({"y": zero + 1}, {"y": zero})) == 1


def test_one_number_a_sample_is_compared_over_all_samples() -> None:
    """By itself each would be like any other of its sign."""
    dense, y = np.abs(floats(12, 1)).astype(float), np.abs(floats(12, 1)).astype(float)
    cosine = float((dense * y).sum() / np.sqrt((dense**2).sum() * (y**2).sum()))
    assert score("cosine", compared({"y": y}, {"y": dense})) == pytest.approx(cosine, rel=1e-9)
    assert score("spearman", compared({"y": y}, {"y": dense})) == pytest.approx(spearman(y, dense), rel=1e-9)


def test_zeros_are_like_zeros_only() -> None:
    zero, one = np.zeros((4, 3), np.float32), np.ones((4, 3), np.float32)
    for name in ("cosine", "spearman"):
        assert score(name, compared({"y": zero}, {"y": zero})) == 1
        assert score(name, compared({"y": zero}, {"y": one * np.arange(3, dtype=np.float32)})) == 0


def test_perplexity_needs_labels() -> None:
    with pytest.raises(UsageError, match=r"needs labels .* take top1"):
        find_metric("perplexity", False)


# ---- Which metric ----


@pytest.mark.parametrize(
    ("labels", "output", "expected"),
    [
        (np.zeros(8, np.int64), (8, 10), "top1"),
        (np.zeros((8, 1), np.int32), (8, 10, 1, 1), "top1"),
        (np.zeros((8, 6), np.int64), (8, 6, 50), "perplexity"),
        (np.zeros(8, np.float32), (8, 1), "spearman"),
        (np.zeros((8, 1), np.int64), (8,), "spearman"),
        (np.zeros((8, 4), np.float32), (8, 4), "mse"),
        (None, (8, 10), "cosine"),
    ],
)
def test_the_default(labels: np.ndarray | None, output: tuple[int, ...], expected: str) -> None:
    metric = default_metric(labels, {"label": np.zeros(8, np.int64), "y": np.zeros(output, np.float32)})
    assert metric.name == expected
    assert metric.needs_labels == (labels is not None) != metric.reference
    assert metric.higher_is_better == (expected not in ("mse", "perplexity"))


def test_labels_that_no_metric_is_for() -> None:
    with pytest.raises(UsageError, match=r"labels of float32\[8, 3\] and the output 'y' \[8, 10\]: name one"):
        default_metric(np.zeros((8, 3), np.float32), {"y": np.zeros((8, 10), np.float32)})
    with pytest.raises(SparsecError, match="the model has none"):
        default_metric(np.zeros(8), {"y": np.zeros(8, np.int64)})


@pytest.mark.parametrize("name", ["top2", "metric.py", "metric.py:", ":f", "a b:f", 7])
def test_no_metric(name: Any) -> None:
    with pytest.raises(UsageError, match=r"--metric .* expected top1, top5, mse"):
        find_metric(name, True)


# ---- What does not fit ----

Y = floats(8, 10)


@pytest.mark.parametrize(
    ("name", "runs", "words"),
    [
        ("top1", labelled(Y, floats(8)), "labels must be integers, the numbers of classes; these are float32"),
        ("top1", labelled(Y, np.arange(3, 11)), "there is a label 10, and the output 'y' has the classes 0 to 9"),
        ("top1", labelled(Y, np.zeros((8, 2), int)), r"labels are \[3, 2\], and the output 'y' \[3, 10\] needs \[3\]"),
        ("top1", labelled(Y[:, 0], np.zeros(8, int)), r"needs an output \[N, classes\] .* 'y', is \[3\]"),
        ("top1", labelled(Y, np.full(8, -100)), "no label counts"),
        ("top5", labelled(Y[:, :5], np.zeros(8, int)), "of 5 classes the label is always among the top 5; take top1"),
        ("mse", labelled(Y, floats(8, 9)), r"labels are \[3, 9\], and the output 'y' is \[3, 10\]"),
        ("mse", labelled(Y, np.full((8, 10), np.nan)), "labels have NaN"),
        ("spearman", labelled(Y, floats(8, 10)), "one number a sample"),
        ("spearman", labelled(Y[:, 0], np.ones(8)), "all labels are 1"),
        ("spearman", [Run({}, {"y": Y[:1, 0]}, labels=np.ones(1))], "two samples"),
        ("cosine", labelled(np.full((8, 10), np.nan, np.float32), Y), "the output 'y' has NaN values"),
        ("cosine", compared({"y": Y}, {"y": Y * np.nan}), "the dense model's output 'y' has NaN values"),
        ("cosine", compared({"y": Y}, {"z": Y}), "the output 'z' is missing"),
        ("mse", compared({"y": Y}, {"y": Y[:, :4]}), r"the output 'y' is \[3, 10\], and the dense model's is \[3, 4\]"),
        ("mse", compared({"y": Y * np.inf}, {"y": Y}), "is inf, no finite number"),
        ("cosine", [Run({}, {"y": np.zeros(3, np.int64)}, {"y": Y})], "needs an output of floats"),
    ],
)
def test_what_does_not_fit_is_said(name: str, runs: list[Run], words: str) -> None:
    with pytest.raises(SparsecError, match=words) as caught:
        score(name, runs)
    assert str(caught.value).startswith(f"metric '{name}'")


def test_what_a_run_lacks() -> None:
    with pytest.raises(SparsecError, match="metric 'top1': it needs labels"):
        find_metric("top1", True).score([Run({}, {"y": Y})])
    with pytest.raises(SparsecError, match="metric 'top1': it compares with the dense model's outputs"):
        find_metric("top1", False).score([Run({}, {"y": Y})])
    with pytest.raises(SparsecError, match="no sample"):
        find_metric("top1", True).score([])


# ---- A user's function ----


def test_a_function_sees_all_runs() -> None:
    def last(outputs: dict[str, list[Any]], labels: Any, feeds: dict[str, list[Any]]) -> float:
        assert [len(y) for y in outputs["y"]] == [3, 5]
        assert [len(x) for x in feeds["x"]] == [3, 5]
        return float(labels[-1])

    runs = [Run({"x": Y[part]}, {"y": Y[part]}, labels=np.arange(8)[part]) for part in (slice(3), slice(3, None))]
    metric = find_metric(last, True)
    assert (metric.name, metric.higher_is_better, metric.needs_labels, metric.reference) == ("last", True, False, False)
    assert metric.score(iter(runs)) == 7
    assert find_metric(metric, False) is metric


def test_labels_of_a_function() -> None:
    """One array; of several lengths one a run; none."""
    seen: list[Any] = []

    def metric(outputs: Any, labels: Any, feeds: Any) -> float:
        seen.append(labels)
        return 0

    find_metric(metric, True).score([Run({}, {}, labels=np.zeros((2, 3))), Run({}, {}, labels=np.zeros((1, 4)))])
    find_metric(metric, False).score([Run({}, {})])
    assert [array.shape for array in seen[0]] == [(2, 3), (1, 4)]
    assert seen[1] is None


FILE = """
from __future__ import annotations
import dataclasses
import beside

@dataclasses.dataclass
class Kept:
    number: float

def error(outputs, labels, feeds):
    return Kept(beside.NUMBER).number
error.higher_is_better = False

def fails(outputs, labels, feeds):
    return outputs["logits"]

def odd(outputs, labels, feeds):
    return 1
odd.higher_is_better = "no"

nothing = lambda outputs, labels, feeds: None
infinite = lambda outputs, labels, feeds: float("nan")
number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A file with functions, which imports one beside it."""
    (tmp_path / "beside.py").write_text("NUMBER = 0.25\n")
    (tmp_path / "own_metric.py").write_text(FILE)
    yield tmp_path / "own_metric.py"
    sys.modules.pop("beside", None)
    sys.modules.pop("own_metric", None)


def test_a_function_of_a_file_or_module(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Run({}, {"y": Y})]
    metric = find_metric(f"{file}:error", False)
    assert metric.score(runs) == 0.25
    assert metric.name == f"{file}:error" and not metric.higher_is_better
    monkeypatch.chdir(file.parent)
    assert find_metric("own_metric:error", False).score(runs) == 0.25


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", r"fails': it failed \(KeyError: 'logits'\); it was called with outputs of \['y'\], labels of None"),
        ("nothing", "nothing': it returned a value of type NoneType .* expected one number"),
        ("infinite", "infinite': it returned nan, expected a finite number"),
        ("odd", "odd': its higher_is_better is 'no', expected True or False"),
        ("other", "the file has no 'other'"),
        ("number", "'number' is of type int, expected a function"),
    ],
)
def test_a_function_that_does_not_serve(file: Path, name: str, words: str) -> None:
    with pytest.raises(SparsecError, match=words):
        find_metric(f"{file}:{name}", False).score([Run({}, {"y": Y})])


def test_a_file_that_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys\nsys.exit(3)\n")
    for name in (f"{tmp_path / 'script.py'}:f", f"{tmp_path / 'missing.py'}:f", "no_such_module.here:f"):
        with pytest.raises(SparsecError, match=r"metric '.*:f': the file cannot be run \("):
            find_metric(name, False)


# ---- How much worse ----


@pytest.mark.parametrize(("name", "dense", "value"), [("top1", 0.8, 0.76), ("perplexity", 20.0, 21.0)])
def test_drop_is_positive_where_worse(name: str, dense: float, value: float) -> None:
    metric = find_metric(name, True)
    assert metric.drop(dense, value) == (pytest.approx(abs(dense - value)), pytest.approx(0.05))
    assert metric.drop(value, dense)[0] < 0
    assert parse_drop("5%").allows(metric, dense, value)
    assert not parse_drop("4.9%").allows(metric, dense, value)
    assert parse_drop("0%").allows(metric, value, dense)


def test_a_difference_of_floats_is_what_it_looks_like() -> None:
    metric = find_metric("top1", True)
    assert 0.76 - 0.75 > 0.01
    assert parse_drop("0.01").allows(metric, 0.76, 0.75)
    assert not parse_drop("0.01").allows(metric, 0.76, 0.7499)
    assert parse_drop("1%").allows(metric, 1.0, 0.99)


def test_a_share_of_nothing_is_the_difference() -> None:
    metric = find_metric("mse", False)
    assert metric.drop(0.0, 0.02) == (0.02, 0.02)
    assert parse_drop("2%").allows(metric, 0.0, 0.02)
    assert not parse_drop("1%").allows(metric, 0.0, 0.02)
    assert metric.drop(-0.5, -0.25)[1] == 0.5  # a metric of a user may be negative


@pytest.mark.parametrize(
    ("text", "drop", "shown"),
    [
        ("1%", Drop(0.01, True), "1%"),
        (" 0.7 % ", Drop(0.7 / 100, True), "0.7%"),
        ("0.01", Drop(0.01, False), "0.01"),
        ("0", Drop(0.0, False), "0"),
        ("150%", Drop(1.5, True), "150%"),
    ],
)
def test_the_text_of_a_drop(text: str, drop: Drop, shown: str) -> None:
    assert parse_drop(text) == drop
    assert str(drop) == shown


@pytest.mark.parametrize("text", ["", "%", "-1%", "nan", "inf", "one", "1%%", "1 point"])
def test_no_drop(text: str) -> None:
    with pytest.raises(UsageError, match=f"'{text}' is no drop: expected"):
        parse_drop(text)


def test_metrics_are_values() -> None:
    assert isinstance(hash(find_metric("top1", True)), int)
    assert isinstance(find_metric("top1", True), Metric)
