"""The pattern under a budget: the finest of those that are nearly as fast as the fastest."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx_ir
import pytest

from sparsec import CompileConfig
from sparsec.compiler.budget import patterns
from sparsec.compiler.budget.cache import stored_pattern
from sparsec.compiler.budget.times import _comparable
from sparsec.compiler.context import Context, Silent, make_context
from sparsec.compiler.frontend import read
from sparsec.compiler.plan import make_plan
from sparsec.compiler.probe import Workload, probe
from sparsec.ir import Program, Timing
from sparsec.models.mlp import mlp

Case = tuple[Program, Any, Workload, Context]


def timing(speedup: float, dense_us: float = 100.0) -> Timing:
    return Timing(1, 1, dense_us, dense_us / speedup, speedup, (speedup, speedup))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Two layers of one shape and one of another, and the model's last, which is left alone."""
    config = CompileConfig(max_drop="1%", calib=tmp_path / "data.npz", threads=1, target="cpu", cache=tmp_path)
    context = make_context(config, tmp_path, Silent())
    program = read(onnx_ir.to_proto(onnx_ir.from_proto(mlp((128, 128, 128, 256, 10)))))
    plan = make_plan(program, config.model_copy(update={"sparsity": 0.8}), context.target)
    return program, plan, probe(program, config, tmp_path, context.machine), context


def chosen(case: Case, speedups: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[list[str]]]:
    asked = []

    def timed(program: Program, layers: Any, options: Any, *_: Any) -> Any:
        asked.append([layer.name for layer in layers])
        return {
            name: tuple(dataclasses.replace(one, timings=(timing(speedups[one.pattern]),)) for one in found)
            for name, found in options.items()
        }

    monkeypatch.setattr(patterns, "time_options", timed)
    return patterns.with_pattern(*case).config.pattern, asked


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ((2.0, 2.1, 2.2, 2.3), "group:2"),
        ((1.0, 2.1, 2.2, 2.3), "group:4"),
        ((1.0, 1.0, 1.0, 2.3), "group:16"),
        ((2.0, 2.4, 1.0, 2.6), "group:4"),
    ],
)
def test_the_finest_that_is_nearly_as_fast(
    case: Case, speedups: tuple[float, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern, asked = chosen(case, dict(zip(patterns.GROUPS, speedups, strict=True)), monkeypatch)
    assert pattern == expected
    # Of two layers of the same shape one is timed.
    assert [len(names) for names in asked] == [2] * len(patterns.GROUPS)


def test_another_pick_has_the_pattern_of_the_first(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, plan, workload, context = case
    (tmp_path / "options.json").write_text('{"key": "k", "pattern": "group:8", "layers": {}}')
    config = context.config.model_copy(update={"pick": 2, "solutions": tmp_path})
    picked = program, plan, workload, dataclasses.replace(context, config=config)
    pattern, asked = chosen(picked, dict.fromkeys(patterns.GROUPS, 1.0), monkeypatch)
    assert (pattern, asked) == ("group:8", [])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layers": {}}'])
def test_a_damaged_cache_names_no_pattern(text: str, tmp_path: Path) -> None:
    assert stored_pattern(None) is None
    assert stored_pattern(tmp_path) is None
    (tmp_path / "options.json").write_text(text)
    assert stored_pattern(tmp_path) is None


def test_options_of_a_layer_share_their_dense_time() -> None:
    """Measured while the machine was busy, the second seems to bring more than the third."""
    found = _comparable([(timing(1.5, 100),), (timing(2.0, 300),), (timing(4.0, 100),)])
    assert [one.dense_us for (one,) in found] == [100, 100, 100]
    assert [one.sparse_us for (one,) in found] == [100 / 1.5, 50, 25]
    assert [one.speedup for (one,) in found] == [1.5, 2.0, 4.0]
