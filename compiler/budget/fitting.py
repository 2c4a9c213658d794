"""From calibration data to the weights of a whole model: options, an allocation, a repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...ir import parse_pattern
from ...ir.values import Floats
from ...passes.solve import SECONDS, round_weights
from ..artifact import SOLUTIONS
from ..calibration import Trial, Weights, find_grids, gather, has_rows, reordered, repair
from ..config import SAMPLES
from ..machine import Cpu
from ..parallel import each
from .cache import Cache
from .data import open_data
from .frontier import Allocation, by_zeros
from .healer import Healer, Judged
from .judge import Judge
from .options import Kept, Options, shares_masks, solve_option, solve_options
from .sensitivity import measure_errors
from .times import time_options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...ir import Layer, Program
    from ...ir.values import Values
    from ..calibration import Calibration
    from ..context import Context
    from ..formats import Form
    from ..machine import Machine
    from ..plan import Candidate, Plan
    from ..probe import Workload
    from ..report import Healing

# Under a budget of speed or accuracy: what layers are planned with, and the sparsities that each is solved at.
PLANNED = 0.8
LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
# Under a budget of speed or accuracy several points are tried as they were scouted, and one is solved by the best
# methods for so many seconds.
THOROUGH = 60.0
# Under a given share of zeros: how far a layer's may be from the whole model's.
AROUND = (-0.2, -0.1, 0.0, 0.1, 0.2)
MOST_ZEROS = 0.98
# Of the time for training, under a limit of the metric: what each point gets that is tried, and the one that is made.
PROBED, MADE = 1 / 8, 1 / 2


# An allocation, hashable.
_Key = tuple[tuple[str, int], ...]
# Weights, the error and the value of the metric with them.
_Scored = tuple[dict[str, Weights], float, float | None]


@dataclass(frozen=True)
class Chosen:
    """An allocation and its weights.

    Attributes:
        program: the model whose layers get the weights: the dense one, after training with other biases and norms.
        allocation: by layer name, the number of its option; the others stay dense.
        weights: by layer name, fitted to each other.
        forms: by layer name, how they are cut and stored.
        error: relative squared error of the outputs on the held-back data.
        value: the metric's there; None where the outputs are nothing that has one.
        healing: what training did, if there was any.
    """

    program: Program
    allocation: Allocation
    weights: dict[str, Weights]
    forms: dict[str, Form]
    error: float
    value: float | None
    healing: Healing | None = None


class Fitting:
    """What calibration data decides in one compilation.

    Attributes:
        program: the dense model, its channels reordered where that helps.
        config: what was asked for.
        layers: those that may be pruned, by name.
        reordered: which share of the saliency blocks keep before and after, None where nothing was reordered.
        judge: the metric, on samples that no weight was fitted to.
        calibration: statistics.
        options: what each layer could become.
        notes: what a user should know of the data.
        cache: where options and frontier are kept.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        workload: Workload,
        context: Context,
        timed: bool,
        levels: Sequence[float] = LEVELS,
    ) -> None:
        """Read the data, run the dense model on it, solve and measure the options.

        Args:
            program: the dense model.
            plan: whose pruned layers are meant.
            workload: what is timed.
            context: configuration and machine.
            timed: whether the options' times are needed.
            levels: sparsities that each layer is solved at where the configuration names none.

        Raises:
            SparsecError: the data does not fit the model, or an activation is NaN or infinite.
        """
        config = context.config
        self.program, self._workload, self._context, self._timed = program, workload, context, timed
        self.config = config
        self._all_levels, self._threads = levels, config.thread_count
        self._machine: Machine = context.machine or Cpu(config.thread_count)
        self.layers = {
            name: pruned.layer for name, pruned in plan.pruned.items() if has_rows(pruned.layer) and self._takes(pruned)
        }
        self._samples, self._held_back = open_data(program, context, self._machine)
        self._seen = self._samples if config.heal is None else self._samples.some(SAMPLES)
        self.calibration = self._gather()
        self.reordered = self._reorder()
        self._trial = Trial(self.program, [*self.layers.values()], self._machine, context.folder, watched=False)
        separate = config.eval_data is not None
        self.judge = Judge(self._model({}), self._samples, self._held_back, separate, config.metric, config.drop_limit)
        wanted = {name: config.wanted_sparsity(name) for name in self.layers}
        self._fixed = {name: share for name, (share, named) in wanted.items() if named and share is not None}
        self.cache = Cache(config.solutions, context.folder / SOLUTIONS, self.program, config)
        self._healer = None if config.heal is None else self._make_healer()
        self.options = self._solve()
        self.notes = (
            *self._scarcity(),
            *self._unreached(),
            *(() if self._healer is None else Healer.notes(self.judge)),
        )
        self._sketched: dict[_Key, Chosen] = {}
        self._trained: dict[_Key, float | None] = {}
        self._made: dict[_Key, Chosen] = {}
        self._solved: dict[tuple[str, int], Kept] = {}
        self._plain: dict[_Key, tuple[float, float | None]] = {}

    def at_sparsity(self, sparsity: float | None) -> Chosen:
        """The least error at this share of zeros; layers that were named keep their own."""
        free = {name: found for name, found in self.options.items() if name not in self._fixed}
        allocation = dict.fromkeys(self._fixed, 0)
        if sparsity is not None and free:
            allocation |= by_zeros(free, self.layers, sparsity)
        return self.heal(self.make(allocation))

    def sketch(self, allocation: Allocation) -> Chosen:
        """The weights of an allocation as its options have them, fitted to each other where that helps."""
        key = _key(allocation)
        if key not in self._sketched:
            forms = self._forms(allocation)
            plain = {name: Weights(self.options[name][i].kept.matrix) for name, i in allocation.items()}
            as_solved = self._stored(plain, forms) if self._kinds(forms) else (plain, *self._compared(allocation))
            self._sketched[key] = self._better(as_solved, self._fitted(plain, forms), allocation=allocation)
        return self._sketched[key]

    def make(self, allocation: Allocation) -> Chosen:
        """The weights of an allocation by the best method for each layer, fitted to each other where that helps."""
        if not any(self.options[name][i].scouted for name, i in allocation.items()):
            return self.sketch(allocation)
        key = _key(allocation)
        if key not in self._made:
            solved, forms = self.solved(allocation), self._forms(allocation)
            found = [self._stored(solved, forms), self._fitted(solved, forms)]
            if key in self._sketched:
                sketch = self._sketched[key]
                found.append((sketch.weights, sketch.error, sketch.value))
            self._made[key] = self._better(*found, allocation=allocation)
        return self._made[key]

    def probe(self, allocation: Allocation) -> Chosen:
        """The sketch, trained for a part of the time where training is asked for: whether the point is worth making."""
        return self._heal(self.sketch(allocation), PROBED)

    def heal(self, chosen: Chosen) -> Chosen:
        """What was made, trained where that is asked for."""
        return self._heal(chosen, 1.0 if self.config.max_drop is None else MADE)

    def trained_value(self, allocation: Allocation) -> float | None:
        """The metric on the held-back data after training; None where there was none."""
        return self._trained.get(_key(allocation))

    def _heal(self, chosen: Chosen, share: float) -> Chosen:
        if self._healer is None or self.config.heal_limit is None or not chosen.weights:
            return chosen
        before = Judged(chosen.program, chosen.weights, chosen.error, chosen.value)

        def rounded(weights: dict[str, Weights]) -> dict[str, Weights]:
            return self._rounded(chosen.forms, weights, {name: new.matrix for name, new in weights.items()})

        found = self._healer.heal(before, self.config.heal_limit * share, rounded)
        self._trained[_key(chosen.allocation)] = found.value
        return replace(
            chosen,
            program=found.program,
            weights=found.weights,
            error=found.error,
            value=found.value,
            healing=found.healing,
        )

    def solved(self, allocation: Allocation) -> dict[str, Weights]:
        """The weights of an allocation by the best method for each layer."""
        progress = self._context.progress
        todo = [(name, i) for name, i in allocation.items() if (name, i) not in self._solved]
        seconds = THOROUGH * self._threads / max(len(todo), 1) if self._context.config.budgeted else SECONDS
        progress.start("solving layers", len(todo))

        def solve_layer(one: tuple[str, int]) -> Kept:
            name, i = one
            return solve_option(self.layers[name], self.calibration, self.options[name][i], seconds)

        for one, kept in zip(todo, each(solve_layer, todo, self._threads), strict=True):
            self._solved[one] = kept
            progress.advance(one[0])
        return {name: Weights(self._solved[name, i].matrix) for name, i in allocation.items()}

    def _stored(self, weights: dict[str, Weights], forms: Mapping[str, Form]) -> _Scored:
        """The weights as they are stored, each layer's rounded by itself; and what became of the outputs."""
        rounded = self._rounded(forms, weights, {name: self.layers[name].weight for name in weights})
        return rounded, *self.judge.compare(self._model(rounded))

    def _rounded(
        self,
        forms: Mapping[str, Form],
        weights: Mapping[str, Weights],
        targets: Mapping[str, NDArray[np.float32]],
    ) -> dict[str, Weights]:
        """The weights as they are stored, near to what each layer's `targets` make of its inputs."""
        kinds = self._kinds(forms)

        def round_layer(name: str) -> Weights:
            statistics, table = self.calibration.statistics[name][0], self.layers[name].table
            matrix, table = round_weights(weights[name].matrix, None, targets[name], statistics, kinds[name], table)
            return Weights(matrix, weights[name].bias, table)

        return {**weights, **dict(zip(kinds, each(round_layer, list(kinds), self._threads), strict=True))}

    def _forms(self, allocation: Allocation) -> dict[str, Form]:
        return {name: self.options[name][i].form for name, i in allocation.items()}

    def _kinds(self, forms: Mapping[str, Form]) -> dict[str, Values]:
        """What weights are rounded to."""
        kinds = {name: form.values for name, form in forms.items() if not self.layers[name].obstacle}
        return {name: kind for name, kind in kinds.items() if kind != Floats(self.layers[name].dtype)}

    def score(self, allocation: Allocation) -> float | None:
        """The metric on the held-back data with each layer's weight as its option has it, not fitted to each other."""
        return self._compared(allocation)[1]

    def with_grids(self, program: Program, candidates: Mapping[str, Candidate]) -> dict[str, Candidate]:
        """The candidates, with a grid for X where it is to be rounded by one: from `program` with their weights."""
        wanting = [one for one in candidates.values() if one.x == "static" and one.layer.x_grid is None]
        if not wanting:
            return dict(candidates)
        self._context.progress.start("finding ranges of activations", None)
        weights = {name: Weights(one.matrix.to_dense()) for name, one in candidates.items()}
        grids = find_grids(
            program,
            [one.layer for one in wanting],
            {one.layer.name: weights[one.layer.name] for one in wanting},
            self._seen,
            self._machine,
            self._context.folder,
            self.config.ranges,
        )
        return {name: replace(one, x_grid=grids.get(name)) for name, one in candidates.items()}

    @property
    def runs(self) -> Sequence[Mapping[str, Any]]:
        """Inputs that weights are fitted to."""
        return self._seen.runs

    def allows(self, chosen: Chosen) -> bool:
        """Whether its metric stays within the limit."""
        return chosen.value is not None and self.judge.allows(chosen.value)

    def _compared(self, allocation: Allocation) -> tuple[float, float | None]:
        key = _key(allocation)
        if key not in self._plain:
            plain = {name: self.options[name][i].weights(self.layers[name]) for name, i in allocation.items()}
            self._plain[key] = self.judge.compare(self._model(plain))
        return self._plain[key]

    def _make_healer(self) -> Healer:
        return Healer(self.program, self._samples, self.judge, self.cache, self._machine, self._context)

    def _gather(self) -> Calibration:
        progress = self._context.progress
        progress.start("running the calibration data", len(self._seen.runs))
        layers = [*self.layers.values()]
        return gather(
            self.program, layers, self._seen, self._machine, self._context.folder, self._threads, progress.advance
        )

    def _reorder(self) -> tuple[float, float] | None:
        """Bring what matters into the same blocks; what blocks keep before and after, None where all stays."""
        config, pattern = self._context.config, self._context.config.patterns[0]
        if not config.permute or not self.layers or not shares_masks(parse_pattern(pattern)):
            return None
        self._context.progress.start("reordering channels", None)
        density = 1 - (PLANNED if config.sparsity is None else config.sparsity)
        found = reordered(self.program, [*self.layers.values()], self.calibration, pattern, density)
        if found is None:
            return None
        self.program, *shares = found
        by_name = {layer.name: layer for layer in self.program.layers}
        self.layers = {name: by_name[name] for name in self.layers}
        self.calibration = self._gather()
        return shares[0], shares[1]

    def _takes(self, pruned: Any) -> bool:
        # Under a budget of time only a layer that can become sparse is worth its loss.
        return not self._context.config.budgeted or not pruned.layer.obstacle

    def _solve(self) -> Options:
        config, progress, layers = self._context.config, self._context.progress, list(self.layers.values())
        options = self.cache.load(self.layers)
        if options is None:
            progress.start("fitting weights", len(layers))
            levels = {layer.name: self._levels(layer) for layer in layers}
            options = solve_options(layers, self.calibration, levels, config, self._threads, progress.advance)
            if sum(map(len, options.values())) > len(options):
                progress.start("measuring errors", len(layers))
                options = measure_errors(self._trial, layers, options, self._seen, progress.advance)
            if self._timed:
                options = time_options(self.program, layers, options, self._workload, self._context)
        self.cache.store(options)
        return options

    def _levels(self, layer: Layer) -> Sequence[float]:
        config = self._context.config
        if layer.name in self._fixed:
            return (self._fixed[layer.name],)
        if config.sparsity is None:
            return self._all_levels
        around = (round(config.sparsity + offset, 6) for offset in AROUND)
        return sorted({level for level in around if 0 < level <= MOST_ZEROS} | {config.sparsity})

    def _fitted(self, solved: dict[str, Weights], forms: Mapping[str, Form]) -> _Scored:
        if not solved:
            return solved, 0.0, self.judge.dense
        progress = self._context.progress
        progress.start("fitting layers to each other", len(solved))
        weights = repair(
            self.program,
            solved,
            self._seen,
            self._machine,
            self._context.folder,
            self._threads,
            progress.advance,
            kinds=self._kinds(forms),
        )
        return weights, *self.judge.compare(self._model(weights))

    def _better(self, *found: _Scored, allocation: Allocation) -> Chosen:
        """Few samples can be fitted too closely; the data that was held back tells."""

        def worth(one: _Scored) -> tuple[bool, float]:
            _, error, value = one
            return value is None or not self.judge.allows(value), error

        weights, error, value = min(found, key=worth)
        return Chosen(self.program, allocation, weights, self._forms(allocation), error, value)

    def _model(self, weights: Mapping[str, Weights]) -> Any:
        fed = self._trial.feeds(weights)
        return lambda feeds: self._trial.run(feeds, fed)

    def _scarcity(self) -> tuple[str, ...]:
        """Layers that more samples would tell more of, and how to have more."""
        scarce = self.calibration.scarce
        if not scarce:
            return ()
        name, (rows, inputs) = next(iter(scarce.items()))
        return (
            f"{len(scarce)} of {len(self.calibration.statistics)} layers saw fewer rows of calibration data than they "
            f"have inputs ('{name}': {rows} rows, {inputs} inputs): their weights are fitted with damping; "
            f"{self._more()}.",
        )

    def _more(self) -> str:
        """Where more samples could come from."""
        samples, seen = self._samples, self._seen
        if seen.count < samples.count:
            return f"they are solved for {seen.count:,} samples, and trained (--heal) with {samples.count:,}"
        apart = self.config.eval_data is not None or self._held_back is samples
        taken, there = samples.count + (0 if apart else self._held_back.count), samples.source_count
        if there is None or there <= taken:
            return "more samples fit better"
        return f"took {taken:,} of {there:,} samples, --samples {there} takes all"

    def _unreached(self) -> tuple[str, ...]:
        """A pattern cannot have every share of zeros."""
        config = self._context.config
        if config.sparsity is None:
            return ()
        far = [name for name, found in self.options.items() if name not in self._fixed and _far(found, config.sparsity)]
        if not far:
            return ()
        nearest, pattern = self.options[far[0]][0], config.patterns[0]
        return (
            f"{pattern} cannot make {config.sparsity:.0%} zeros in {len(far)} of {len(self.options)} layers; "
            f"'{far[0]}' has {nearest.zeros:.1%} instead.",
        )


def _key(allocation: Allocation) -> _Key:
    return tuple(sorted(allocation.items()))


def _far(found: Sequence[Any], sparsity: float) -> bool:
    return len(found) == 1 and abs(found[0].zeros - sparsity) > 0.02
