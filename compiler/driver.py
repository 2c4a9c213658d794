"""The way a model takes through sparsec, as one function: `compile`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..codegen.ort.library import build_library
from ..ir import Decision, SparsecError, UsageError
from ..ir.values import Codebook, Floats, Int8
from ..passes.solve import AUTO
from . import artifact
from .budget import PLANNED, Fitting, Search, with_pattern
from .calibration import check_metric, has_rows
from .config import PATTERN, CompileConfig
from .context import Context, Progress, Silent, make_context
from .decide import dense_decision
from .dense_int8 import statically_quantized
from .exporter import export, save, session_source, store_coded
from .frontend import read
from .frontend.weights import weight_index
from .healing import CPU, check_torch
from .machine import Cpu, Machine
from .outcome import Outcome, decide
from .plan import Candidate, Plan, make_plan, with_weights
from .probe import Workload, probe
from .removal import Removed, check_structured, remove_channels
from .report import DenseInt8, Fidelity, Quality, Report, SurveyPoint, Verification
from .runtime import run_session

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    from numpy.typing import NDArray

    from ..ir import Program, Timing
    from .budget import Chosen

# Sparsities that the survey of a dense model measures.
SURVEY = (0.5, 0.7, 0.8, 0.9)
# What of the configuration is said by paths or objects of this machine.
_LOCAL = {"cache", "inputs", "calib", "labels", "eval_data", "eval_labels", "metric", "solutions", "tune_on"}
# Above this relative error against the dense model with the same weights an artifact is wrong, not merely rounded. Half
# precision and 8 bits round before every operator, and a value near a tie goes either way.
WRONG, WRONG_ROUNDED = 1e-2, 1e-1


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
        _check(config)
        context = make_context(config, Path(scratch.name), progress or Silent())
        # Step 1. Read the model and find its layers. `structured` leaves channels out; the rest goes on as any model.
        dense = read(model)
        removed = _remove_channels(dense, context)
        program, context = (dense, context) if removed is None else (removed.program, _as_it_is(context))
        # Step 2. Choose which layers are pruned, by norm.
        plan = _plan(program, context)
        # Step 3. Run the model once: which shapes reach its layers.
        workload = probe(program, config, context.folder, context.machine)
        if config.calib is not None and config.pattern == AUTO:
            context = with_pattern(program, plan, workload, context)
            plan = _plan(program, context)
        # Step 4. With data: choose and fit their weights. Under a budget, until an artifact holds.
        for attempt in _attempts(program, plan, workload, context):
            source, fitting, search = attempt.program, attempt.fitting, attempt.search
            # Step 5. Compile and tune kernels; keep what is faster by itself, then what is faster together.
            candidates = attempt.plan.candidates
            candidates = candidates if fitting is None else fitting.with_grids(source, candidates)
            outcome = decide(source, candidates, workload, context)
            # Step 6. Write the artifact; where nothing changed, as the model came.
            weights = _Weights.of(attempt.plan, outcome, config)
            out, stored = _write(source if outcome.ops or weights.dense else program, outcome, weights, context)
            # Step 7. Run it against the dense model with the same weights, and against the one that came.
            verification = _verify(source, outcome, weights, removed, workload, context)
            data = fitting if fitting is not None else removed
            fidelity, quality = _judge(data, outcome, context)
            if search is None or not search.next(outcome.timings, quality):
                break
        dense_int8 = _dense_int8(dense, data, workload, context)
        # Step 8. For what is dense, measure what pruning would bring.
        survey = _survey(program, attempt.plan.candidates, workload, context)
        # Step 9. Tell everything.
        decisions = _decisions(program, attempt.plan.reasons, outcome, weights, stored)
        if removed is not None:
            decisions = removed.decisions(dense, decisions)
        healing = attempt.chosen.healing if attempt.chosen else removed.healing if removed else None
        notes = _notes(decisions, attempt.plan.candidates, workload, outcome, context)
        if healing is None and config.heal is not None:
            notes += (_untrained(decisions, config),)
        report = Report(
            model=dense.source.name if dense.source else "",
            target=str(context.target),
            threads=config.thread_count,
            batch=workload.batches,
            decisions=decisions,
            timings=outcome.timings if removed is None else _timings(dense, removed, outcome, workload, context),
            survey=survey,
            verification=verification,
            fidelity=fidelity,
            quality=quality,
            healing=healing,
            frontier=search.report() if search is not None else removed.frontier if removed is not None else (),
            dense_int8=dense_int8,
            reordered=None if fitting is None else fitting.reordered,
            removed=None if removed is None else removed.share,
            zeros=_zeros(plan, decisions),
            asked=None if any(share for _, share in config.layer_sparsity) else config.sparsity,
            missed=search.missed if search is not None else removed.missed if removed is not None else "",
            notes=notes if data is None else (*data.notes, *notes),
            bytes_before=dense.nbytes,
            bytes_after=sum(p.stat().st_size for p in out.iterdir() if p.name != artifact.LIBRARY),
            seconds=time.perf_counter() - start,
        )
        _describe(out, report, outcome, context, config)
        if (context.folder / artifact.SOLUTIONS).exists():
            (context.folder / artifact.SOLUTIONS).rename(out / artifact.SOLUTIONS)
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


def _check(config: CompileConfig) -> None:
    """Refuse options that contradict each other or would have no effect."""
    goals = [
        name
        for name, given in (
            ("--sparsity", config.sparsity is not None),
            ("--speedup", config.speedup is not None),
            ("--max-drop", config.max_drop is not None),
        )
        if given
    ]
    if len(goals) > 1:
        raise UsageError(f"{' and '.join(goals)}: give one target; the others are what it costs, and are reported")
    if config.pick is not None and not config.budgeted:
        raise UsageError("--pick chooses a point of the frontier of --speedup or --max-drop: add the one it came from")
    if config.calib is not None and not (config.prunes or config.quantizes or config.structured):
        raise UsageError(
            "--calib: nothing is pruned that could be fitted to the data; add --sparsity, such as 0.5, --speedup, such "
            "as 2, or --max-drop, such as 1%"
        )
    if config.heal is not None and not config.prunes:
        raise UsageError("--heal: nothing is pruned that could be trained; add --sparsity, such as 0.5, or a budget")
    if config.heal is None and config.heal_on != CPU:
        raise UsageError(f"--heal-on {config.heal_on}: nothing is trained; add --heal, such as 10m")
    if config.structured:
        check_structured(config)
    wanted = Floats("bfloat16") if config.activations == "bf16" else Int8()
    if config.activations != "auto" and wanted not in config.kinds:
        raise UsageError(
            f"--activations {config.activations} goes with --values {wanted}; the values are {config.values}"
        )
    if len(config.kinds) > 1 and not config.budgeted:
        raise UsageError(
            f"--values {config.values}: which layer gets which is a matter of time and error; name one kind, or add "
            "--speedup, such as 2, or --max-drop, such as 1%"
        )
    if config.calib is not None:
        _check_means(config)
        return
    needing = {
        "--activations static": config.activations == "static",
        f"--method {config.method}": config.method != "auto",
        "--speedup": config.speedup is not None,
        "--max-drop": config.max_drop is not None,
        "--heal": config.heal is not None,
        "--metric": config.metric is not None,
        "--labels": config.labels is not None,
        "--eval": config.eval_data is not None,
        f"--pattern {config.pattern}": len(config.patterns) > 1,
    }
    for option, given in needing.items():
        if given:
            raise UsageError(f"{option} needs calibration data: add --calib DATA")


def _check_means(config: CompileConfig) -> None:
    """Refuse what can be told to fail before a large model and its data are read."""
    if config.metric is not None:
        check_metric(config.metric)
    if config.heal is not None:
        check_torch(config.heal_on)


def _remove_channels(program: Program, context: Context) -> Removed | None:
    """What is left without some channels; None unless the pattern asks for that."""
    if not context.config.structured:
        return None
    workload = probe(program, context.config, context.folder, context.machine)
    return remove_channels(program, workload, context)


def _as_it_is(context: Context) -> Context:
    """For what is left: no weight changes any more."""
    nothing: dict[str, Any] = {
        "pattern": PATTERN,
        "sparsity": None,
        "layer_sparsity": (),
        "speedup": None,
        "max_drop": None,
        "pick": None,
        "survey": False,
        "heal": None,
    }
    config = context.config.model_copy(update=nothing)
    return dataclasses.replace(context, config=config)


def _plan(program: Program, context: Context) -> Plan:
    """By norms, as long as there is no data. Under a budget the zeros are chosen later."""
    config = context.config
    planned = config.model_copy(update={"sparsity": PLANNED}) if config.budgeted else config
    return make_plan(program, planned, context.target)


@dataclass(frozen=True)
class Attempt:
    """What becomes an artifact, unless it misses its budget.

    Attributes:
        program: the model, or with its channels in another order, or with trained biases and norms.
        plan: of its layers.
        fitting, chosen: where the weights come from, with data.
        search: the budget, if there is one.
    """

    program: Program
    plan: Plan
    fitting: Fitting | None = None
    search: Search | None = None
    chosen: Chosen | None = None


def _attempts(program: Program, plan: Plan, workload: Workload, context: Context) -> Iterator[Attempt]:
    """The plan; with data its weights fitted; under a budget one plan after the other until one holds."""
    config = context.config
    fits = any(has_rows(pruned.layer) for pruned in plan.pruned.values())
    if config.calib is None or not (fits or config.budgeted or config.quantizes):
        yield Attempt(program, plan)
        return
    fitting = Fitting(program, plan, workload, context, timed=config.budgeted)
    search = Search(fitting, context, _dense_times(program, workload, context)) if config.budgeted else None
    chosen = fitting.at_sparsity(config.sparsity) if search is None else search.chosen
    while True:
        source = fitting.program if chosen is None else chosen.program
        own = plan if source is program else _plan(source, context)
        weights, forms = ({}, {}) if chosen is None else (chosen.weights, chosen.forms)
        yield Attempt(source, with_weights(own, weights, forms, fitting.layers, config), fitting, search, chosen)
        chosen = None if search is None else search.chosen


def _dense_times(program: Program, workload: Workload, context: Context) -> tuple[float, ...]:
    """Microseconds of the whole dense model, by batch size."""
    machine = context.machine or Cpu(context.config.thread_count)
    first, second = (machine.open(session_source(program.model, context.folder)) for _ in range(2))
    return tuple(machine.compare(first, second, feeds).dense_us for feeds in workload.feeds.values())


def _judge(
    data: Fitting | Removed | None, outcome: Outcome, context: Context
) -> tuple[Fidelity | None, Quality | None]:
    """The artifact's outputs on data that no weight was fitted to."""
    machine = _checker(outcome, context)
    if data is None or data.judge is None or machine is None:
        return None, None
    folder = context.folder / "artifact"
    session = machine.open(folder / artifact.MODEL, folder / artifact.LIBRARY)
    names = [output.name for output in session.get_outputs()]
    return data.judge.quality(lambda feeds: dict(zip(names, run_session(session, feeds), strict=True)))


