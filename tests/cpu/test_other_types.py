"""Layers of types that sparsec changes no weights of: they go through everything as they came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import sparsec
from sparsec import CompileConfig
from sparsec.compiler import runtime
from sparsec.compiler.config import Tune
from sparsec.compiler.runtime import Comparison

if TYPE_CHECKING:
    from pathlib import Path

DOUBLE = """g (double[N, 32] x) => (double[N, 8] y) {
    ["first"] h = MatMul (x, W)  r = Relu (h)  ["second"] y = MatMul (r, V)
}"""
INTEGER = """g (float[N, 32] x) => (int32[N, 8] y) {
    c = Cast <to = 6> (x)  ["first"] h = MatMul (c, W)  ["second"] y = MatMul (h, V)
}"""
MIXED = """g (float[N, 32] x) => (double[N, 8] y) {
    ["first"] h = MatMul (x, A)  r = Relu (h)  ["middle"] m = MatMul (r, B)  s = Relu (m)  c = Cast <to = 11> (s)
    ["last"] y = MatMul (c, V)
}"""
SHARES: dict[str, dict[str, Any]] = {
    "structured": {"pattern": "structured", "sparsity": 0.3},
    "structured, healed": {"pattern": "structured", "sparsity": 0.3, "heal": "3"},
    "structured, a limit": {"pattern": "structured", "max_drop": "50%"},
    "sparse": {"sparsity": 0.5, "layer_sparsity": (("*", 0.5),), "prune_all": True},
    "sparse, healed": {"layer_sparsity": (("*", 0.5),), "prune_all": True, "heal": "3"},
}


def model_of(text: str, dtype: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    rng = np.random.default_rng(0)
    for name, shape, kind in (
        ("W", (32, 64), dtype),
        ("V", (64, 8), dtype),
        ("A", (32, 48), "float32"),
        ("B", (48, 64), "float32"),
    ):
        array = 3 * rng.standard_normal(shape)
        if name in {one for node in model.graph.node for one in node.input}:
            model.graph.initializer.append(numpy_helper.from_array(array.astype(kind), name))
    return model


MODELS = {"float64": DOUBLE, "int32": INTEGER, "mixed": MIXED}
# Of integers nothing can be learned.
CASES = [(name, given) for name in MODELS for given in SHARES if not (name == "int32" and "heal" in SHARES[given])]


@pytest.mark.parametrize(("name", "given"), CASES)
def test_they_go_through_as_they_came(name: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = MODELS[name]
    if "heal" in SHARES[given]:
        pytest.importorskip("torch")
    monkeypatch.setattr(runtime, "compare", lambda dense, sparse, pairs=7: Comparison(2.0, 1.0, 2.0, (2.0, 2.0)))
    dtype = "int32" if text is INTEGER else "float64"
    model = model_of(text, dtype)
    x = np.random.default_rng(1).standard_normal((64, 32)).astype("float64" if text is DOUBLE else "float32")
    config = CompileConfig(calib=[{"x": part} for part in np.split(x, 8)], tune=Tune.OFF, threads=1, cache=tmp_path)
    compiled = sparsec.compile(model, config.model_copy(update=SHARES[given]))
    compiled.save(tmp_path / "out")
    found = {one.name: one for one in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.name in "WV":
            # In another order, where the channels that they read are.
            arrays = (np.sort(numpy_helper.to_array(one), axis=0) for one in (found[tensor.name], tensor))
            np.testing.assert_array_equal(*arrays)
    decisions = {one.layer: one for one in compiled.report.decisions}
    others = [decisions[one] for one in ("last",) if one in decisions] or list(decisions.values())
    assert all((one.choice, one.pruned) == ("dense", False) for one in others)
    assert all(f"{dtype} weights; no sparse operator yet" in one.reason for one in others)
    if text is MIXED:  # the other layers are not held up
        assert decisions["first"].pruned
        reader = decisions["middle"]
        if "structured" in given:
            assert (reader.choice, reader.shape_after) == ("smaller", (64, (decisions["first"].shape_after or (0,))[0]))
            assert "'last' reads them: float64 weights" in reader.reason
        else:
            assert reader.pruned


def test_dead_channels_of_other_types_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight that stays is another."""
    monkeypatch.setattr(runtime, "compare", lambda dense, sparse, pairs=7: Comparison(2.0, 1.0, 2.0, (2.0, 2.0)))
    model = model_of(DOUBLE, "float64")
    arrays = {one.name: numpy_helper.to_array(one).copy() for one in model.graph.initializer}
    arrays["W"][:, 16:48] = 0
    del model.graph.initializer[:]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    compiled = sparsec.compile(model, CompileConfig(pattern="structured", tune=Tune.OFF, threads=1, cache=tmp_path))
    assert [one.shape_after for one in compiled.report.decisions] == [(32, 32), (8, 32)]
    x = np.random.default_rng(1).standard_normal((5, 32))
    expected = np.maximum(x @ arrays["W"], 0) @ arrays["V"]
    np.testing.assert_allclose(compiled.run({"x": x})["y"], expected, rtol=1e-12, atol=1e-12)
