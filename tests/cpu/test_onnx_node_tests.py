"""ONNX's own operator cases still pass after they have been through sparsec, wherever ONNX Runtime passes them."""

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.backend.test.loader import load_model_tests

import sparsec
from sparsec.compiler import runtime
from sparsec.compiler.config import Tune
from sparsec.compiler.exporter import export, save
from sparsec.compiler.frontend import read
from sparsec.compiler.runtime import Comparison


def cases() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from load_model_tests(kind="node")


def outputs(model: Path | bytes, feeds: dict[str, Any], library: Path | None = None) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if library is not None:
        options.register_custom_ops_library(str(library))
    source = str(model) if isinstance(model, Path) else model
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def passes(expected: list[Any], actual: list[Any], case: Any) -> bool:
    for e, a in zip(expected, actual, strict=True):
        if isinstance(e, list):
            if not passes(e, a, case):
                return False
        elif isinstance(e, np.ndarray) and e.dtype.kind in "fc":
            if not np.allclose(a, e, rtol=case.rtol, atol=case.atol, equal_nan=True):
                return False
        elif not np.array_equal(e, a):
            return False
    return True


def feeds_of(case: Any, inputs: list[Any]) -> dict[str, Any]:
    names = [value.name for value in case.model.graph.input]
    return {name: value for name, value in zip(names, inputs, strict=False) if value is not None}


def passing(prefix: str = "test_") -> Iterator[tuple[Any, dict[str, Any], list[Any]]]:
    """Cases that ONNX Runtime runs to the expected result, with their feeds and results."""
    for case in (case for case in cases() if case.name.startswith(prefix)):
        for inputs, expected in case.data_sets:
            feeds = feeds_of(case, inputs)
            try:
                ok = passes(expected, outputs(case.model.SerializeToString(), feeds), case)
            except Exception:  # onnxruntime's exceptions share no base class: it does not run this case
                continue
            if ok:
                yield case, feeds, expected


def test_all_cases_pass_after_reading_and_writing() -> None:
    count, failed = 0, []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for case, feeds, expected in passing():
            count += 1
            save(export(read(case.model), {}), path)
            if not passes(expected, outputs(path, feeds), case):
                failed.append(case.name)
    assert not failed
    assert count > 1000, "too few cases ran for this test to mean anything"
    print(f"{count} cases")


@pytest.mark.parametrize(("kind", "least"), [("gemm", 12), ("matmul", 2)])
def test_cases_with_constant_weights_pass_when_sparse(
    kind: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same operators with their second operand a constant, forced to be sparse: every form of Gemm and MatMul."""
    monkeypatch.setattr(runtime, "compare", lambda dense, sparse, pairs=7: Comparison(2.0, 1.0, 2.0, (2.0, 2.0)))
    config = sparsec.CompileConfig(
        layer_sparsity=(("*", 0.01),), pattern="block:1x1", tune=Tune.OFF, threads=1, cache=tmp_path
    )
    made_sparse = 0
    for case, feeds, _ in passing(f"test_{kind}_"):
        if any(value.dtype != np.float32 for value in feeds.values()):
            continue
        for constant in (0, 1):
            model, rest = with_constant(case.model, feeds, constant)
            result = sparsec.compile(model, config)
            made_sparse += result.report.sparse_layers
            expected = outputs(model.SerializeToString(), rest)
            actual = list(result.run(rest).values())
            for e, a in zip(expected, actual, strict=True):
                # 1 % of the weights may be gone: none of these small matrices has that many.
                np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)
    assert made_sparse >= least


def with_constant(model: onnx.ModelProto, feeds: dict[str, Any], index: int) -> tuple[onnx.ModelProto, dict[str, Any]]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    value = copy.graph.input[index]
    copy.graph.initializer.append(onnx.numpy_helper.from_array(feeds[value.name], value.name))
    rest = {name: feed for name, feed in feeds.items() if name != value.name}
    del copy.graph.input[index]
    return copy, rest
