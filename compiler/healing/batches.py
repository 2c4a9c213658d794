"""Calibration data as mini-batches, also where the model itself takes one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...ir import SparsecError
from ..calibration import masks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..calibration import Samples
    from .ops import Tensor

    Array = NDArray[Any]
    Tensors = dict[str, Tensor]
    # From a model's inputs to some of its values.
    Function = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Batch:
    """Some samples of equal shapes.

    Attributes:
        stacked: inputs with the samples along an axis of their own or, where `mapped`, along a new first one.
        shared: inputs that are the same for all.
        mapped: whether the model takes the samples one by one; `torch.vmap` then runs it on all of them at once.
        labels: one a sample, or None.
    """

    stacked: Tensors
    shared: Tensors
    mapped: bool
    labels: Tensor | None

    def run(self, function: Function) -> Tensors:
        """What `function` makes of the samples, along the first axis; a scalar of all of them is one number."""
        if not self.mapped:
            made = function({**self.stacked, **self.shared})
            return {name: torch.atleast_1d(x) for name, x in made.items()}
        return _flat(torch.vmap(lambda stacked: function({**stacked, **self.shared}))(self.stacked))

    def feeds(self) -> list[dict[str, Array]]:
        """One dictionary of arrays for each run that the model would need."""
        arrays = {name: x.numpy() for name, x in self.stacked.items()}
        shared = {name: x.numpy() for name, x in self.shared.items()}
        if not self.mapped:
            return [{**arrays, **shared}]
        count = len(next(iter(arrays.values())))
        return [{**{name: array[i] for name, array in arrays.items()}, **shared} for i in range(count)]

    @property
    def keep(self) -> Tensor | None:
        """Which tokens [samples, tokens] count, by an input that calls itself a mask, as `calibration.masks` has it."""
        inputs = _flat(self.stacked) if self.mapped else self.stacked
        found = masks({name: x.numpy() for name, x in inputs.items()})
        return None if found is None else torch.from_numpy(found)


def _flat(mapped: Tensors) -> Tensors:
    """[samples, batch of one sample, ...] as [samples, ...]."""
    return {name: x.flatten(0, 1) if x.dim() > 1 else x for name, x in mapped.items()}


@dataclass(frozen=True)
class _Group:
    """Samples of equal shapes, in one array an input."""

    stacked: dict[str, Array]
    axes: dict[str, int]
    shared: dict[str, Array]
    mapped: bool
    labels: Array | None
    count: int

    def take(self, places: NDArray[np.int64]) -> Batch:
        stacked = {name: array.take(places, self.axes[name]) for name, array in self.stacked.items()}
        labels = None if self.labels is None else torch.from_numpy(self.labels[places])
        return Batch(_tensors(stacked), _tensors(self.shared), self.mapped, labels)


class Batches:
    """All samples, in groups of equal shapes.

    Attributes:
        count: samples.
    """

    def __init__(self, samples: Samples) -> None:
        groups: dict[tuple[Any, ...], list[int]] = {}
        axes = _axes(samples)
        for number, feeds in enumerate(samples.runs):
            label = None if samples.labels is None else np.atleast_1d(samples.labels[number]).shape[1 if axes else 0 :]
            groups.setdefault((_shapes(feeds, axes), label), []).append(number)
        self._groups = [_group(samples, numbers, axes) for numbers in groups.values()]
        self.count = sum(group.count for group in self._groups)

    def first(self, size: int) -> list[Batch]:
        """Of each group the first samples, at most `size`."""
        return [group.take(np.arange(min(size, group.count))) for group in self._groups]

    def epoch(self, size: int, seed: tuple[int, int]) -> Iterator[Batch]:
        """Every sample once, at most `size` together, in an order that the seed draws."""
        rng = np.random.default_rng(seed)
        parts = []
        for group in self._groups:
            order = rng.permutation(group.count)
            # Equal parts rather than a rest: a small batch would weigh as much as a full one.
            parts += [(group, part) for part in np.array_split(order, -(-group.count // size))]
        for i in rng.permutation(len(parts)):
            group, part = parts[i]
            yield group.take(part)


def _shapes(feeds: Mapping[str, Array], axes: Mapping[str, int]) -> tuple[Any, ...]:
    """By input its shape, without the samples' axis."""
    return tuple(
        (name, *(size for axis, size in enumerate(array.shape) if axis != axes.get(name)))
        for name, array in sorted(feeds.items())
    )


def _axes(samples: Samples) -> dict[str, int]:
    """By input, the axis along which runs can be joined to one larger run; empty where they cannot."""
    first = samples.runs[0]
    for run in samples.runs:
        sizes = {run[name].shape[axis] for name, axis in samples.axes.items()}
        others = (name for name in run if name not in samples.axes)
        if len(sizes) != 1 or not all(np.array_equal(run[name], first[name]) for name in others):
            return {}
    return dict(samples.axes)


def _group(samples: Samples, numbers: list[int], axes: Mapping[str, int]) -> _Group:
    runs = [samples.runs[i] for i in numbers]
    labels = None if samples.labels is None else [np.atleast_1d(samples.labels[i]) for i in numbers]
    if axes:
        stacked = {name: np.concatenate([run[name] for run in runs], axis) for name, axis in axes.items()}
        together = None if labels is None else np.concatenate(labels)
        count = sum(run[name].shape[axis] for run in runs for name, axis in [*axes.items()][:1])
    else:
        varying = [name for name in runs[0] if any(not np.array_equal(run[name], runs[0][name]) for run in runs)]
        stacked = {name: np.stack([run[name] for run in runs]) for name in varying or [*runs[0]][:1]}
        together = None if labels is None else np.stack(labels)
        count = len(runs)
    shared = {name: array for name, array in runs[0].items() if name not in stacked}
    return _Group(stacked, dict(axes) or dict.fromkeys(stacked, 0), shared, not axes, together, count)


def _tensors(arrays: Mapping[str, Array]) -> Tensors:
    try:
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    except TypeError:
        kinds = ", ".join(f"'{name}' {array.dtype}" for name, array in arrays.items())
        raise SparsecError(f"--heal: PyTorch has no tensors for inputs of these types: {kinds}") from None
