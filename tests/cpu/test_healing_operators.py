"""Every operator that can be trained computes what ONNX says, in all forms of ONNX's own cases, or refuses in words."""

import warnings
from collections import Counter
from typing import Any

import numpy as np
import onnx_ir
import pytest
from onnx.backend.test.loader import load_model_tests

from sparsec.ir import SparsecError

torch = pytest.importorskip("torch")

from sparsec.compiler.healing.network import Network  # noqa: E402
from sparsec.compiler.healing.ops import OPS  # noqa: E402

_DTYPES = {"float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "bool"}


def cases() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_model_tests(kind="node")
    return [case for case in found if all(node.op_type in OPS and not node.domain for node in case.model.graph.node)]


def is_plain(arrays: list[Any]) -> bool:
    return all(isinstance(a, np.ndarray) and a.dtype.name in _DTYPES for a in arrays)


def test_operators_compute_what_onnx_says() -> None:
    computed: Counter[str] = Counter()
    refused, wrong = [], []
    for case in cases():
        names = [value.name for value in case.model.graph.input]
        outputs = [value.name for value in case.model.graph.output]
        for inputs, expected in case.data_sets:
            if case.model.functions or not is_plain(inputs) or not is_plain(expected):
                continue
            feeds = {name: torch.from_numpy(np.array(a)) for name, a in zip(names, inputs, strict=True)}
            try:
                found = Network(onnx_ir.from_proto(case.model))(feeds, outputs)
            except SparsecError as error:
                refused.append(f"{case.name}: {error}")
                continue
            # Floats of every width are computed in float32.
            narrow = any(a.dtype == np.float16 for a in (*inputs, *expected))
            rtol = max(case.rtol, 2e-3) if narrow else case.rtol
            for name, e in zip(outputs, expected, strict=True):
                a = found[name].numpy()
                if a.shape != e.shape or not np.allclose(a, e, rtol=rtol, atol=case.atol, equal_nan=True):
                    wrong.append(case.name)
            computed[case.model.graph.node[-1].op_type] += 1
    print(f"{computed.total()} cases of {len(computed)} operators; refused:", *refused, sep="\n")
    assert not wrong
    assert not [line for line in refused if "gather" in line or "scatter" in line]
    assert computed.total() > 500, "too few cases ran for this test to mean anything"
    assert len(refused) < computed.total() / 10
