"""Numbers and names as the tables show them, and the bar."""

from __future__ import annotations

import io
import itertools
import time

import numpy as np
import pytest
from rich.console import Console

from sparsec.compiler.cli import progress
from sparsec.compiler.cli.text import count, factor, fold, number, percent, shorten, size
from sparsec.compiler.verify import difference

NAME = "/encoder/layer.10/attention/self/query/MatMul"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1e-9, "0.000000"),
        (0.0061, "0.00610"),
        (0.0213, "0.0213"),
        (6.406, "6.41"),
        (9.999, "10.0"),
        (90.14, "90.1"),
        (99.96, "100"),
        (2250, "2,250"),
        (123456, "123,456"),
        (float("inf"), "inf"),
    ],
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (0.001, "<1 %"), (0.9, "90 %"), (0.667, "67 %"), (0.9999, "99.9 %"), (1, "100 %")],
)
def test_percent(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(("value", "text"), [(0.944, "0.94x"), (9.996, "10.0x"), (14.13, "14.1x"), (160.7, "161x")])
def test_factor(value, text):
    assert factor(value) == text


@pytest.mark.parametrize(
    ("bytes_", "text"), [(512, "512 B"), (3163737, "3.16 MB"), (999_900, "1.00 MB"), (2_500_000_000, "2.50 GB")]
)
def test_size(bytes_, text):
    assert size(bytes_) == text


def test_count():
    assert [count(1, "layer"), count(1200, "layer")] == ["1 layer", "1,200 layers"]


@pytest.mark.parametrize("width", [4, 16, 30, 44, 45])
def test_shorten_keeps_both_ends(width):
    short = shorten(NAME, width)
    assert len(short) == width
    assert short == NAME or (".." in short and short[0] == "/" and short[-1] == "l")


def test_fold_breaks_behind_a_separator():
    assert fold(NAME, 30) == ["/encoder/layer.10/attention/", "self/query/MatMul"]


@pytest.mark.parametrize("name", [NAME, "x" * 100, "a", ""])
def test_fold_keeps_what_fits(name):
    for width, lines in itertools.product(range(8, 60), (1, 2, 3)):
        folded = fold(name, width, lines)
        assert len(folded) <= lines
        assert max(map(len, folded)) <= width
        assert "".join(folded) == (name if len(name) <= width * lines else shorten(name, width * lines))


def make_bars(monkeypatch, terminal, **options):
    stream = io.StringIO()
    monkeypatch.setattr(progress, "errors", lambda: Console(file=stream, force_terminal=terminal, width=80))
    return progress.Bars(**options), stream


def work(bars):
    with bars:
        bars.advance()  # before any stage: nothing to show, no harm
        bars.start("tuning kernels", 2)
        bars.advance("a" * 200)
        bars.start("measuring", None)
        bars.advance()


def test_bars_on_a_terminal(monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    bars, stream = make_bars(monkeypatch, True)
    with bars:
        bars.start("tuning kernels", 2)
        time.sleep(0.2)
        bars.advance("a" * 200)
    assert "tuning kernels" in stream.getvalue()
    assert "1/2" in stream.getvalue()


@pytest.mark.parametrize(
    ("terminal", "options"), [(False, {}), (True, {"quiet": True}), (False, {"quiet": True, "verbose": True})]
)
def test_bars_that_show_nothing(monkeypatch, terminal, options):
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    bars, stream = make_bars(monkeypatch, terminal, **options)
    work(bars)
    assert stream.getvalue() == ""


def test_short_work_shows_no_bar(monkeypatch):
    bars, stream = make_bars(monkeypatch, True)
    work(bars)
    assert stream.getvalue() == ""


# How verify compares two outputs

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("expected", "found", "absolute", "relative"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0, 0),
        ([1.0, -4.0], [1.5, -4.0], 0.5, 0.125),
        ([NAN, INF, 2.0], [NAN, INF, 2.0], 0, 0),
        ([NAN, 2.0], [1.0, 2.0], INF, INF),
        ([INF, 2.0], [-INF, 2.0], INF, INF),
        ([0.0, 0.0], [0.0, 1e-9], 1e-9, INF),
        ([1, 5], [1, 4], 1, 0.2),
        ([True, False], [True, True], 0.5, 0.5),
        (["a", "b"], ["a", "b"], 0, 0),
    ],
)
def test_difference(expected, found, absolute, relative):
    error = difference("y", np.array(expected), np.array(found))
    assert (error.absolute, error.relative) == (pytest.approx(absolute), pytest.approx(relative))


def test_difference_of_what_cannot_be_compared():
    assert difference("y", np.zeros((1, 10)), np.zeros((1, 12))).mismatch == "shape [1, 12] against [1, 10]"
    assert difference("y", np.zeros(3), np.zeros(3, np.float32)).mismatch == "type float32 against float64"
    assert difference("y", [{1: 0.5}], [{1: 0.5}]).relative == 0
    assert difference("y", [{1: 0.5}], [{1: 0.4}]).mismatch == "values differ"
    assert difference("y", np.zeros((0, 4)), np.zeros((0, 4))).absolute == 0
