"""What could become of a dimension: how many of its channels stay, and which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...ir import LayerKind
from ...passes.solve import Reader, coupled_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...ir import Layer
    from ...passes.channels import Dimension, Place
    from ...passes.solve import Statistics

# Channels stay by so many: ONNX Runtime's convolutions on CPUs work on blocks of 16 outputs. Of 64 channels 52 took as
# long as 64 and 48 three quarters, 36 as long as 48, and 33 or 30 more than the next 16 above; of 16 only 8 were no
# slower. Products take what they have, in steps of 8.
STEPS = {LayerKind.CONV: ((32, 16), (16, 8)), LayerKind.LINEAR: ((16, 8),), LayerKind.RECURRENT: ((16, 8),)}
# Of smaller dimensions.
LEAST_STEP = 4
# Shares of a dimension that are tried.
MOST_CUTS = 8


@dataclass(frozen=True, eq=False)
class Cut:
    """Some channels of a dimension.

    Attributes:
        stay: [kept] int64, rising.
        error: relative squared error of the model's outputs when nothing else is cut; without data the share of norms
            that goes.
    """

    stay: NDArray[np.int64]
    error: float


def possible_counts(dimension: Dimension, layers: Mapping[str, Layer]) -> list[int]:
    """How many channels could stay, the least first, all of them left out."""
    kinds = {layers[place.name].kind for place in (*dimension.rows, *dimension.columns)}
    repeat = max((place.repeat for place in dimension.rows), default=1)
    places = dimension.size * repeat
    steps = STEPS[LayerKind.CONV if LayerKind.CONV in kinds else LayerKind.LINEAR]
    step = next((step for least, step in steps if places >= least), LEAST_STEP)
    unit = max(1, step // repeat)
    halves = [dimension.size // 2] if dimension.size > 1 else []
    return [*range(unit, dimension.size, unit)] or halves


def counts(dimension: Dimension, layers: Mapping[str, Layer]) -> list[int]:
    """Some of these that are tried, the most first."""
    possible = possible_counts(dimension, layers)
    chosen = np.unique(np.linspace(0, len(possible) - 1, min(len(possible), MOST_CUTS)).round().astype(int))
    return [possible[i] for i in chosen[::-1]]


def enough(dimension: Dimension, live: NDArray[np.bool_], layers: Mapping[str, Layer]) -> NDArray[np.int64] | None:
    """The least number of channels that could stay with all that are live; None where it takes all."""
    count = next((count for count in possible_counts(dimension, layers) if count >= live.sum()), None)
    return None if count is None else np.sort(np.argsort(~live, kind="stable")[:count])


def removal_order(
    dimension: Dimension, layers: Mapping[str, Layer], known: Mapping[str, Statistics] | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The channels in the order in which they go, and what is lost when each goes.

    Where statistics are known, by the loss of all layers that read them (`coupled_order`). Without data by the share
    that their columns have of the squared norm of these layers times the share of their rows in those that make them: a
    product, because what is multiplied in one and divided in the other changes nothing.
    """
    if known is not None and dimension.columns:
        names = _names(dimension.columns)
        readers = [Reader(layers[name].weight, columns_of(name, dimension), known.get(name)) for name in names]
        return coupled_order([*readers, *_units(dimension, layers)])
    scores = _shares(dimension.columns, dimension, layers) * _shares(dimension.rows, dimension, layers)
    order = np.argsort(scores, kind="stable")
    return order, scores[order] / (scores.sum() or 1.0)


def columns_of(name: str, dimension: Dimension) -> NDArray[np.int64]:
    """[channels, repeat] the inputs of a layer that each channel is."""
    places = [place for place in dimension.columns if place.name == name]
    return np.concatenate([_spread(place, dimension.size) for place in places], axis=1)


def _units(dimension: Dimension, layers: Mapping[str, Layer]) -> Iterator[Reader]:
    """Recurrent layers whose units the channels are, and so read them: by R [directions, gates * units, units]."""
    for name in _names(dimension.rows):
        value = layers[name].nodes[0].inputs[2] if layers[name].kind is LayerKind.RECURRENT else None
        if value is not None and value.const_value is not None:
            weight = value.const_value.numpy().astype(np.float32)
            yield Reader(weight.reshape(-1, weight.shape[-1]), np.arange(dimension.size)[:, None])


def _shares(places: Sequence[Place], dimension: Dimension, layers: Mapping[str, Layer]) -> NDArray[np.float64]:
    """Of the squared norms of these layers, summed: [channels]; ones where there are none."""
    total = np.zeros(dimension.size)
    for place in places:
        squares = np.square(layers[place.name].weight, dtype=np.float64).sum(axis=1 - place.axis)
        total += squares[_spread(place, dimension.size)].sum(axis=1) / (squares.sum() or 1.0)
    return total if places else np.ones(dimension.size)


def _spread(place: Place, size: int) -> NDArray[np.int64]:
    return place.start + np.arange(size * place.repeat).reshape(size, place.repeat)


def _names(places: Sequence[Place]) -> list[str]:
    return list(dict.fromkeys(place.name for place in places))
