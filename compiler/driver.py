"""The way a model takes through sparsec, as one function: `compile`."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..codegen.ort.library import build_library
from ..codegen.problem import Problem
from ..codegen.target import Target, parse_target
from ..codegen.tune import Database, Tuned, Tuner, default_path
from ..ir import Decision, SparsecError, UsageError
from . import artifact
from .calibration import Samples, gather, open_samples
from .config import CompileConfig
from .decide import Bench, choose, compare_layer, compare_models, predicted_timings, settle, sparse_decision
from .exporter import SparseOp, export, save, session_source
from .frontend import read
from .machine import Cpu, Machine, find_machine, has_gpu
from .plan import Candidate, Plan, fit, make_plan
from .probe import Workload, probe
from .report import Fidelity, Report, SurveyPoint, Verification
from .runtime import run_session

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from ..codegen.kernel import Kernel
    from ..ir import Layer, Program, Timing

# Sparsities that the survey of a dense model measures.
SURVEY = (0.5, 0.7, 0.8, 0.9)
# Above this relative error against the dense model with the same weights an artifact is wrong, not merely rounded. Half
# precision rounds after every operator, and the sparse one has fewer of them.
WRONG, WRONG_16_BITS = 1e-2, 1e-1
# Share of the calibration data that no weight is fitted to.
HELD_BACK = 0.2


class Progress(Protocol):
    """What the library tells about its work; it never prints."""

    def start(self, stage: str, total: int | None) -> None:
        """A stage of `total` steps begins (None: unknown)."""

    def advance(self, detail: str = "") -> None:
        """One step is done."""


class _Silent:
    def start(self, stage: str, total: int | None) -> None:
        pass

    def advance(self, detail: str = "") -> None:
        pass


@dataclass(frozen=True)
class _Context:
    """What every step needs and none changes."""

    config: CompileConfig
    target: Target
    machine: Machine | None
    tuner: Tuner
    folder: Path
    progress: Progress


@dataclass(frozen=True)
class _Outcome:
    """Candidates, measured: which became sparse, and the records."""

    ops: dict[str, SparseOp]
    kernels: tuple[Kernel, ...]
    decisions: dict[str, Decision]
    timings: tuple[Timing, ...]


def compile(
    model: str | Path | bytes | onnx.ModelProto,
    config: CompileConfig | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """Compile an ONNX model: prune as configured, make kernels for its sparse weights, keep what is measured faster.

    Args:
        model: a path, the bytes of a file, or a `ModelProto`.
        config: what to do; by default no weight changes.
        progress: is told what happens.

    Raises:
        SparsecError: the model cannot be compiled; the message says what to do. Nothing was written.
    """
    start = time.perf_counter()
    config = config or CompileConfig()
    scratch = tempfile.TemporaryDirectory(prefix="sparsec-")
    try:
        context = _make_context(config, Path(scratch.name), progress or _Silent())
        # Step 1. Read the model and find its layers.
        program = read(model)
        # Step 2. Choose the weights that each layer would have.
        plan = make_plan(program, config, context.target)
        plan, data, scarcity = _fit(program, plan, context)
        # Step 3. Run the model once: which shapes reach its layers.
        workload = probe(program, config, context.folder, context.machine)
        # Step 4. Compile and tune kernels; keep what is faster by itself, then what is faster together.
        outcome = _decide(program, plan.candidates, workload, context)
        # Step 5. Write the artifact.
        out = context.folder / "artifact"
        out.mkdir()
        dense = _dense_weights(plan, outcome, context.config)
        save(export(program, outcome.ops, dense), out / artifact.MODEL)
        build_library(outcome.kernels, out / artifact.LIBRARY, context.target.cpu.requires)
        # Step 6. Run it against the dense model with the same weights.
        verification = _verify(program, outcome, dense, workload, context)
        fidelity = _judge(program, data, outcome, context)
        # Step 7. For what is dense, measure what pruning would bring.
        survey = _survey(program, plan.candidates, workload, context)
        # Step 8. Tell everything.
        decisions = _decisions(program, plan.reasons, outcome, dense)
        report = Report(
            model=program.source.name if program.source else "",
            target=str(context.target),
            threads=config.thread_count,
            batch=workload.batches,
            decisions=decisions,
            timings=outcome.timings,
            survey=survey,
            verification=verification,
            fidelity=fidelity,
            notes=(*scarcity, *_notes(decisions, plan.candidates, workload, outcome, context)),
            bytes_before=_model_bytes(program),
            bytes_after=sum(p.stat().st_size for p in out.iterdir() if p.name != artifact.LIBRARY),
            seconds=time.perf_counter() - start,
        )
        _describe(out, report, outcome, context)
        return CompiledModel(report, scratch)
    except BaseException:
        scratch.cleanup()
        raise


class CompiledModel:
    """A finished artifact in a temporary folder, until it is saved.

    Attributes:
        report: every decision and number.
    """

    def __init__(self, report: Report, scratch: tempfile.TemporaryDirectory[str]) -> None:
        self.report = report
        self._scratch = scratch
        self._session: Any = None

    def save(self, out: str | Path, force: bool = False) -> None:
        """Write the artifact to the folder `out`, replacing one that sparsec made (with `force`: whatever is there).

        Raises:
            SparsecError: `out` cannot be written; nothing changed.
        """
        artifact.publish(self._folder, Path(out), force)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name."""
        if self._session is None:
            self._session = artifact.load(self._folder)
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, run_session(self._session, feeds), strict=True))

    def close(self) -> None:
        """Remove the temporary folder."""
        self._session = None
        self._scratch.cleanup()

    @property
    def _folder(self) -> Path:
        return Path(self._scratch.name) / "artifact"