def _timings(
    dense: Program, removed: Removed, outcome: Outcome, workload: Workload, context: Context
) -> tuple[Timing, ...]:
    """The model as it came against the artifact without some of its channels."""
    machine = context.machine
    if not outcome.ops or machine is None:
        return removed.timings
    folder = context.folder / "artifact"
    before = machine.open(session_source(dense.model, context.folder))
    after = machine.open(folder / artifact.MODEL, folder / artifact.LIBRARY)
    return tuple(machine.compare(before, after, feeds).timing(batch, batch) for batch, feeds in workload.feeds.items())


def _dense_int8(
    program: Program, data: Fitting | Removed | None, workload: Workload, context: Context
) -> DenseInt8 | None:
    """What a user could have instead, where it was asked for."""
    machine = context.machine
    if context.config.dense_baseline == "fp32" or machine is None or not workload.feeds:
        return None
    if any(layer.stored for layer in program.layers):
        return DenseInt8((), None, "the model is quantised already: its own form is the baseline")
    context.progress.start("quantising the dense model", None)
    dense = session_source(program.model, context.folder)
    judged = data is not None and data.judge is not None
    runs = data.runs if data is not None and judged else [*workload.feeds.values()]
    try:
        source = statically_quantized(dense, runs, context.folder)
        session = machine.open(source)
    except SparsecError as error:
        return DenseInt8((), None, str(error))
    before = machine.open(dense)
    compared = [machine.compare(before, session, feeds) for feeds in workload.feeds.values()]
    metric = None
    if data is not None and data.judge is not None:
        names = [output.name for output in session.get_outputs()]
        metric = data.judge.compare(lambda feeds: dict(zip(names, run_session(session, feeds), strict=True)))[1]
    return DenseInt8(tuple(one.speedup for one in compared), metric)


