"""From candidates to what becomes sparse: kernels, measurements, choices, and codes handed from layer to layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..codegen.ort.library import build_library
from .chains import chained
from .decide import (
    MODEL_MARGIN,
    Bench,
    choose,
    compare_layer,
    compare_models,
    dense_decision,
    predicted_timings,
    settle,
    sparse_decision,
)
from .kernels import distinct_kernels, make_kernels, sparse_op

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..codegen.kernel import Kernel
    from ..codegen.tune import Tuned
    from ..ir import Decision, Program, Timing
    from .context import Context
    from .exporter import SparseOp
    from .machine import Machine
    from .plan import Candidate
    from .probe import Workload


@dataclass(frozen=True)
class Outcome:
    """Candidates, measured: which became sparse, and the records.

    Attributes:
        ops: by name, of the layers that become sparse.
        kernels: that they run.
        decisions: of all candidates.
        timings: of the whole model, one a batch size; none where nothing was measured or nothing became sparse.
    """

    ops: dict[str, SparseOp]
    kernels: tuple[Kernel, ...]
    decisions: dict[str, Decision]
    timings: tuple[Timing, ...]


def decide(program: Program, candidates: Mapping[str, Candidate], workload: Workload, context: Context) -> Outcome:
    """Kernels for all candidates, then the choice: measured where the target is this machine, predicted elsewhere."""
    if not candidates or not workload.feeds:
        why = f"the model could not be run to measure it: {workload.failure}"
        return Outcome({}, (), {name: dense_decision(c.layer, why) for name, c in candidates.items()}, ())
    tuned = make_kernels(candidates, workload, context)
    ops = {name: sparse_op(candidate, tuned[name], context) for name, candidate in candidates.items()}
    timings: tuple[Timing, ...] = ()
    if context.machine is None:
        decisions = _predict(candidates, tuned, workload, context)
    else:
        bench = _bench(distinct_kernels(tuned.values()), context, context.machine, "candidates.so")
        decisions, timings = _measure(program, candidates, ops, tuned, workload, context, bench)
    stay = [name for name in candidates if decisions[name].choice == "sparse"]
    kernels = distinct_kernels(tuned[name] for name in stay)
    outcome = Outcome({name: ops[name] for name in stay}, kernels, decisions, timings)
    return _linked(program, candidates, outcome, workload, context)


def _bench(kernels: Iterable[Kernel], context: Context, machine: Machine, name: str) -> Bench:
    library = context.folder / name
    build_library(tuple(kernels), library, context.target.cpu.requires)
    config = context.config
    return Bench(
        library,
        context.folder,
        machine,
        config.thread_count,
        context.target,
        context.tuner.database,
        config.dense_baseline,
    )


def _predict(
    candidates: Mapping[str, Candidate], tuned: Mapping[str, Tuned], workload: Workload, context: Context
) -> dict[str, Decision]:
    """For machines that are elsewhere: by a cost model for GPUs; CPUs have none, and get what was asked for."""
    decisions = {}
    for name, candidate in candidates.items():
        timings = predicted_timings(tuned[name], candidate, workload)
        faster, reason = choose(timings) if timings else (True, f"{context.target} is not this machine")
        reason = f"predicted, not measured: {reason}"
        if faster:
            decisions[name] = sparse_decision(candidate, reason, timings, _words(tuned[name]))
        else:
            decisions[name] = dataclasses.replace(dense_decision(candidate.layer, reason), timings=timings)
    return decisions


def _measure(
    program: Program,
    candidates: Mapping[str, Candidate],
    ops: Mapping[str, SparseOp],
    tuned: Mapping[str, Tuned],
    workload: Workload,
    context: Context,
    bench: Bench,
) -> tuple[dict[str, Decision], tuple[Timing, ...]]:
    """Each layer by itself, then the whole model, inside ONNX Runtime."""
    # Each layer by itself.
    decisions, gains = {}, {}
    context.progress.start("measuring layers", len(candidates))
    for name, candidate in candidates.items():
        timings = compare_layer(program, candidate, ops[name], workload, bench)
        faster, reason = choose(timings)
        if faster:
            decisions[name] = sparse_decision(candidate, reason, timings, _words(tuned[name]))
            gains[name] = sum(timing.dense_us - timing.sparse_us for timing in timings)
        else:
            decisions[name] = dataclasses.replace(dense_decision(candidate.layer, reason), timings=timings)
        context.progress.advance(name)

    # The whole model.
    context.progress.start("measuring the whole model", None)
    stay, model_timings = settle(
        gains, lambda names: compare_models(program, {name: ops[name] for name in names}, workload, bench)
    )
    for name in gains.keys() - stay:
        taken_back = f"{decisions[name].reason} by itself, but the whole model was slower with it"
        decisions[name] = dataclasses.replace(
            dense_decision(candidates[name].layer, taken_back), timings=decisions[name].timings
        )
    return decisions, model_timings


def _linked(
    program: Program, candidates: Mapping[str, Candidate], outcome: Outcome, workload: Workload, context: Context
) -> Outcome:
    """The outcome with codes handed from layer to layer, unless the model is slower with that than dense."""
    found = chained({name: candidates[name] for name in outcome.ops})
    changed = {name: one for name, one in found.items() if one != candidates[name]}
    if not changed:
        return outcome
    tuned = make_kernels(changed, workload, context)
    ops = outcome.ops | {name: sparse_op(one, tuned[name], context) for name, one in changed.items()}
    used = {op.kernel for op in ops.values()}
    made = {kernel.name: kernel for kernel in (*outcome.kernels, *distinct_kernels(tuned.values()))}
    kernels = tuple(kernel for name, kernel in made.items() if name in used)
    decisions = outcome.decisions | {
        name: dataclasses.replace(outcome.decisions[name], schedule=_words(tuned[name]), inputs=one.x)
        for name, one in changed.items()
    }
    timings = outcome.timings
    if context.machine is not None:
        context.progress.start("measuring the whole model again", None)
        timings = compare_models(program, ops, workload, _bench(kernels, context, context.machine, "linked.so"))
        if any(timing.speedup < MODEL_MARGIN for timing in timings):
            return outcome
    return Outcome(ops, kernels, decisions, timings)


def _words(tuned: Tuned) -> str:
    return "; ".join(f"{rows} rows: {schedule}" for rows, schedule in tuned.schedules.items())
