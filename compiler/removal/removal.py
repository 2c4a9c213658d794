"""From data, or norms, to a smaller model: what could go, what goes for a share, and what the rest is fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from ...ir import LayerKind, Program
from ...passes.allocate import Choice, allocate
from ...passes.channels import find_channels
from ...passes.remove import layer_indices, live_channels, mask_recurrence, mask_weights, removable, remove
from ...passes.solve import Statistics
from ...passes.solve.least_squares import least_squares
from ..artifact import SOLUTIONS
from ..budget.cache import Cache
from ..budget.data import open_data
from ..budget.healer import Healer, Judged
from ..budget.judge import Judge
from ..budget.sensitivity import error_meter
from ..calibration import Samples, Weights, covariance, gather, has_rows, repair
from ..config import SAMPLES
from ..exporter import bias_place, export, session_source
from ..frontend import find_layers
from ..frontend.constants import OVERRIDABLE_FROM_IR
from ..machine import Cpu
from ..parallel import each
from ..runtime import run_session
from .cuts import Cut, counts, enough, removal_order
from .work import Work

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from ...ir import Layer
    from ...passes.channels import Dimension
    from ..budget.sensitivity import Model
    from ..context import Context
    from ..healing import Limit
    from ..machine import Machine
    from ..report import Healing

    # Of each dimension from which channels go, those that stay.
    Kept = dict[Dimension, NDArray[np.int64]]

# Steps in which an allocation is brought near a share.
HALVINGS = 24


@dataclass(frozen=True, eq=False)
class Smaller:
    """A program without some channels.

    Attributes:
        program: what is left.
        masked: the model as it came with the same weights, zero where they would read what is gone.
        kept: by dimension.
        weights: of the whole program's layers, as `masked` has them, by name.
        error, value: of the outputs and of the metric on the held-back data; None without data, or without a metric.
        healing: what training did, if there was any.
    """

    program: Program
    masked: onnx_ir.Model
    kept: Kept
    weights: Mapping[str, Weights] = field(default_factory=dict)
    error: float | None = None
    value: float | None = None
    healing: Healing | None = None


class Removal:
    """What can be left out of a program.

    Attributes:
        program: as it came, its constants as initialisers.
        declined: by layer name why none of its outputs can go.
        exact: whether nothing may change what the model computes: only dead channels go.
        judge: the metric, on samples that no weight was fitted to; None without data.
        samples: what weights are fitted to; None without data.
    """

    def __init__(self, program: Program, context: Context) -> None:
        """Find the dimensions; with data run the model on it.

        Raises:
            SparsecError: the data does not fit the model.
        """
        self.program, self._context = _lifted(program), context
        self._machine: Machine = context.machine or Cpu(context.config.thread_count)
        self._threads = context.config.thread_count
        self._layers = {layer.name: layer for layer in self.program.layers}
        self.channels = find_channels(self.program)
        found = removable(self.channels)
        self.exact = not context.config.sparsity and not context.config.budgeted
        stays = {name: why for name, layer in self._layers.items() if (why := self._stays(layer))}
        # What reads channels gets new weights when some of them go.
        for reader, writer in ((p, w) for d in found.dimensions for p in d.columns for w in d.rows):
            if not self.exact and not self._layers[reader.name].rewritable:
                stays.setdefault(writer.name, f"'{reader.name}' reads them: {self._layers[reader.name].obstacle}")
        self.declined = {**found.declined, **stays}
        self._dimensions = [
            dimension
            for dimension in found.dimensions
            if counts(dimension, self._layers) and not any(place.name in stays for place in dimension.rows)
        ]
        self.judge: Judge | None = None
        self.samples: Samples | None = None
        self._healer: Healer | None = None
        if context.config.calib is not None and self._dimensions:
            self._open()

    def weights(self) -> Work:
        """What is counted for a share of weights: those of layers that can get smaller."""
        touched = {p.name for d in self._dimensions for p in (*d.rows, *d.columns)}
        return Work(self.program, self.channels, dict.fromkeys(touched, 1.0))

    def at(self, share: float, work: Work) -> Kept:
        """At least this share of the work gone, with the least error; as much as can go where that is less.

        Without data about the same share of every dimension: norms of different layers are not on one scale.
        """
        low, high = 0.0, 1.0
        pick = self._evenly if self.samples is None else self._allocated(work)
        if work.gone(pick(high)) < share:
            return pick(high)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if work.gone(pick(middle)) >= share else (middle, high)
        return pick(high)

    def live(self) -> dict[Dimension, NDArray[np.bool_]]:
        """Of each dimension from which channels could go those that are not dead."""
        return live_channels(self.program, self.channels, self._dimensions)

    def least(self, live: Mapping[Dimension, NDArray[np.bool_]]) -> Kept:
        """The smallest choice of channels with all of these."""
        stay = {dimension: enough(dimension, mask, self._layers) for dimension, mask in live.items()}
        return {dimension: numbers for dimension, numbers in stay.items() if numbers is not None}

    def without_dead(self, kept: Kept) -> Smaller:
        """The program without the other channels, which were dead: no weight changes."""
        return Smaller(self._cut_down(kept, {}), self.program.model, kept)

    def make(self, kept: Kept, fitted: bool = True) -> Smaller:
        """The program without the other channels; with data what reads them `fitted` to what it then gets.

        What the fit leaves without a reader, such as units that never fire on the data, goes as well.
        """
        weights = self._solved(kept)
        program, error, value = self._cut_down(kept, weights), None, None
        if self.judge is not None:
            error, value = self.judge.compare(self._model(program))
            if fitted:
                better = self._repaired(kept, weights)
                other = self._cut_down(kept, better)
                found = self.judge.compare(self._model(other))
                if self._worth(*found) < self._worth(error, value):
                    weights, program, (error, value) = better, other, found
        masked = _export(self._masked(kept), weights)
        if fitted:
            live = self._read(masked, kept)
            if sum(map(len, live.values())) != sum(map(len, kept.values())) or len(live) != len(kept):
                kept, program = live, self._cut_down(live, weights)
        return Smaller(program, masked, kept, weights, error, value)

    def _read(self, fitted: onnx_ir.Model, kept: Kept) -> Kept:
        """Of the channels that stay those that are not dead in a fitted model, and as many as keep the count good."""
        program = Program(fitted, find_layers(fitted), self.program.source)
        channels = find_channels(program)
        # A new bias is a new place: dimensions are the same where the layers' are.
        own = {(dimension.rows, dimension.columns): dimension for dimension in self._dimensions}
        known = {one: d for one in channels.dimensions.values() if (d := own.get((one.rows, one.columns))) is not None}
        found = dict(kept)
        for one, live in live_channels(program, channels, [*known]).items():
            dimension = known[one]
            stay = kept.get(dimension, np.arange(dimension.size))
            among = live & np.isin(np.arange(dimension.size), stay)
            least = enough(dimension, among, self._layers)
            if least is not None and len(least) < len(stay):
                found[dimension] = stay[np.sort(np.argsort(~among[stay], kind="stable")[: len(least)])]
        return {d: found[d] for d in self._dimensions if d in found}

    def heal(self, smaller: Smaller, limit: Limit) -> Smaller:
        """The same channels with trained weights, biases and norms; or as it was, where they are no better.

        What is trained is the whole program with zeros in all that writes or reads what is gone, so that each layer has
        the dense one's outputs to learn from.

        Raises:
            SparsecError: PyTorch does not compute the model as ONNX Runtime does.
        """
        assert self._healer is not None and smaller.error is not None, "there is data, or it was refused"
        weights = {}
        for name, (rows, columns) in layer_indices(self.program, self.channels, smaller.kept).items():
            new = smaller.weights.get(name) or Weights(self._layers[name].weight)
            matrix = np.zeros_like(new.matrix)
            matrix[np.ix_(rows, columns)] = new.matrix[np.ix_(rows, columns)]
            weights[name] = Weights(matrix, new.bias)
        found = self._healer.heal(Judged(self.program, weights, smaller.error, smaller.value), limit)
        return replace(
            smaller,
            program=self._cut_down(smaller.kept, found.weights, found.program),
            masked=_export(found.program, found.weights),
            weights=found.weights,
            error=found.error,
            value=found.value,
            healing=found.healing,
        )

    def _worth(self, error: float, value: float | None) -> tuple[bool, float]:
        """The less the better: few samples can be fitted too closely, the data that was held back tells."""
        return value is None or self.judge is None or not self.judge.allows(value), error

    @cached_property
    def cuts(self) -> dict[Dimension, tuple[Cut, ...]]:
        """Of each dimension, the least first, with the error that is measured where there is data.

        Raises:
            SparsecError: an activation is NaN or infinite.
        """
        return self._measured()

    @cached_property
    def _inputs(self) -> tuple[dict[str, Statistics], dict[str, NDArray[np.float64]]]:
        """By layer name what is known of what it reads, and of those with a bias the means; nothing without data."""
        known: dict[str, Statistics] = {}
        means: dict[str, NDArray[np.float64]] = {}
        if self.samples is None:
            return known, means
        progress, folder = self._context.progress, self._context.folder
        names = {place.name for dimension in self._dimensions for place in dimension.columns}
        seen = [layer for layer in self.program.layers if layer.name in names and has_rows(layer)]
        progress.start("running the calibration data", len(self.samples.runs))
        found = gather(self.program, seen, self.samples, self._machine, folder, self._threads, progress.advance)
        for layer in seen:
            statistics, mean = found.statistics[layer.name][0], found.means[layer.name][0]
            if bias_place(layer) is not None:
                # The bias makes good what the means do.
                moment = statistics.hessian - np.diag(statistics.ridge)
                statistics, means[layer.name] = Statistics.of(covariance(moment, mean)), mean
            known[layer.name] = statistics
        return known, means

    def _open(self) -> None:
        """Read the data, and run the model on what is held back."""
        config = self._context.config
        samples, held_back = open_data(self.program, self._context, self._machine)
        self.samples = samples if config.heal is None else samples.some(SAMPLES)
        fitted_to = Samples(samples.name, []) if self.exact else samples
        separate = config.eval_data is not None
        self.judge = Judge(self._model(self.program), fitted_to, held_back, separate, config.metric, config.drop_limit)
        if config.heal is not None:
            cache = Cache(config.solutions, self._context.folder / SOLUTIONS, self.program, config)
            self._healer = Healer(self.program, samples, self.judge, cache, self._machine, self._context)

    def _stays(self, layer: Layer) -> str:
        """Why the outputs of this layer stay, whatever could be left out; "" where they need not."""
        config = self._context.config
        share, named = config.wanted_sparsity(layer.name)
        if named and share == 0:
            return "its outputs stay, as was asked for"
        if not self.exact and not layer.rewritable:
            return layer.obstacle
        # The weights between units are no layer's: they would have to be zero in the student and not in the teacher.
        recurrent = layer.kind is LayerKind.RECURRENT
        return "units of recurrent layers stay with --heal" if recurrent and config.heal is not None else ""

    def _measured(self) -> dict[Dimension, tuple[Cut, ...]]:
        progress, known = self._context.progress, None if self.samples is None else self._inputs[0]
        progress.start("ordering channels", len(self._dimensions))
        orders = {}
        work = each(lambda d: removal_order(d, self._layers, known), self._dimensions, self._threads)
        for dimension, (order, losses) in zip(self._dimensions, work, strict=True):
            orders[dimension] = [
                Cut(np.sort(order[dimension.size - count :]), float(losses[: dimension.size - count].sum()))
                for count in counts(dimension, self._layers)
            ]
            progress.advance()
        if self.samples is None:
            return {dimension: tuple(cuts) for dimension, cuts in orders.items()}
        progress.start("measuring errors", len(orders))
        meter = error_meter(self._model(self.program), self.samples, sum(map(len, orders.values())))
        found = {}
        for dimension, cuts in orders.items():
            models = (
                self._model(self._cut_down(one, self._solved(one))) for one in ({dimension: c.stay} for c in cuts)
            )
            found[dimension] = tuple(Cut(cut.stay, meter(model)) for cut, model in zip(cuts, models, strict=True))
            progress.advance()
        return found

    def _evenly(self, share: float) -> Kept:
        """This share of all cuts: first those that take the smallest share of their dimension, then of its norm."""
        every = [(1 - len(cut.stay) / d.size, cut.error, d, cut.stay) for d, cuts in self.cuts.items() for cut in cuts]
        every.sort(key=lambda one: one[:2])
        return {dimension: stay for _, _, dimension, stay in every[: round(share * len(every))]}

    def _allocated(self, work: Work) -> Any:
        """From a share of what could be saved, if savings added up, to the allocation of least error."""
        whole = work.whole
        choices = [
            [Choice(0.0, whole), *(Choice(cut.error, work.left({dimension: cut.stay})) for cut in cuts)]
            for dimension, cuts in self.cuts.items()
        ]
        most, least = (sum(pick(c.cost for c in one) for one in choices) for pick in (max, min))

        def pick(share: float) -> Kept:
            chosen = allocate(choices, (most + (least - most) * share) * (1 + 1e-9)) or []
            return {d: cuts[i - 1].stay for (d, cuts), i in zip(self.cuts.items(), chosen, strict=True) if i}

        return pick

    def _solved(self, kept: Kept) -> dict[str, Weights]:
        """Zeros where layers would read what goes; the other weights make good what they can, each layer by itself."""
        masked = mask_weights(self.program, self.channels, kept)
        stay = layer_indices(self.program, self.channels, kept)
        known, means = self._inputs

        def solve(name: str) -> Weights:
            statistics, layer = known.get(name), self._layers[name]
            if statistics is None:
                return Weights(masked[name])
            mask = np.zeros(masked[name].shape, np.bool_)
            mask[:, stay[name][1]] = True
            dense = layer.weight.astype(np.float64)
            weight = least_squares(dense, mask, statistics)
            if name not in means:
                return Weights(weight.astype(np.float32))
            own = np.zeros(layer.out_features) if layer.bias is None else layer.bias
            bias = own + (dense - weight) @ means[name]
            return Weights(weight.astype(np.float32), bias.astype(np.float32))

        return dict(zip(masked, each(solve, list(masked), self._threads), strict=True))

    def _repaired(self, kept: Kept, weights: Mapping[str, Weights]) -> dict[str, Weights]:
        """Layer after layer fitted to what the smaller model gives it."""
        assert self.samples is not None
        known = {name: new for name, new in weights.items() if has_rows(self._layers[name])}
        progress = self._context.progress
        progress.start("fitting layers to each other", len(known))
        found = repair(
            self._masked(kept),
            known,
            self.samples,
            self._machine,
            self._context.folder,
            self._threads,
            progress.advance,
        )
        return {**weights, **found}

    def _masked(self, kept: Kept) -> Program:
        """The program, but for the weights of its layers what the smaller one has to equal."""
        if not any(self._layers[place.name].kind is LayerKind.RECURRENT for d in kept for place in d.rows):
            return self.program
        model = mask_recurrence(self.program, self.channels, kept)
        return Program(model, find_layers(model), self.program.source)

    def _cut_down(self, kept: Kept, weights: Mapping[str, Weights], whole: Program | None = None) -> Program:
        """The smaller program with these weights of the whole one, which may have other biases and norms."""
        program, channels = self.program, self.channels
        if whole is not None and whole is not program:
            program, channels = whole, find_channels(whole)
        model, stay = remove(program, channels, kept), layer_indices(program, channels, kept)
        bare = Program(model, find_layers(model), program.source)
        smaller = _export(
            bare,
            {
                name: Weights(
                    new.matrix[stay[name][0]][:, stay[name][1]], None if new.bias is None else new.bias[stay[name][0]]
                )
                for name, new in weights.items()
            },
        )
        return Program(smaller, find_layers(smaller), program.source)

    def _model(self, program: Program) -> Model:
        session = self._machine.open(session_source(program.model, self._context.folder))
        names = [output.name for output in session.get_outputs()]
        return lambda feeds: dict(zip(names, run_session(session, feeds), strict=True))


def _export(program: Program, weights: Mapping[str, Weights]) -> onnx_ir.Model:
    biases = {name: new.bias for name, new in weights.items() if new.bias is not None}
    return export(program, {}, {name: new.matrix for name, new in weights.items()}, biases)


def _lifted(program: Program) -> Program:
    """The same with the values of Constant nodes as initialisers: of these channels can be left out."""
    # Before IR 4 an initialiser has to be a graph input too.
    if program.model.ir_version < OVERRIDABLE_FROM_IR or not any(n.op_type == "Constant" for n in program.model.graph):
        return program
    model = program.model.clone()
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=2)(model)
    return Program(model, find_layers(model), program.source)