@dataclass(frozen=True)
class _Weights:
    """What the artifact has other than the model's.

    Attributes:
        dense: new weights of layers that stay dense: none, but for `prune_all`.
        biases: that go with new weights, dense or sparse.
    """

    dense: dict[str, NDArray[np.float32]]
    biases: dict[str, NDArray[np.float32]]

    @classmethod
    def of(cls, plan: Plan, outcome: Outcome, config: CompileConfig) -> _Weights:
        """Of the plan, where the outcome is sparse or dense layers are pruned too."""
        dense = {n: one.weight for n, one in plan.pruned.items() if n not in outcome.ops} if config.prune_all else {}
        new = {name: one for name, one in plan.pruned.items() if name in outcome.ops or name in dense}
        return cls(dense, {name: one.bias for name, one in new.items() if one.bias is not None})


def _write(
    program: Program, outcome: Outcome, weights: _Weights, context: Context
) -> tuple[Path, dict[str, tuple[str, int]]]:
    """The artifact's folder, with model and library; what an earlier attempt left there goes.

    Beside it, of layers that stay dense and are stored in another form: by name which, and its bytes.
    """
    out = context.folder / "artifact"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    model = export(program, outcome.ops, weights.dense, weights.biases)
    stored = _store_dense(program, model, outcome, context)
    save(model, out / artifact.MODEL)
    build_library(outcome.kernels, out / artifact.LIBRARY, context.target.cpu.requires)
    return out, stored


