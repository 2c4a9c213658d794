"""IR version and opset: what this ONNX Runtime reads is asked of ONNX Runtime, not kept in a table."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import onnx

from ...ir import SparsecError

if TYPE_CHECKING:
    from collections.abc import Callable

# Before IR 3 a model names no opset; before opset 7 Add, Gemm and others broadcast by attributes, and so no layer of an
# older model becomes sparse.
OLDEST_IR = 3
OLDEST_OPSET = 7
# MatMul, Gemm and what else a layer is made of are defined on bfloat16 since then.
OLDEST_BFLOAT16_OPSET = 13


def check_versions(proto: onnx.ModelProto) -> None:
    """Refuse an IR version or opset that sparsec or the installed ONNX Runtime cannot read.

    Raises:
        SparsecError: a version is too old, too new or missing.
    """
    if proto.ir_version < OLDEST_IR:
        raise SparsecError(
            f"IR version {proto.ir_version} is unknown: expected {OLDEST_IR} or newer. Export the model again."
        )
    if not _reads(proto.ir_version):
        newest = _newest(_reads, OLDEST_IR, proto.ir_version)
        raise SparsecError(
            f"IR version {proto.ir_version} is newer than {_runtime()} reads, which is at most {newest}. Update "
            "onnxruntime-gpu, or export the model with an older onnx."
        )
    opsets = {_domain(entry.domain): entry.version for entry in proto.opset_import}
    if "" not in opsets and (not opsets or any(_domain(node.domain) == "" for node in proto.graph.node)):
        raise SparsecError("the model names no opset for the domain ai.onnx. It may be cut off; export it again.")
    for domain, version in sorted(opsets.items()):
        _check_opset(domain, version)


def _check_opset(domain: str, version: int) -> None:
    """Refuse an opset newer than ONNX Runtime knows; of other people's domains it takes any."""
    if not _reads(OLDEST_IR, domain, version):
        newest = _newest(lambda opset: _reads(OLDEST_IR, domain, opset), 1, version)
        raise SparsecError(
            f"opset {version} of domain {domain or 'ai.onnx'} is newer than {_runtime()} supports, which is at most "
            f"{newest}. Update onnxruntime-gpu, or export the model for opset {newest}."
        )


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _newest(reads: Callable[[int], bool], low: int, high: int) -> int:
    """The largest version that `reads`, by bisection: `low` is read, `high` is not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reads(middle) else (low, middle)
    return low


def _runtime() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


@lru_cache(maxsize=256)
def _reads(ir_version: int, domain: str = "", opset: int = OLDEST_OPSET) -> bool:
    """Whether ONNX Runtime opens the smallest model of these versions."""
    import onnxruntime

    value = onnx.helper.make_tensor_value_info
    x, y = (value(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "probe", [x], [y])
    model = onnx.ModelProto(ir_version=ir_version, graph=graph)
    for name, version in {"": OLDEST_OPSET, domain: opset}.items():
        model.opset_import.add(domain=name, version=version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # ONNX Runtime has no common class for its errors, and any refusal is the answer.
        return False
    return True
