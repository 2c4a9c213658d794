"""What could become of each layer: solved weights at several sparsities, in several patterns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ...ir import parse_pattern
from ...ir.patterns import NMPattern
from ...ir.values import Floats, parse_values
from ...passes.solve import AUTO, SECONDS, Problem, choose, solve_all
from ..calibration import Weights
from ..formats import Form, activations, forms_of, kinds_of
from ..parallel import each

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...ir import Layer, Pattern, Timing
    from ..calibration import Calibration
    from ..config import CompileConfig


# What an option costs and brings can be told from one sweep; the method that takes the time is for the options that
# are chosen. It is used at once where outputs share masks, so that one exact order of removal gives all levels, if that
# takes no more than so many seconds of one core.
SCOUT, EXACT_SECONDS = "sparsegpt", 1.0
# What a weight without zeros is cut into: the blocks that run fastest, where X is floats and where products are of
# integers.
DENSE, DENSE_FOURS = "group:32", "block:32x4"


@dataclass(frozen=True, eq=False)
class Kept:
    """A weight with many zeros, small in memory: where it is other than zero, and what it is there.

    Attributes:
        shape: (out, in).
        mask: the bits of the mask, packed by eight.
        values: float32, row after row.
    """

    shape: tuple[int, int]
    mask: NDArray[np.uint8]
    values: NDArray[np.float32]

    @classmethod
    def of(cls, matrix: NDArray[np.float32]) -> Kept:
        """Of `matrix` [out, in]."""
        mask = matrix != 0
        return cls((matrix.shape[0], matrix.shape[1]), np.packbits(mask), matrix[mask])

    @property
    def matrix(self) -> NDArray[np.float32]:
        """[out, in] float32."""
        matrix = np.zeros(self.shape, np.float32)
        matrix[np.unpackbits(self.mask, count=matrix.size).astype(bool).reshape(self.shape)] = self.values
        return matrix

    @property
    def count(self) -> int:
        """Weights other than zero."""
        return len(self.values)


@dataclass(frozen=True, eq=False)
class Option:
    """A layer pruned in one way, by itself.

    Attributes:
        pattern: as text.
        values: what it is stored as, as text.
        level: the sparsity that was asked for.
        kept: the weight, not yet rounded to what it is stored as.
        zeros: share of zeros that the pattern reached.
        layer_error: relative squared error of the layer's outputs.
        scouted: whether the weight was found in haste, see `SCOUT`.
        error: relative squared error of the model's outputs when nothing else is pruned; NaN until it is measured.
        timings: dense against sparse, one a batch size; empty where nothing was timed.
        nbytes: of the packed weight; 0 where nothing was packed.
    """

    pattern: str
    values: str
    level: float
    kept: Kept
    zeros: float
    layer_error: float
    scouted: bool = False
    error: float = float("nan")
    timings: tuple[Timing, ...] = field(default=())
    nbytes: int = 0

    @property
    def form(self) -> Form:
        """How the weight is cut and stored."""
        return Form(self.pattern, parse_values(self.values))

    def weights(self, layer: Layer) -> Weights:
        """As a trial takes them: each rounded to the nearest that can be stored."""
        values, matrix = self.form.values, self.kept.matrix
        if values == Floats(layer.dtype):
            return Weights(matrix)
        table = values.fit(matrix) if layer.table is None else layer.table
        return Weights(values.round(matrix, table), table=table)


Options = dict[str, tuple[Option, ...]]


def solve_options(
    layers: Sequence[Layer],
    calibration: Calibration,
    levels: Mapping[str, Sequence[float]],
    config: CompileConfig,
    threads: int,
    done: Callable[[str], None],
) -> Options:
    """Solve each layer at each level in each pattern, the least sparse first, for all kinds of values.

    Where a layer may be stored in fewer bits than it came with, that is an option without any zeros, too.

    Args:
        layers: those that are pruned.
        calibration: with their statistics.
        levels: by layer name, the sparsities; N:M patterns have only their own.
        config: patterns, kinds of values, method.
        threads: layers side by side.
        done: is told each layer.
    """

    def solve_layer(layer: Layer) -> tuple[Option, ...]:
        found = [_unpruned(layer, form) for form in _dense_forms(layer, config)] if config.budgeted else []
        method, patterns = config.method, config.patterns
        for pattern in map(parse_pattern, patterns):
            wanted = [1 - pattern.n / pattern.m] if isinstance(pattern, NMPattern) else sorted(levels[layer.name])
            scouted = method == AUTO and len(wanted) * len(patterns) > 1 and not _exact(layer, calibration, pattern)
            solved = _solve(layer, calibration, pattern, wanted, SCOUT if scouted else method, not scouted)
            for level, weight in zip(wanted, solved, strict=True):
                zeros, loss = float((weight == 0).mean()), calibration.error(layer, weight)
                kept = Kept.of(weight)
                found += [
                    Option(form.pattern, str(form.values), level, kept, zeros, loss, scouted)
                    for form in forms_of(layer, str(pattern), config)
                ]
        return tuple(found)

    options: Options = {}
    for layer, choices in zip(layers, each(solve_layer, layers, threads), strict=True):
        options[layer.name] = choices
        done(layer.name)
    return options


def _dense_forms(layer: Layer, config: CompileConfig) -> list[Form]:
    """Of fewer bits than the layer came with, in the block that runs fastest."""
    own = Floats(layer.dtype) if layer.values is None else layer.values
    forms = []
    for kind in kinds_of(layer, config):
        fours = Form(DENSE_FOURS, kind)
        forms.append(fours if activations(layer, fours, config) != "float" else Form(DENSE, kind))
    return [form for form in forms if form.values != own]


def _unpruned(layer: Layer, form: Form) -> Option:
    zeros = float((layer.weight == 0).mean())
    return Option(form.pattern, str(form.values), 0.0, Kept.of(layer.weight), zeros, 0.0)


def shares_masks(pattern: Pattern) -> bool:
    """Whether outputs share masks, so that one exact order of removal gives all levels."""
    return pattern.rows * pattern.cols > 1


def solve_option(layer: Layer, calibration: Calibration, option: Option, seconds: float) -> Kept:
    """The weight of an option; one that was only scouted by the most accurate method for so many `seconds`."""
    if not option.scouted:
        return option.kept
    pattern = parse_pattern(option.pattern)
    return Kept.of(_solve(layer, calibration, pattern, [option.level], AUTO, True, seconds)[0])


def _exact(layer: Layer, calibration: Calibration, pattern: Pattern) -> bool:
    statistics = calibration.statistics[layer.name]
    part = layer.weight[: len(layer.weight) // len(statistics)]
    return choose(Problem.of(part, statistics[0], pattern), EXACT_SECONDS / len(statistics), 0.0) == "obs"


def _solve(
    layer: Layer,
    calibration: Calibration,
    pattern: Pattern,
    levels: Sequence[float],
    method: str,
    repair: bool,
    seconds: float = SECONDS,
) -> list[NDArray[np.float32]]:
    """[out, in] for each level; the groups of a convolution one by one."""
    statistics = calibration.statistics[layer.name]
    parts = np.split(layer.weight, len(statistics))
    solved = [
        solve_all(part, one, pattern, [1 - level for level in levels], method, repair, seconds)
        for part, one in zip(parts, statistics, strict=True)
    ]
    return [np.concatenate(pieces) for pieces in zip(*solved, strict=True)]