def _store_dense(
    program: Program, model: onnx_ir.Model, outcome: Outcome, context: Context
) -> dict[str, tuple[str, int]]:
    """Where codebooks were asked for: weights of dense layers, if a codebook holds them exactly."""
    kind = next((kind for kind in context.config.kinds if isinstance(kind, Codebook)), None)
    if kind is None:
        return {}
    dense = [layer for layer in program.layers if layer.name not in outcome.ops]
    names = {layer.name: layer.nodes[0].inputs[weight_index(layer)] for layer in dense}
    sizes = store_coded(model, dict.fromkeys(value.name or "" for value in names.values() if value), kind)
    return {layer: (str(kind), sizes[value.name]) for layer, value in names.items() if value and value.name in sizes}


def _verify(
    program: Program,
    outcome: Outcome,
    weights: _Weights,
    removed: Removed | None,
    workload: Workload,
    context: Context,
) -> Verification | None:
    """The largest difference between the artifact and the dense model with the same weights, zeros for what is gone.

    Raises:
        SparsecError: they differ by more than rounding.
    """
    machine = _checker(outcome, context)
    if not workload.feeds or machine is None:
        return None
    whole = None if removed is None else removed.masked
    if whole is not None:
        reference = whole  # what became sparse besides kept its zeros
    else:
        masked = {name: op.matrix.to_dense() for name, op in outcome.ops.items()}
        reference = export(program, {}, {**masked, **weights.dense}, weights.biases, outcome.ops)
    session = machine.open(session_source(reference, context.folder))
    feeds = next(iter(workload.feeds.values()))
    expected = run_session(session, feeds)
    del session, reference
    folder = context.folder / "artifact"
    compiled = machine.open(folder / artifact.MODEL, folder / artifact.LIBRARY)
    error = max((relative_error(e, a) for e, a in zip(expected, run_session(compiled, feeds), strict=True)), default=0)
    exact = all(op.matrix.dtype == "float32" and op.x == "float" for op in outcome.ops.values())
    # Where the model itself rounds to codes, a last bit moves a value by one step.
    exact = exact and not any(layer.stored for layer in program.layers)
    if error > (WRONG if exact else WRONG_ROUNDED) and (outcome.ops or whole is not None):
        raise SparsecError(
            f"the compiled model differs from the dense one with the same weights by {error:.1e} of its largest "
            "output, which rounding does not explain: this is a bug of sparsec, please report it. Nothing was written"
        )
    return Verification(error, len(expected), workload.inputs)


