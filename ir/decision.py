"""The record behind every layer's fate. The report, the manifest and the CLI's table are views of a list of these."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Timing:
    """Dense against sparse at one batch size, timed alternately inside ONNX Runtime, or predicted.

    Attributes:
        batch: the model's batch size; `rows` is what the layer sees of it (batch x sequence).
        dense_us, sparse_us: medians in microseconds.
        speedup: the median of dense/sparse over the pairs of runs; `spread` its quartiles (25 %, 75 %).
        predicted: whether these are a cost model's numbers: nothing was run.
        baseline: "int8" where the dense side is what ONNX Runtime's static quantisation makes of the layer, else "".
    """

    batch: int
    rows: int
    dense_us: float
    sparse_us: float
    speedup: float
    spread: tuple[float, float]
    predicted: bool = False
    baseline: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of one layer, and why.

    Attributes:
        layer: name; `op_type` and `kind` as found; `shape` is (out, in).
        choice: "sparse", "dense", or "smaller": dense without some channels.
        reason: one clause in words, such as "1.2x slower at batch 128" or "a convolution; no sparse operator yet".
        pattern: as text, "" where none was tried.
        values: what the weight is stored as, "" for as it came; `inputs` is what it meets: "float", or codes of 8
            bits that were made so ("static", "dynamic") or came so ("uint8").
        zeros_before, zeros_after: shares of the weight as it came and as it is in the artifact.
        bytes_dense, bytes_sparse: sizes of the weight as it came and as it is packed; 0 where it was never packed.
        schedule: the kernel's schedule, "" for dense.
        timings: one a batch size, in the order of the configuration.
        pruned: True when sparsec itself set weights to zero, or left them out.
        shape_after: (out, in) where channels were left out.
    """

    layer: str
    kind: str
    op_type: str
    shape: tuple[int, int]
    choice: str
    reason: str
    pattern: str = ""
    values: str = ""
    inputs: str = ""
    zeros_before: float = 0.0
    zeros_after: float = 0.0
    bytes_dense: int = 0
    bytes_sparse: int = 0
    schedule: str = ""
    timings: tuple[Timing, ...] = field(default=())
    pruned: bool = False
    shape_after: tuple[int, int] | None = None
