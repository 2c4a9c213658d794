"""How much goes: a share of the weights, or what a budget of speed or accuracy allows. Measured in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...ir import Program, SparsecError
from ..budget.healer import Healer
from ..budget.pick import check_pick, too_far, too_slow
from ..decide import MODEL_MARGIN
from ..exporter import session_source
from ..plan import check_names
from ..report import FrontierPoint
from .decisions import removal_decision
from .removal import Removal, Smaller
from .work import Work, uses

if TYPE_CHECKING:
    import onnx_ir

    from ...ir import Decision, Timing
    from ..budget.judge import Judge
    from ..context import Context
    from ..probe import Workload
    from ..report import Healing
    from .removal import Kept

# Shares of the multiplications that the points of a frontier aim at.
POINTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True, eq=False)
class Removed:
    """What became of a program.

    Attributes:
        program: what goes on, the one that came where nothing was left out.
        masked: what it has to equal; None where nothing was left out.
        removal: what could have gone.
        share: of the weights of layers that can get smaller, what is gone.
        timings: against the program as it came, one a batch size; none where nothing was measured or left out.
        frontier: points of a budget, beginning with the program as it came.
        missed: which target was not reached, and why, or "".
        notes: what a user should know.
        healing: what training did, if there was any.
    """

    program: Program
    masked: onnx_ir.Model | None
    removal: Removal
    share: float = 0.0
    timings: tuple[Timing, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()
    missed: str = ""
    notes: tuple[str, ...] = ()
    healing: Healing | None = None

    @property
    def judge(self) -> Judge | None:
        """The metric; None without data."""
        return self.removal.judge

    @property
    def runs(self) -> Sequence[Mapping[str, Any]]:
        """Inputs that weights were fitted to; none without data."""
        return () if self.removal.samples is None else self.removal.samples.runs

    def decisions(self, dense: Program, decisions: Sequence[Decision]) -> tuple[Decision, ...]:
        """One a layer of the program as it came, from those of what goes on."""
        left = {layer.name: layer for layer in self.program.layers}
        found = {decision.layer: decision for decision in decisions}
        exact = self.removal.exact
        if self.masked is None:
            otherwise = "no channel was left out of the model"
        elif exact:
            otherwise = "too few of its channels are dead, if any"
        else:
            otherwise = "channels of other layers are worth less"
        return tuple(
            removal_decision(one, left[one.name], found[one.name], self.removal.declined, otherwise, exact)
            for one in dense.layers
        )


@dataclass(frozen=True, eq=False)
class _Point:
    """Channels that stay, and what that brings and costs before anything is fitted to it."""

    kept: Kept
    timings: tuple[Timing, ...]
    value: float | None
    nbytes: int

    @property
    def speedup(self) -> float:
        return min((timing.speedup for timing in self.timings), default=0.0)


def remove_channels(program: Program, workload: Workload, context: Context) -> Removed:
    """Leave channels out as the configuration asks, unless the smaller model is slower.

    Raises:
        SparsecError: the calibration data does not fit the model, or an activation is NaN or infinite.
    """
    check_names(program, context.config)
    if context.config.budgeted and (context.machine is None or not workload.feeds):
        why = workload.failure or f"{context.target} is not this machine"
        raise SparsecError(f"--speedup and --max-drop need times, and nothing can be measured: {why}. Give --sparsity")
    removal = Removal(program, context)
    if removal.exact:
        return _without_dead(program, removal, workload, context)
    if not removal.cuts:
        return Removed(program, None, removal, missed=_nothing(removal, context))
    if context.config.budgeted:
        return _with_notes(_Search(removal, workload, context).result())
    assert context.config.sparsity is not None, "otherwise it is exact"
    asked = context.config.sparsity
    smaller = removal.make(removal.at(asked, removal.weights()))
    removed = _unless_slower(program, removal, smaller, workload, context)
    if removed.masked is None:
        return removed
    if context.config.heal_limit is not None:
        healed = removal.heal(smaller, context.config.heal_limit)
        removed = replace(removed, program=healed.program, masked=healed.masked, healing=healed.healing)
    if removed.share < asked - 0.005:
        words = f"{removed.share:.1%} of the weights is all that can be left out; {asked:.0%} was asked for."
        removed = replace(removed, notes=(words,))
    return _with_notes(removed)


def _with_notes(removed: Removed) -> Removed:
    """With what is to be said of its training, if there was any."""
    if removed.healing is None or removed.judge is None:
        return removed
    return replace(removed, notes=(*removed.notes, *Healer.notes(removed.judge)))


def _without_dead(program: Program, removal: Removal, workload: Workload, context: Context) -> Removed:
    """What changes nothing that the model computes."""
    live = removal.live()
    if kept := removal.least(live):
        return _unless_slower(program, removal, removal.without_dead(kept), workload, context)
    total = sum(len(mask) for mask in live.values())
    dead = total - sum(int(mask.sum()) for mask in live.values())
    few = f"{dead or 'none'} of the {total} that could go {'are' if dead > 1 else 'is'} dead"
    rule = "read by zero weights only, or zero whatever the input"
    why = f"{few}, that is {rule}{': too few to be faster without them' if dead else ''}" if total else "none can go"
    return Removed(program, None, removal, notes=(f"No channel was left out: {why}.",))


def _unless_slower(
    program: Program, removal: Removal, smaller: Smaller, workload: Workload, context: Context
) -> Removed:
    """The smaller model, or the one that came where that is faster, or neither can be run."""
    timings = _compare(program, smaller, workload, context)
    if any(timing.speedup < MODEL_MARGIN for timing in timings) or not workload.feeds:
        why = workload.failure or _slower(timings)
        return Removed(program, None, removal, notes=(f"No channel was left out: {why}.",))
    return Removed(smaller.program, smaller.masked, removal, removal.weights().gone(smaller.kept), timings)


class _Search:
    """The points of a budget, and which of them becomes the artifact."""

    def __init__(self, removal: Removal, workload: Workload, context: Context) -> None:
        self._removal, self._workload, self._context = removal, workload, context
        machine = context.machine
        assert machine is not None and workload.feeds, "a budget needs times"
        program = removal.program
        self._work = Work(
            program, removal.channels, uses(program, next(iter(workload.feeds.values())), machine, context.folder)
        )
        kept = [removal.at(share, self._work) for share in POINTS]
        distinct = [one for i, one in enumerate(kept) if all(_differ(one, other) for other in kept[:i])]
        context.progress.start("measuring the frontier", len(distinct))
        self.points = [self._point(one) for one in distinct]
        self._fast = [i for i, point in enumerate(self.points) if point.speedup >= MODEL_MARGIN]
        self._made: dict[int, Smaller] = {}
        if context.config.pick is not None:
            check_pick(context.config.pick, len(self.points))

    def result(self) -> Removed:
        """The point within the budget, fitted to the data; the program as it came where there is none."""
        removal = self._removal
        at, missed = self._choose()
        if at is None:
            return Removed(removal.program, None, removal, frontier=self._report(at), missed=missed)
        smaller, point = self._make(at), self.points[at]
        missed = missed or self._missed_by(at, smaller)
        frontier = self._report(at)
        share = removal.weights().gone(smaller.kept)
        return Removed(
            smaller.program, smaller.masked, removal, share, point.timings, frontier, missed, healing=smaller.healing
        )

    def _choose(self) -> tuple[int | None, str]:
        """The number of a point, and which target it misses."""
        config = self._context.config
        if config.pick is not None:
            at = config.pick - 1
            if at in self._fast:
                return at, ""
            if at >= 0:
                return None, f"point {config.pick} is slower than dense: the artifact is the model as it came."
            return None, "" if config.speedup is None else too_slow(0, config.speedup, 1.0)
        if config.speedup is None:
            found = self._within_limit()
            return found, "" if found is not None else _nothing(self._removal, self._context)
        enough = [i for i in self._fast if self.points[i].speedup >= config.speedup]
        if enough:
            return enough[0], ""
        missed = f"{config.speedup:g}x the speed was not reached"
        if not self._fast:
            return None, f"{missed}: no smaller model is faster, and the artifact is the model as it came."
        fastest = max(self._fast, key=lambda i: self.points[i].speedup)
        return fastest, f"{missed}, {self.points[fastest].speedup:.2f}x was: this is the fastest that was found."

    def _missed_by(self, at: int, smaller: Smaller) -> str:
        """The target that a picked point misses; what the budget chose has said so already."""
        config, judge = self._context.config, self._removal.judge
        if config.pick is None:
            return ""
        if config.speedup is not None:
            return too_slow(config.pick, config.speedup, self.points[at].speedup)
        assert judge is not None, "a budget needs data"
        return too_far(config.pick, judge, smaller.value)

    def _within_limit(self) -> int | None:
        """The fastest whose metric holds once it is fitted: by halves, as more gone is rarely better."""
        judge = self._removal.judge
        assert judge is not None, "a budget needs data"
        best, low, high = None, 0, len(self._fast)
        while low < high:
            middle = (low + high) // 2
            value = self._make(self._fast[middle]).value
            if value is not None and judge.allows(value):
                best, low = self._fast[middle], middle + 1
            else:
                high = middle
        return best

    def _make(self, at: int) -> Smaller:
        """Fitted, and trained where that is asked for: in equal parts of the time where several may have to be."""
        if at not in self._made:
            smaller, config = self._removal.make(self.points[at].kept), self._context.config
            if config.heal_limit is not None:
                tries = 1 if config.max_drop is None or config.pick is not None else len(self._fast).bit_length()
                smaller = self._removal.heal(smaller, config.heal_limit * (1 / tries))
            self._made[at] = smaller
        return self._made[at]

    def _point(self, kept: Kept) -> _Point:
        smaller = self._removal.make(kept, fitted=False)
        timings = _compare(self._removal.program, smaller, self._workload, self._context)
        self._context.progress.advance()
        return _Point(kept, timings, smaller.value, smaller.program.nbytes)

    def _report(self, at: int | None) -> tuple[FrontierPoint, ...]:
        removal, batches = self._removal, len(self._workload.feeds)
        dense = removal.judge.dense if removal.judge is not None else None
        first = FrontierPoint((1.0,) * batches, 0.0, dense, removal.program.nbytes, 0, at is None)
        weights = removal.weights()
        return first, *(
            FrontierPoint(
                tuple(timing.speedup for timing in point.timings),
                weights.gone(point.kept),
                point.value,
                point.nbytes,
                len({place.name for d in point.kept for place in (*d.rows, *d.columns)}),
                i == at,
                self._made[i].value if i in self._made and self._made[i].healing is not None else None,
            )
            for i, point in enumerate(self.points)
        )


def _compare(program: Program, smaller: Smaller, workload: Workload, context: Context) -> tuple[Timing, ...]:
    """The program as it came against the smaller one, at each batch size; nothing where the target is elsewhere."""
    machine = context.machine
    if machine is None:
        return ()
    before, after = (machine.open(session_source(p.model, context.folder)) for p in (program, smaller.program))
    return tuple(machine.compare(before, after, feeds).timing(batch, batch) for batch, feeds in workload.feeds.items())


def _differ(one: Kept, other: Kept) -> bool:
    return {d: len(stay) for d, stay in one.items()} != {d: len(stay) for d, stay in other.items()}


def _slower(timings: Sequence[Timing]) -> str:
    worst = min(timings, key=lambda timing: timing.speedup)
    return f"the smaller model is {1 / worst.speedup:.2f}x slower at batch {worst.batch}"


def _nothing(removal: Removal, context: Context) -> str:
    if not removal.cuts:
        reasons = "; ".join(f"'{name}': {why}" for name, why in list(removal.declined.items())[:3])
        return f"no channel can be left out of this model: the artifact is the model as it came. {reasons}".strip()
    judge = removal.judge
    limit = f"{judge.metric.name} within {context.config.max_drop} of {judge.dense:.4g}" if judge else "these limits"
    return f"no smaller model with {limit} is faster: the artifact is the model as it came."