def _checker(outcome: Outcome, context: Context) -> Machine | None:
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
    program: Program, kept: Mapping[str, Candidate], workload: Workload, context: Context
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
        outcome = decide(program, plan.candidates, workload, context)
        speedups = tuple(timing.speedup for timing in outcome.timings) or (1.0,) * len(workload.batches)
        patterns = dict.fromkeys(str(candidate.matrix.pattern) for candidate in plan.candidates.values())
        points.append(SurveyPoint(sparsity, " or ".join(patterns), len(outcome.ops), speedups))
    return tuple(points)


def _decisions(
    program: Program,
    reasons: Mapping[str, str],
    outcome: Outcome,
    weights: _Weights,
    stored: Mapping[str, tuple[str, int]],
) -> tuple[Decision, ...]:
    """One a layer, in the order of the graph."""
    decisions = []
    for layer in program.layers:
        decision = outcome.decisions.get(layer.name) or dense_decision(layer, reasons[layer.name])
        if layer.name in weights.dense:
            zeros = float((weights.dense[layer.name] == 0).mean())
            decision = dataclasses.replace(decision, zeros_after=zeros, pruned=True)
        if layer.name in stored:
            values, nbytes = stored[layer.name]
            decision = dataclasses.replace(decision, values=values, bytes_sparse=nbytes)
        decisions.append(decision)
    return tuple(decisions)


def _zeros(plan: Plan, decisions: Iterable[Decision]) -> float | None:
    """Of all weights in the layers that may be pruned, as they are in the artifact; None where there are none."""
    sizes = {name: pruned.layer.weight.size for name, pruned in plan.pruned.items()}
    zeros = {one.layer: one.zeros_after for one in decisions}
    total = sum(sizes.values())
    return sum(size * zeros[name] for name, size in sizes.items()) / total if total else None


def _notes(
    decisions: Iterable[Decision],
    candidates: Mapping[str, Candidate],
    workload: Workload,
    outcome: Outcome,
    context: Context,
) -> tuple[str, ...]:
    notes = []
    if workload.failure:
        notes.append(f"Nothing could be measured or checked: {workload.failure}")
    if any(decision.pruned for decision in decisions) and context.config.calib is None:
        notes.append("Weights were pruned by their norms, without data (--calib): accuracy was not measured.")
    if candidates and not outcome.ops and not any(decision.shape_after for decision in decisions):
        kept = "the artifact is the model as it came"
        if any(decision.pruned for decision in decisions):
            kept = "the weights that --prune-all pruned stay dense, with zeros in them"
        notes.append(f"No layer became sparse: {kept}.")
    if context.machine is None:
        checked = _checker(outcome, context) is not None
        results = "results were checked with its kernels for the CPU only" if checked else "no result was checked"
        notes.append(f"{context.target} is not this machine: no speed was measured, and {results}.")
    return tuple(notes)


def _untrained(decisions: Iterable[Decision], config: CompileConfig) -> str:
    """Why --heal did nothing, and what else to ask for."""
    if any(decision.pruned for decision in decisions):
        return "Nothing was trained (--heal): the layers that were pruned are none that can be fitted to data."
    why = "Nothing was pruned, so nothing was trained (--heal); the decisions say why each layer stayed as it is."
    if config.structured or config.budgeted:
        return why
    others = "" if config.prune_all else " --prune-all prunes layers without a sparse operator too, and"
    return f"{why}{others} --sparsity 'LAYER=0.5' prunes small layers and the last one by name."


def _describe(out: Path, report: Report, outcome: Outcome, context: Context, config: CompileConfig) -> None:
    """Write report.json and manifest.json."""
    from importlib.metadata import version

    packages = ("sparsec", "apache-tvm", "onnx", "onnx-ir", "numpy")
    manifest = {
        "sparsec": version("sparsec"),
        "versions": {name: version(name) for name in packages},
        "target": report.target,
        "requires": list(context.target.cpu.requires),
        "config": config.model_dump(mode="json", exclude=_LOCAL),
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
