"""From options to whole models: the least error for a time, or for a share of zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...passes.allocate import Choice, allocate
from ..decide import choose

if TYPE_CHECKING:
    from ...ir import Layer
    from .options import Option, Options

# Points between the dense model and the fastest.
POINTS = 8
# Layers by themselves can take longer than all of them inside the model, which fuses; they are then scaled to this
# share of it.
MOST_OF_MODEL = 0.95

# By layer name, which of its options; layers that are not named stay dense.
Allocation = dict[str, int]


@dataclass(frozen=True)
class Times:
    """What options take, as shares of the whole dense model's time, averaged over the batch sizes.

    Attributes:
        model_us: the whole dense model, by batch size.
        scale: what a layer's own times are multiplied by.
    """

    model_us: tuple[float, ...]
    scale: float

    @classmethod
    def of(cls, options: Options, model_us: Sequence[float]) -> Times:
        """Scale the layers' times where their sum exceeds the model's."""
        shares: list[float] = [
            sum(choices[0].timings[b].dense_us for choices in options.values() if choices[0].timings) / whole
            for b, whole in enumerate(model_us)
        ]
        largest = max(shares, default=0.0)
        return cls(tuple(model_us), min(1.0, MOST_OF_MODEL / largest) if largest else 1.0)

    def dense(self, choices: Sequence[Option]) -> float:
        """Of a layer that stays dense."""
        return self._share([timing.dense_us for timing in choices[0].timings])

    def sparse(self, option: Option) -> float:
        """Of a layer that is pruned so."""
        return self._share([timing.sparse_us for timing in option.timings])

    def speedups(self, options: Options, allocation: Allocation) -> tuple[float, ...]:
        """Of the whole model, by batch size, if what layers gain by themselves adds up."""
        gains = [0.0] * len(self.model_us)
        for name, i in allocation.items():
            for b, timing in enumerate(options[name][i].timings):
                gains[b] += self.scale * (timing.dense_us - timing.sparse_us)
        return tuple(whole / (whole - gain) for whole, gain in zip(self.model_us, gains, strict=True))

    def _share(self, times: Sequence[float]) -> float:
        pairs = zip(times, self.model_us, strict=True)
        return self.scale * sum(time / whole for time, whole in pairs) / len(self.model_us)


def by_time(options: Options, times: Times) -> list[Allocation]:
    """Allocations of least error, evenly in time between the dense model and the fastest: the slowest first."""
    usable = faster(options)
    dense = sum(times.dense(choices) for choices in options.values())
    least = dense - sum(
        max(times.dense(options[name]) - times.sparse(options[name][i]) for i in indices)
        for name, indices in usable.items()
    )
    found: list[Allocation] = []
    for k in range(1, POINTS + 1):
        allocation = within_time(options, times, dense - (dense - least) * k / POINTS)
        if allocation and allocation not in found:
            found.append(allocation)
    return found


def for_speedup(options: Options, times: Times, speedup: float) -> Allocation | None:
    """The allocation of least error that is estimated to be so fast on average; None where none is."""
    dense = sum(times.dense(choices) for choices in options.values())
    return within_time(options, times, dense - (1 - 1 / speedup))


def within_time(options: Options, times: Times, budget: float) -> Allocation | None:
    """The least error with at most this time in layers; options that are no faster than dense are none."""
    usable = faster(options)
    layers = [
        [Choice(0.0, times.dense(choices))]
        + [Choice(choices[i].error, times.sparse(choices[i])) for i in usable.get(name, ())]
        for name, choices in options.items()
    ]
    chosen = allocate(layers, budget + 1e-9)
    if chosen is None:
        return None
    return {name: usable[name][i - 1] for name, i in zip(options, chosen, strict=True) if i}


def by_zeros(options: Options, layers: Mapping[str, Layer], sparsity: float) -> Allocation:
    """The least error at this share of zeros over all layers; the sparsest of each layer where that is out of reach."""
    choices = [
        [Choice(0.0, int(np.count_nonzero(layers[name].weight)))]
        + [Choice(option.error, option.kept.count) for option in found]
        for name, found in options.items()
    ]
    total = sum(layers[name].weight.size for name in options)
    chosen = allocate(choices, (1 - sparsity) * total * (1 + 1e-6))
    if chosen is None:
        chosen = [min(range(len(found)), key=lambda i: (found[i].cost, found[i].error)) for found in choices]
    return {name: i - 1 for name, i in zip(options, chosen, strict=True) if i}


def faster(options: Options) -> dict[str, list[int]]:
    """By layer, the numbers of the options that win at every batch size; layers without any are left out."""
    found = {
        name: [i for i, option in enumerate(choices) if option.timings and choose(option.timings)[0]]
        for name, choices in options.items()
    }
    return {name: indices for name, indices in found.items() if indices}
