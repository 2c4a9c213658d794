"""Walk: a model in pieces computes what it computes as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from sparsec.compiler.calibration import Trial, Weights
from sparsec.compiler.calibration.walk import Walk
from sparsec.compiler.frontend import read
from sparsec.compiler.machine import Cpu

CPU = Cpu(1)
RESIDUAL = """
    h = MatMul(x, A)  r = Relu(h)  s = Add(r, x)  g = MatMul(s, B)  t = Add(g, s)  y = MatMul(t, C)
"""
BRANCH = """
    h = MatMul(x, A)  zero = Constant <value = float {0}> ()  sum = ReduceSum <keepdims = 0> (h)
    positive = Greater(sum, zero)
    g = If (positive) <
        then_branch = yes () => (float[n,8] a) { a = Relu(h) },
        else_branch = no () => (float[n,8] b) { b = Neg(h) }
    >
    y = MatMul(g, B)
"""
SEQUENCE = """
    h = MatMul(x, A)  two = Constant <value = int64 {4}> ()  parts = SplitToSequence <axis = 1> (h, two)
    g = MatMul(x, B)  joined = ConcatFromSequence <axis = 1> (parts)  s = Add(joined, g)  y = MatMul(s, C)
"""


def model(body: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[n,8] x) => (float[n,8] y) {{ {body} }}'
    result = parser.parse_model(text)
    for name in "ABC":
        if f", {name})" in body:
            tensor = onnx.numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), name)
            result.graph.initializer.append(tensor)
    onnx.checker.check_model(result, full_check=True)
    return result


@pytest.mark.parametrize("body", [RESIDUAL, BRANCH, SEQUENCE], ids=["residual", "branch", "sequence"])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_reaches_the_layers_is_what_reaches_them_in_the_whole_model(body: str, sign: int, tmp_path: Path) -> None:
    program = read(model(body))
    rng = np.random.default_rng(1)
    new = {layer.name: Weights(rng.standard_normal((8, 8)).astype(np.float32)) for layer in program.layers}
    feeds = {"x": sign * np.abs(rng.standard_normal((5, 8))).astype(np.float32)}
    trial = Trial(program, program.layers, CPU, tmp_path, watched=True)
    wanted = trial.watch(feeds, trial.feeds(new), [layer.name for layer in program.layers])

    walk = Walk(program, [[layer] for layer in program.layers], CPU, tmp_path)
    values: dict[str, Any] = dict(feeds)
    reached = {}
    for piece in walk.pieces:
        piece.run(values, walk.feeds(new))
        reached.update({name: values[x].copy() for name, x in piece.x.items()})
    assert reached.keys() == {layer.name for layer in program.layers}
    for name, x in reached.items():
        np.testing.assert_allclose(x, wanted[name], rtol=1e-5, atol=1e-5)


def test_each_node_runs_once_and_nothing_is_kept_in_vain(tmp_path: Path) -> None:
    program = read(model(RESIDUAL))
    walk = Walk(program, [[layer] for layer in program.layers], CPU, tmp_path)
    made = [value.name for piece in walk.pieces if piece.session for value in piece.session.get_outputs()]
    assert len(made) == len(set(made))
    assert walk.pieces[0].session is None  # the first layer reads the model's input
    values: dict[str, Any] = {"x": np.ones((2, 8), np.float32)}
    kept = []
    for piece in walk.pieces:
        piece.run(values, walk.feeds({}))
        kept.append(set(values))
    assert kept == [{"x"}, {"s"}, {"t"}]


def test_where_a_sequence_would_be_kept_there_is_no_cut(tmp_path: Path) -> None:
    program = read(model(SEQUENCE))
    walk = Walk(program, [[layer] for layer in program.layers], CPU, tmp_path)
    stops = [[layer.name for members in piece.stops for layer in members] for piece in walk.pieces]
    assert sum(map(len, stops)) == 3
    assert len(stops) == 2