def _make_context(config: CompileConfig, folder: Path, progress: Progress) -> _Context:
    if config.calib is not None and not config.prunes:
        raise UsageError("--calib: nothing is pruned that could be fitted to the data; add --sparsity, such as 0.5")
    if config.calib is None and config.method != "auto":
        raise UsageError(f"--method {config.method} needs calibration data: add --calib DATA")
    target = parse_target("cuda" if config.target == "auto" and has_gpu() else config.target)
    path = default_path() if config.cache is None else config.cache / "tuning.sqlite"
    tuner = Tuner(target, config.thread_count, config.tune.value, Database(path), config.tf32)
    return _Context(config, target, find_machine(target, config.thread_count), tuner, folder, progress)


def _fit(
    program: Program, plan: Plan, context: _Context
) -> tuple[Plan, tuple[Samples, Samples] | None, tuple[str, ...]]:
    """With calibration data: pruned weights fitted to most of it; that part and the one held back; and notes."""
    config = context.config
    layers = [pruned.layer for pruned in plan.pruned.values() if not pruned.layer.obstacle]
    if config.calib is None or not layers:
        return plan, None, ()
    machine = context.machine or Cpu(config.thread_count)
    session = machine.open(session_source(program.model, context.folder))
    seen, held_back = open_samples(config.calib, session, config.samples).split(HELD_BACK)
    context.progress.start("running the calibration data", None)
    calibration = gather(program, layers, seen, machine, context.folder)
    context.progress.start("fitting weights", len(layers))
    scarcity = [
        f"{len(calibration.scarce)} of {len(layers)} layers saw fewer rows of calibration data than they have inputs "
        f"('{name}': {rows} rows, {inputs} inputs): their weights are fitted with damping; more samples fit better."
        for name, (rows, inputs) in [*calibration.scarce.items()][:1]
    ]
    return fit(plan, calibration, config, context.progress.advance), (seen, held_back), tuple(scarcity)


def _judge(
    program: Program, data: tuple[Samples, Samples] | None, outcome: _Outcome, context: _Context
) -> Fidelity | None:
    """How far the artifact's outputs are from the dense model's on data that no weight was fitted to."""
    machine = _checker(outcome, context)
    if data is None or machine is None:
        return None
    seen, held_back = data
    dense = machine.open(session_source(program.model, context.folder))
    folder = context.folder / "artifact"
    sparse = machine.open(folder / artifact.MODEL, folder / artifact.LIBRARY)
    names = [output.name for output in dense.get_outputs()]
    lost, power = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for feeds in held_back.runs:
        for name, expected, found in zip(names, run_session(dense, feeds), run_session(sparse, feeds), strict=True):
            if isinstance(expected, np.ndarray) and expected.dtype.kind == "f":
                wide = expected.astype(np.float64)
                lost[name] += float(np.square(found - wide).sum())
                power[name] += float(np.square(wide).sum())
    errors = {name: (lost[name] / power[name]) ** 0.5 for name in names if power[name]}
    return Fidelity(errors, held_back.count, seen.count, seen.name, held_back is not seen)


