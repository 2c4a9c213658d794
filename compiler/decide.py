"""The measured choice: each layer dense and sparse inside ONNX Runtime, then the whole model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from ..codegen.generate.version import code_version
from ..ir import Decision, Timing
from .dense_int8 import statically_quantized
from .exporter import SparseOp, export, layer_model, session_source
from .runtime import Comparison, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ..codegen.target import Target
    from ..codegen.tune import Database, Tuned
    from ..ir import Layer, Program
    from .machine import Machine
    from .plan import Candidate
    from .probe import Workload

# A layer must win by more than the noise of its own measurement, and the whole model may not lose by more.
LAYER_MARGIN = 1.02
# A predicted win must be larger than the errors of the model that predicts it.
PREDICTED_MARGIN = 1.3
MODEL_MARGIN = 1.0
# The dense forms that a sparse layer has to beat, by `CompileConfig.dense_baseline`.
FORMS = {"fp32": ("fp32",), "int8": ("int8",), "best": ("fp32", "int8")}
# Quartiles further apart than this come from a busy machine: good enough to decide by, not to be kept.
STEADY = 1.3


@dataclass(frozen=True)
class Bench:
    """Where and how things are timed.

    Attributes:
        library: the operator library with all candidates' kernels.
        folder: scratch space for models that are too large to be opened from memory.
        machine: what opens sessions and times them.
        threads: intra-op threads.
        database: where comparisons of layers are kept.
        baseline: as `CompileConfig.dense_baseline`.
    """

    library: Path
    folder: Path
    machine: Machine
    threads: int
    target: Target
    database: Database
    baseline: str = "fp32"


def compare_layer(
    program: Program, candidate: Candidate, op: SparseOp, workload: Workload, bench: Bench
) -> tuple[Timing, ...]:
    """Dense against sparse, the layer alone, at each batch size; replayed where the same was measured before."""
    layer = candidate.layer
    timings = []
    baseline = bench.baseline if layer.dtype == "float32" and not layer.stored else "fp32"
    for batch in workload.batches:
        shape = workload.shapes[batch][layer.name]
        nodes = ",".join(node.op_type for node in layer.nodes) + layer.coded
        key = (
            f"{op.kernel} blocks {op.matrix.blocks} x {list(shape)} {nodes} {layer.transpose_x:d}{layer.transpose_y:d} "
            f"threads {bench.threads} {bench.target} code {code_version()} onnxruntime {onnxruntime.__version__}"
        )
        against = {name: _against(program, candidate, op, shape, bench, name, key) for name in FORMS[baseline]}
        strongest = min(against, key=lambda name: against[name].speedup)
        timing = against[strongest].timing(batch, workload.rows(layer.name, batch))
        timings.append(timing if strongest == "fp32" else dataclasses.replace(timing, baseline=strongest))
    return tuple(timings)


def _against(
    program: Program,
    candidate: Candidate,
    op: SparseOp,
    shape: tuple[int, ...],
    bench: Bench,
    form: str,
    key: str,
) -> Comparison:
    """One dense form against sparse; replayed where the same was measured before."""
    key = key if form == "fp32" else f"{key} against {form}"
    record = bench.database.find("comparison", key)
    if record is not None:
        return Comparison(**{**record, "spread": tuple(record["spread"])})
    result = _compare_layer(program, candidate, op, shape, bench, form)
    if result.spread[1] < STEADY * result.spread[0]:
        bench.database.store("comparison", key, dataclasses.asdict(result))
    return result


def _compare_layer(
    program: Program, candidate: Candidate, op: SparseOp, shape: tuple[int, ...], bench: Bench, form: str
) -> Comparison:
    rng = np.random.default_rng(0)
    sources = [
        session_source(layer_model(program, candidate.layer, shape, chosen), bench.folder) for chosen in (None, op)
    ]
    dense, sparse = (bench.machine.open(source, bench.library) for source in sources)
    feeds = {value.name: _random(rng, value.shape, numpy_dtype(value.type)) for value in dense.get_inputs()}
    if form == "int8":
        dense = bench.machine.open(statically_quantized(sources[0], [feeds], bench.folder))
    return bench.machine.compare(dense, sparse, feeds)


def _random(rng: np.random.Generator, shape: list[int], dtype: np.dtype[Any] | None) -> NDArray[Any]:
    """Standard normal numbers, or any codes."""
    if dtype is not None and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return rng.standard_normal(shape).astype(dtype)


def choose(timings: tuple[Timing, ...]) -> tuple[bool, str]:
    """Whether sparse wins at every batch size, and the reason in words."""
    worst = min(timings, key=lambda timing: timing.speedup)
    margin = PREDICTED_MARGIN if worst.predicted else LAYER_MARGIN
    than = " than dense int8" if worst.baseline else ""
    if worst.speedup >= margin:
        return True, f"faster{than} at every batch size" if len(timings) > 1 else f"faster{than}"
    if worst.speedup >= 1 / margin:
        return False, f"no faster{than} at batch {worst.batch}"
    return False, f"{1 / worst.speedup:.1f}x slower{than} at batch {worst.batch}"


def predicted_timings(tuned: Tuned, candidate: Candidate, workload: Workload) -> tuple[Timing, ...]:
    """What the cost model says of a layer, at each batch size for the GPU that gains least; none for a CPU target."""
    timings = []
    for batch in workload.batches if tuned.choices else ():
        rows = workload.rows(candidate.layer.name, batch)
        worst = min(tuned.choices[rows], key=lambda choice: choice.dense_seconds / choice.seconds)
        ratio = worst.dense_seconds / worst.seconds
        dense, sparse = worst.dense_seconds * 1e6, worst.seconds * 1e6
        timings.append(Timing(batch, rows, dense, sparse, ratio, (ratio, ratio), predicted=True))
    return tuple(timings)


def compare_models(
    program: Program, ops: Mapping[str, SparseOp], workload: Workload, bench: Bench, pairs: int = 7
) -> tuple[Timing, ...]:
    """The whole model, as it came against sparse, at each batch size."""
    dense = bench.machine.open(session_source(program.model, bench.folder))
    sparse = bench.machine.open(session_source(export(program, ops), bench.folder), bench.library)
    timings = []
    for batch, feeds in workload.feeds.items():
        result = bench.machine.compare(dense, sparse, feeds, pairs)
        timings.append(result.timing(batch, batch))
    return tuple(timings)


def settle(
    gains: Mapping[str, float], measure: Callable[[set[str]], tuple[Timing, ...]]
) -> tuple[set[str], tuple[Timing, ...]]:
    """Take layers back, those that gain least first, until the whole model is not slower at any batch size.

    Args:
        gains: microseconds that each sparse layer saves by itself.
        measure: times the model with these layers sparse.

    Returns:
        The layers that stay sparse, and the model's timings with them; no timings where none stay.
    """
    order = sorted(gains, key=lambda name: gains[name])
    while order:
        timings = measure(set(order))
        if all(timing.speedup >= MODEL_MARGIN for timing in timings):
            return set(order), timings
        order = order[-(len(order) // 2) :] if len(order) > 1 else []
    return set(), ()


def sparse_decision(candidate: Candidate, reason: str, timings: tuple[Timing, ...], schedule: str) -> Decision:
    """The record of a layer that became sparse."""
    layer, matrix = candidate.layer, candidate.matrix
    return Decision(
        layer=layer.name,
        kind=layer.kind.value,
        op_type=layer.op_type,
        shape=(layer.out_features, layer.in_features),
        choice="sparse",
        reason=f"{reason}; keeps its zeros, {candidate.found}" if candidate.found else reason,
        pattern=str(matrix.pattern),
        values=str(matrix.kind),
        inputs=candidate.x,
        zeros_before=layer.zeros,
        zeros_after=float((matrix.to_dense() == 0).mean()),
        bytes_dense=layer.nbytes,
        bytes_sparse=matrix.nbytes,
        schedule=schedule,
        timings=timings,
        pruned=candidate.pruned,
    )


def dense_decision(layer: Layer, reason: str) -> Decision:
    """The record of a layer that stays as it came."""
    return Decision(
        layer=layer.name,
        kind=layer.kind.value,
        op_type=layer.op_type,
        shape=(layer.out_features, layer.in_features) if layer.weight.ndim == 2 else (0, 0),
        choice="dense",
        reason=reason,
        zeros_before=layer.zeros,
        zeros_after=layer.zeros,
        bytes_dense=layer.nbytes,
    )
