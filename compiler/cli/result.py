"""What a compilation found, as text: the decisions, the whole model, and how to go on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from .cells import facts, plain_table, speedup
from .console import printable
from .decisions import decision_table
from .text import count, factor, number, percent, size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console
    from rich.table import Table

    from ...ir import Timing
    from ..report import Healing, Report, SurveyPoint

# A survey suggests the least sparsity that brings this, at every batch size; else the one that brings most, if that
# is more than noise.
_WORTH_IT = 1.2
_NOTICEABLE = 1.03
# What is left out goes by whole channels and may miss the share that was asked for by so much before it is told.
_FAR = 0.02


@dataclass(frozen=True, slots=True)
class Result:
    """A report, and the command line and folder that a user would go on with.

    Attributes:
        typed: the command line without the program's name.
        out: the folder of the artifact.
        full: every layer on its own, with its whole name.
    """

    report: Report
    typed: Sequence[str]
    out: str
    full: bool = False

    def print(self, console: Console) -> None:
        """All of it, in the order in which it is read."""
        report = self.report
        console.print(Text(_headline(report), "bold"), "", sep="\n")
        if report.decisions:
            console.print(decision_table(report.decisions, console.width, self.full), "", sep="\n")
        if report.timings:
            after = "smaller ms" if report.removed else "sparse ms"
            console.print(Text("the whole model", "bold"), timing_table(report.timings, after), "", sep="\n")
        console.print(facts(_facts(report)), "", sep="\n")
        if report.frontier:
            source = "measured" if report.removed is not None else "estimated from the layers' own"
            words = f"the frontier (speedups {source}; --pick N makes point N)"
            console.print(Text(words, "bold"), frontier_table(report), "", sep="\n")
        if report.survey:
            title = Text(f"what pruning would bring ({_patterns(report.survey)}; measured, not written)", "bold")
            console.print(title, survey_table(report.survey, report.batch), "", sep="\n")
            self._print_next(console)
        console.print("To load it, with nothing but ONNX Runtime:", "", sep="\n")
        plain = bool(report.removed) and not report.sparse_layers
        console.print(*_recipe(self.out, report.target.startswith("cuda"), plain), sep="\n", soft_wrap=True)

    def _print_next(self, console: Console) -> None:
        """Which option goes on from a survey, and what is not known."""
        point = suggestion(self.report.survey)
        if point is None:
            console.print("At none of these would pruning make this model faster on this machine.", "", sep="\n")
            return
        at_least = f"From {percent(point.sparsity)} zeros on" if min(point.speedups) >= _WORTH_IT else "At best"
        console.print(f"{at_least} the model is {factor(min(point.speedups))} as fast. To go on from there:")
        command = f"    sparsec {shlex.join(self.typed)} --sparsity {point.sparsity:g}"
        console.print(Text(printable(command), "bold"), soft_wrap=True)  # one line, to be copied
        console.print(
            "Accuracy was not measured. Pruning costs some, so measure yours before you use the result.", "", sep="\n"
        )


def _headline(report: Report) -> str:
    of = printable(report.model) or "the model"
    where = f"{report.target}, {count(report.threads, 'thread')}"
    if not report.decisions:
        return f"{of} for {where}: no layer with a constant weight in its main graph"
    if report.removed is not None:
        return f"{of} for {where}: {report.smaller_layers} of {count(len(report.decisions), 'layer')} smaller"
    return f"{of} for {where}: {report.sparse_layers} of {count(len(report.decisions), 'layer')} sparse"


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    if report.bytes_before:
        yield "size", f"{size(report.bytes_before)} -> {size(report.bytes_after)}"
    verification = report.verification
    if verification is None:
        yield "verified", "no: the model could not be run here"
    else:
        of = f"{count(verification.outputs, 'output')}; inputs: {verification.inputs}"
        error = f"{verification.error:.1e} of the largest value" if verification.error else "none"
        yield "verified", f"largest difference from the dense model with the same weights: {error} ({of})"
    fidelity = report.fidelity
    if fidelity is not None:
        held = "held back" if fidelity.held_back else "which the weights were fitted to"
        fitted = f"; fitted to {fidelity.calibrated}" if fidelity.calibrated else ""
        yield (
            "accuracy",
            f"outputs differ from the dense model's by {percent(fidelity.worst)} (root mean square) on "
            f"{count(fidelity.samples, 'sample')} of {fidelity.source}, {held}{fitted}",
        )
    quality = report.quality
    if quality is not None:
        limit = f"; allowed to lose {quality.limit}" if quality.limit else ""
        yield quality.metric, f"{quality.dense:.4g} -> {quality.value:.4g}, against {quality.against}{limit}"
    if report.healing is not None:
        yield "healed", _healed(report.healing)
    if report.dense_int8 is not None:
        yield "dense int8", _dense_int8(report)
    if report.removed:
        far = report.asked is not None and abs(report.removed - report.asked) > _FAR
        asked = f"; {percent(report.asked)} asked" if far and report.asked else ""
        of = "of the weights of the layers that can get smaller"
        yield "left out", f"channels, with {percent(report.removed)} {of}{asked}"
    if report.asked is not None and report.removed is None and report.zeros is not None:
        # Layers get what costs least, and some stay dense: no row of the table has the share that was asked for.
        of = "of the weights of the layers that may be pruned"
        yield "zeros", f"{100 * report.zeros:.1f} % {of}; {percent(report.asked)} asked"
    if report.reordered is not None:
        before, after = report.reordered
        yield "reordered", f"channels, so that blocks keep {percent(after)} of the saliency, not {percent(before)}"
    yield "took", f"{number(report.seconds)} s"


def _healed(healing: Healing) -> str:
    """What training brought, and what it took."""
    took = f"{count(healing.steps, 'step')} in {number(healing.seconds)} s on {count(healing.samples, 'sample')}"
    if healing.resumed_steps:
        took += f" ({count(healing.resumed_steps, 'step')} in {number(healing.resumed_seconds)} s by an earlier run)"
    if healing.before is None or healing.after is None:
        brought = "the outputs came nearer to the dense model's" if healing.kept else "no better"
    else:
        brought = f"{healing.before:.4g} -> {healing.after:.4g}"
    end = f"; ended because {healing.note}" if healing.note else ""
    return f"{brought} on the data held back, by {took}{'' if healing.kept else '; not used'}{end}"


def _dense_int8(report: Report) -> str:
    """What ONNX Runtime's static quantisation of the whole model brings, and whether it is the better choice."""
    int8, quality = report.dense_int8, report.quality
    assert int8 is not None, "it was asked for"
    if int8.failure:
        return f"could not be measured: {int8.failure}"
    pairs = zip(report.batch, int8.speedups, strict=True)
    words = ", ".join(f"{factor(speedup)} at batch {batch}" for batch, speedup in pairs)
    ours = [timing.speedup for timing in report.timings] or [1.0] * len(int8.speedups)
    faster = all(a > b for a, b in zip(int8.speedups, ours, strict=True))
    if quality is None or int8.metric is None:
        return f"{words}{'; faster than this artifact' if faster else ''}; its accuracy was not measured"
    better = int8.metric >= quality.value if quality.higher_is_better else int8.metric <= quality.value
    choice = "; the better choice here: faster, and no less accurate" if faster and better else ""
    return f"{words}, {quality.metric} {int8.metric:.4g}, without pruning (ONNX Runtime's quantize_static){choice}"