def _decide(program: Program, candidates: Mapping[str, Candidate], workload: Workload, context: _Context) -> _Outcome:
    """Kernels for all candidates, then the choice: measured where the target is this machine, predicted elsewhere."""
    if not candidates or not workload.feeds:
        why = f"the model could not be run to measure it: {workload.failure}"
        return _Outcome({}, (), {name: _dense(c.layer, why) for name, c in candidates.items()}, ())
    tuned = _make_kernels(candidates, workload, context)
    ops = {
        name: SparseOp(candidate.matrix, tuned[name].kernel.name, context.config.thread_count)
        for name, candidate in candidates.items()
    }
    if context.machine is not None:
        decisions, timings = _measure(program, candidates, ops, tuned, workload, context, context.machine)
    else:
        decisions, timings = _predict(candidates, tuned, workload, context), ()
    stay = [name for name in candidates if decisions[name].choice == "sparse"]
    kernels = _distinct(tuned[name].kernel for name in stay)
    return _Outcome({name: ops[name] for name in stay}, kernels, decisions, timings)


def _predict(
    candidates: Mapping[str, Candidate], tuned: Mapping[str, Tuned], workload: Workload, context: _Context
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
            decisions[name] = dataclasses.replace(_dense(candidate.layer, reason), timings=timings)
    return decisions


def _measure(
    program: Program,
    candidates: Mapping[str, Candidate],
    ops: Mapping[str, SparseOp],
    tuned: Mapping[str, Tuned],
    workload: Workload,
    context: _Context,
    machine: Machine,
) -> tuple[dict[str, Decision], tuple[Timing, ...]]:
    """Each layer by itself, then the whole model, inside ONNX Runtime."""
    library = context.folder / "candidates.so"
    build_library(_distinct(one.kernel for one in tuned.values()), library, context.target.cpu.requires)
    threads, database = context.config.thread_count, context.tuner.database
    bench = Bench(library, context.folder, machine, threads, context.target, database)

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
            decisions[name] = dataclasses.replace(_dense(candidate.layer, reason), timings=timings)
        context.progress.advance(name)

    # The whole model.
    context.progress.start("measuring the whole model", None)
    stay, model_timings = settle(
        gains, lambda names: compare_models(program, {name: ops[name] for name in names}, workload, bench)
    )
    for name in gains.keys() - stay:
        taken_back = f"{decisions[name].reason} by itself, but the whole model was slower with it"
        decisions[name] = dataclasses.replace(
            _dense(candidates[name].layer, taken_back), timings=decisions[name].timings
        )
    return decisions, model_timings


def _make_kernels(candidates: Mapping[str, Candidate], workload: Workload, context: _Context) -> dict[str, Tuned]:
    """A kernel a candidate, shared by those that pose the same problem."""
    problems: dict[str, tuple[Problem, tuple[int, ...]]] = {}
    for name, candidate in candidates.items():
        rows = tuple(dict.fromkeys(workload.rows(name, batch) for batch in workload.batches))
        problems[name] = (Problem.of(candidate.matrix, candidate.layer.epilogue), rows)
    distinct = dict.fromkeys(problems.values())
    context.progress.start("tuning kernels", len(distinct))
    made = {}
    for problem, rows in distinct:
        made[problem, rows] = context.tuner.kernel(problem, rows)
        context.progress.advance(problem.key)
    return {name: made[key] for name, key in problems.items()}


def _words(tuned: Tuned) -> str:
    return "; ".join(f"{rows} rows: {schedule}" for rows, schedule in tuned.schedules.items())


def _distinct(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    return tuple({kernel.name: kernel for kernel in kernels}.values())


def _dense_weights(plan: Plan, outcome: _Outcome, config: CompileConfig) -> dict[str, NDArray[np.float32]]:
    """New weights of layers that stay dense: none, but for `prune_all`."""
    if not config.prune_all:
        return {}
    return {name: pruned.weight for name, pruned in plan.pruned.items() if name not in outcome.ops}


def _verify(
    program: Program,
    outcome: _Outcome,
    dense: Mapping[str, NDArray[np.float32]],
    workload: Workload,
    context: _Context,
) -> Verification | None:
    """The largest difference between the artifact and the dense model with the same weights.

    Raises:
        SparsecError: they differ by more than rounding.
    """
    machine = _checker(outcome, context)
    if not workload.feeds or machine is None:
        return None
    masked = {name: op.matrix.to_dense() for name, op in outcome.ops.items()}
    reference = export(program, {}, {**masked, **dense})
    session = machine.open(session_source(reference, context.folder))
    feeds = next(iter(workload.feeds.values()))
    expected = run_session(session, feeds)
    del session, reference
    folder = context.folder / "artifact"
    compiled = machine.open(folder / artifact.MODEL, folder / artifact.LIBRARY)
    error = max((relative_error(e, a) for e, a in zip(expected, run_session(compiled, feeds), strict=True)), default=0)
    exact = all(op.matrix.dtype == "float32" for op in outcome.ops.values())
    if error > (WRONG if exact else WRONG_16_BITS) and outcome.ops:
        raise SparsecError(
            f"the compiled model differs from the dense one with the same weights by {error:.1e} of its largest "
            "output, which rounding does not explain: this is a bug of sparsec, please report it. Nothing was written"
        )
    return Verification(error, len(expected), workload.inputs)


def _checker(outcome: _Outcome, context: _Context) -> Machine | None:
    """Where the artifact's results can be checked: the target itself, else this CPU if it has all kernels."""
    if context.machine is not None:
        return context.machine
    runs_here = context.target.cpu.host and all(op.matrix.dtype == "float32" for op in outcome.ops.values())
    return Cpu(context.config.thread_count) if runs_here else None


def relative_error(expected: Any, actual: Any) -> float:
    """The largest absolute difference over the largest absolute value; 0 for outputs that are no numbers."""
    if not isinstance(expected, np.ndarray) or expected.dtype.kind not in "fiub" or not expected.size:
        return 0.0
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    if a.shape != b.shape:
        return float("inf")
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0
    scale = np.abs(a[np.isfinite(a)]).max(initial=0.0)
    difference = np.abs(a - b)[~same].max()
    return float(difference / scale) if scale and np.isfinite(difference) else float("inf")


def _survey(
    program: Program, kept: Mapping[str, Candidate], workload: Workload, context: _Context
) -> tuple[SurveyPoint, ...]:
    """The whole model with its dense layers pruned at several sparsities; weights are masked for this only."""
    config = context.config
    if config.prunes or not config.survey or not workload.feeds or context.machine is None:
        return ()
    points = []
    for sparsity in SURVEY:
        plan = make_plan(program, config.model_copy(update={"sparsity": sparsity}), context.target)
        if plan.candidates.keys() <= kept.keys():
            return ()
        outcome = _decide(program, plan.candidates, workload, context)
        speedups = tuple(timing.speedup for timing in outcome.timings) or (1.0,) * len(workload.batches)
        points.append(SurveyPoint(sparsity, config.pattern, len(outcome.ops), speedups))
    return tuple(points)


def _dense(layer: Layer, reason: str) -> Decision:
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


def _decisions(
    program: Program,
    reasons: Mapping[str, str],
    outcome: _Outcome,
    dense: Mapping[str, NDArray[np.float32]],
) -> tuple[Decision, ...]:
    """One a layer, in the order of the graph."""
    decisions = []
    for layer in program.layers:
        decision = outcome.decisions.get(layer.name) or _dense(layer, reasons[layer.name])
        if layer.name in dense:
            zeros = float((dense[layer.name] == 0).mean())
            decision = dataclasses.replace(decision, zeros_after=zeros, pruned=True)
        decisions.append(decision)
    return tuple(decisions)


def _notes(
    decisions: Iterable[Decision],
    candidates: Mapping[str, Candidate],
    workload: Workload,
    outcome: _Outcome,
    context: _Context,
) -> tuple[str, ...]:
    notes = []
    if workload.failure:
        notes.append(f"Nothing could be measured or checked: {workload.failure}")
    if any(decision.pruned for decision in decisions) and context.config.calib is None:
        notes.append("Weights were pruned by their norms, without data (--calib): accuracy was not measured.")
    if candidates and not outcome.ops:
        notes.append("No layer became sparse: the artifact is the model as it came.")
    if context.machine is None:
        checked = _checker(outcome, context) is not None
        results = "results were checked with its kernels for the CPU only" if checked else "no result was checked"
        notes.append(f"{context.target} is not this machine: no speed was measured, and {results}.")
    return tuple(notes)


def _model_bytes(program: Program) -> int:
    """Size of the model as it would be saved, from its tensors."""
    total = 0
    for graph in program.model.graphs():
        for value in graph.initializers.values():
            total += value.const_value.nbytes if value.const_value is not None else 0
    return total


def _describe(out: Path, report: Report, outcome: _Outcome, context: _Context) -> None:
    """Write report.json and manifest.json."""
    from importlib.metadata import version

    packages = ("sparsec", "apache-tvm", "onnx", "onnx-ir", "numpy")
    manifest = {
        "sparsec": version("sparsec"),
        "versions": {name: version(name) for name in packages},
        "target": report.target,
        "requires": list(context.target.cpu.requires),
        "config": context.config.model_dump(mode="json", exclude={"cache", "inputs", "calib"}),
        "kernels": [
            {
                "name": kernel.name,
                "symbols": [*(v.symbol for v in kernel.cpu), *(v.symbol for v in kernel.cuda)],
            }
            for kernel in outcome.kernels
        ],
        "files": artifact.file_hashes(out),
    }
    (out / artifact.REPORT).write_text(report.to_json(), encoding="utf-8")
    (out / artifact.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
