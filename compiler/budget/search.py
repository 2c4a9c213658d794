"""Under a budget of speed or accuracy: the frontier, and which of its points becomes the artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..report import FrontierPoint
from .frontier import Allocation, Times, by_time, faster, for_speedup
from .pick import check_pick, too_far, too_slow

if TYPE_CHECKING:
    from ...ir import Timing
    from ..context import Context
    from ..report import Quality
    from .fitting import Chosen, Fitting

# How many allocations are made for a speed, and how much more than what is missing is asked for.
TRIES = 4
MORE = 1.02
# How often the way from the fastest point within the limit to the next is halved.
BISECTIONS = 1


class Search:
    """The budget: which point of the frontier is made next, until one holds.

    Attributes:
        fitting: options and weights.
        points: allocations, the slowest first.
        chosen: what is made now; None where nothing within the budget is left.
    """

    def __init__(self, fitting: Fitting, context: Context, model_us: Sequence[float]) -> None:
        """Evaluate the frontier and choose its first point.

        Args:
            fitting: with timed options.
            context: whose configuration has the budget.
            model_us: what the whole dense model takes, by batch size.
        """
        self.fitting, self._context = fitting, context
        kept = fitting.cache.load_frontier() if context.config.pick is not None else None
        self._times = Times.of(fitting.options, model_us if kept is None else kept["model_us"])
        self.points: list[Allocation] = by_time(fitting.options, self._times) if kept is None else kept["points"]
        self._scores: list[float | None] = [] if kept is None else kept["scores"]
        if kept is None:
            context.progress.start("measuring the frontier", len(self.points))
            for point in self.points:
                self._scores.append(fitting.score(point))
                context.progress.advance()
        self._tries, self._asked, self._missed = 0, context.config.speedup or 1.0, ""
        self.chosen = self._first()

    def next(self, timings: Sequence[Timing], quality: Quality | None) -> bool:
        """Judge the artifact that was made of `chosen`; when it misses the budget, choose another and return True.

        Args:
            timings: dense against the artifact, measured; empty where nothing could be.
            quality: of the artifact; None where it could not be run, which nothing is held against.
        """
        config = self._context.config
        if config.pick is not None:
            self._missed = self._missed or self._missed_by(config.pick, timings, quality)
        if self.chosen is None or config.pick is not None:
            return False
        if config.speedup is not None:
            if self.chosen.healing is not None:
                return False
            if self._next_faster(config.speedup, min((timing.speedup for timing in timings), default=1.0)):
                return True
            # Training changes no time: it is for the one that stays.
            self.chosen = self.fitting.heal(self.chosen)
            return self.chosen.healing is not None
        held = quality is None or self.fitting.judge.allows(quality.value)
        if held and (timings or self._context.machine is None):
            return False
        self.chosen = self._slower()
        return True

    def _missed_by(self, pick: int, timings: Sequence[Timing], quality: Quality | None) -> str:
        """The target that the picked point misses, as the artifact was measured; "" where nothing could be."""
        wanted = self._context.config.speedup
        if wanted is None:
            return "" if quality is None else too_far(pick, self.fitting.judge, quality.value)
        if not timings and self._context.machine is None:
            return ""
        return too_slow(pick, wanted, min((timing.speedup for timing in timings), default=1.0))

    def _next_faster(self, wanted: float, reached: float) -> bool:
        """Where the estimate was too high, ask for as much more; the fastest point is the last that is tried."""
        assert self.chosen is not None
        self._tries += 1
        if reached >= wanted:
            return False
        self._asked *= MORE * wanted / reached
        allocation = for_speedup(self.fitting.options, self._times, self._asked)
        if allocation is None or self._tries == TRIES - 1:
            allocation = self.points[-1]
        if allocation == self.chosen.allocation or self._tries >= TRIES:
            self._missed = self._too_slow(reached)
            return False
        self.chosen = self._insert(allocation)
        return True

    @property
    def missed(self) -> str:
        """Which target was not reached and what stood in the way, or ""."""
        return self._missed

    def report(self) -> tuple[FrontierPoint, ...]:
        """All points, beginning with the dense model, the fastest last; they are kept for another pick."""
        kept = {"points": self.points, "scores": self._scores, "model_us": self._times.model_us}
        self.fitting.cache.store_frontier(kept)
        options, judge = self.fitting.options, self.fitting.judge
        weights = {name: layer.weight.size for name, layer in self.fitting.layers.items()}
        total = max(sum(weights.values()), 1)
        dense_bytes = self.fitting.program.nbytes
        rows = [({}, judge.dense), *zip(self.points, self._scores, strict=True)]
        made = None if self.chosen is None else self.chosen.allocation
        points = []
        for allocation, score in rows:
            zeros = sum(weights[name] * options[name][i].zeros for name, i in allocation.items()) / total
            saved = sum(self.fitting.layers[name].nbytes - options[name][i].nbytes for name, i in allocation.items())
            points.append(
                FrontierPoint(
                    speedups=self._times.speedups(options, allocation),
                    zeros=zeros,
                    metric=score,
                    nbytes=dense_bytes - saved,
                    layers=len(allocation),
                    chosen=allocation == made if made is not None else not allocation,
                    healed=self.fitting.trained_value(allocation),
                )
            )
        return tuple(points)

    def _first(self) -> Chosen | None:
        config, judge = self._context.config, self.fitting.judge
        if config.pick is not None:
            check_pick(config.pick, len(self.points))
        if not self.points:
            self._missed = self._nothing()
            return None
        if config.pick is not None:
            # Point 0 is the dense model.
            return self._make(self.points[config.pick - 1]) if config.pick else None
        if config.speedup is not None:
            allocation = for_speedup(self.fitting.options, self._times, config.speedup)
            return self._insert(self.points[-1] if allocation is None else allocation)
        allowed = [k for k, score in enumerate(self._scores) if score is not None and judge.allows(score)]
        at = max(allowed, default=-1)
        # What was solved layer by layer is within the limit up to here; fitted to each other the layers go further.
        end = len(self.points)
        while at + 1 < end:
            middle = (at + end) // 2
            if self._holds(self.points[middle]):
                at = middle
            else:
                end = middle
        if at < 0:
            self._missed = self._nothing()
            return None
        best = self.points[at]
        for _ in range(BISECTIONS):
            between = self._between(best)
            if between is None:
                break
            best = between
        return self._make(best)

    def _make(self, allocation: Allocation) -> Chosen:
        return self.fitting.heal(self.fitting.make(allocation))

    def _holds(self, allocation: Allocation) -> bool:
        return self.fitting.allows(self.fitting.probe(allocation))

    def _between(self, allowed: Allocation) -> Allocation | None:
        """An allocation half way to the next point, where that is within the limit; it becomes a point."""
        at = self.points.index(allowed)
        if at + 1 >= len(self.points):
            return None
        middle = 0.5 * (self._mean_speed(at) + self._mean_speed(at + 1))
        allocation = for_speedup(self.fitting.options, self._times, middle)
        if allocation is None or allocation in self.points or not self._holds(allocation):
            return None
        self._insert(allocation)
        return allocation

    def _mean_speed(self, at: int) -> float:
        speeds = self._times.speedups(self.fitting.options, self.points[at])
        return len(speeds) / sum(1 / speed for speed in speeds)

    def _insert(self, allocation: Allocation) -> Chosen:
        """Make the allocation; it takes its place among the points."""
        if allocation not in self.points:
            self.points.append(allocation)
            self._scores.append(self.fitting.score(allocation))
            order = sorted(range(len(self.points)), key=self._mean_speed)
            self.points, self._scores = [self.points[i] for i in order], [self._scores[i] for i in order]
        return self.fitting.make(allocation)

    def _slower(self) -> Chosen | None:
        """The next slower point that holds; None, and why, where none is left."""
        assert self.chosen is not None
        at = self.points.index(self.chosen.allocation) - 1
        while at >= 0 and not self._holds(self.points[at]):
            at -= 1
        if at < 0:
            self._missed = self._nothing()
            return None
        return self._make(self.points[at])

    def _nothing(self) -> str:
        config, judge = self._context.config, self.fitting.judge
        target = f"{judge.metric.name} within {config.max_drop} of the dense model's ({judge.dense:.4g})"
        if config.speedup is not None:
            target = f"{config.speedup:g}x the speed"
        return f"no point with {target} is faster than dense: the artifact is the model as it came. {self._culprits()}"

    def _too_slow(self, reached: float) -> str:
        return (
            f"{self._context.config.speedup:g}x the speed was not reached, {reached:.2f}x was: this is the fastest "
            f"that was found. {self._culprits()}"
        )

    def _culprits(self) -> str:
        """Which layers stood in the way: those that cannot be faster, and those whose loss is the largest."""
        options = self.fitting.options
        usable = faster(options)
        if not options:
            return "No layer has a sparse operator on this target: 'sparsec inspect' says why."
        slow = [name for name in options if name not in usable]
        words = []
        if slow:
            words.append(
                f"No option is faster than dense in {len(slow)} of {len(options)} layers, such as '{slow[0]}'."
            )
        losses = sorted(usable, key=lambda name: -min(options[name][i].error for i in usable[name]))
        if losses:
            named = ", ".join(
                f"'{name}' ({min(options[name][i].error for i in usable[name]) ** 0.5:.1%})" for name in losses[:3]
            )
            words.append(f"Pruned alone, as little as is faster, these change the outputs most: {named}.")
        return " ".join(words)