def _patterns(survey: Sequence[SurveyPoint]) -> str:
    return " or ".join(dict.fromkeys(point.pattern for point in survey))


def _recipe(out: str, on_gpu: bool, plain: bool) -> list[str]:
    """Python that loads the artifact; a `plain` one has no operator of ours."""
    from ..artifact import LIBRARY, MODEL

    library = [
        "    options = onnxruntime.SessionOptions()",
        f"    options.register_custom_ops_library({str(Path(out, LIBRARY))!r})",
    ]
    options = "None" if plain else "options"
    return [
        "    import onnxruntime",
        *([] if plain else library),
        f"    providers = {[*(['CUDAExecutionProvider'] if on_gpu else []), 'CPUExecutionProvider']}",
        f"    session = onnxruntime.InferenceSession({str(Path(out, MODEL))!r}, {options}, providers)",
    ]


def timing_table(timings: Sequence[Timing], after: str = "sparse ms") -> Table:
    """Whole models: milliseconds, and the speedup with its quartiles; `after` heads those of the artifact."""
    table = plain_table((">", "batch"), (">", "dense ms"), (">", after), (">", "speedup"), ("<", "middle half"))
    for timing in timings:
        low, high = timing.spread
        table.add_row(
            f"{timing.batch}",
            number(timing.dense_us / 1000),
            number(timing.sparse_us / 1000),
            speedup(timing.speedup),
            f"{factor(low)} to {factor(high)}",
        )
    return table


def survey_table(survey: Sequence[SurveyPoint], batches: Sequence[int]) -> Table:
    """What pruning would bring, a row a sparsity."""
    table = plain_table((">", "zeros"), (">", "sparse layers"), *((">", f"batch {batch}") for batch in batches))
    for point in survey:
        table.add_row(percent(point.sparsity), f"{point.layers}", *(speedup(value) for value in point.speedups))
    return table


def frontier_table(report: Report) -> Table:
    """What other budgets would have bought; the chosen point is marked."""
    metric = report.quality.metric if report.quality is not None else "metric"
    healed = any(point.healed is not None for point in report.frontier)
    table = plain_table(
        (">", "N"),
        *((">", f"batch {batch}") for batch in report.batch),
        (">", "zeros" if report.removed is None else "gone"),
        (">", "layers"),
        (">", metric),
        *(((">", "healed"),) if healed else ()),
        (">", "size"),
        ("<", ""),
    )
    for at, point in enumerate(report.frontier):
        value = "none" if point.metric is None else f"{point.metric:.4g}"
        table.add_row(
            f"{at}",
            *(speedup(one) for one in point.speedups),
            percent(point.zeros),
            f"{point.layers}",
            value,
            *(("" if point.healed is None else f"{point.healed:.4g}",) if healed else ()),
            size(point.nbytes),
            "chosen, before fitting its layers to each other"
            if point.chosen and at
            else "chosen"
            if point.chosen
            else "",
        )
    return table


def suggestion(survey: Sequence[SurveyPoint]) -> SurveyPoint | None:
    """Where to go on from a survey: the least sparsity that is worth it, judged by the batch size that gains least."""
    measured = sorted((point for point in survey if point.speedups), key=lambda point: point.sparsity)
    for point in measured:
        if min(point.speedups) >= _WORTH_IT:
            return point
    best = max(measured, key=lambda point: min(point.speedups), default=None)
    return best if best is not None and min(best.speedups) > _NOTICEABLE else None
