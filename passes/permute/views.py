"""What a search sees of a layer: one of its axes, of which a dimension has some places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..channels import Dimension, Place
from .orders import indices

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...ir import BlockPattern


class View:
    """The scores of a layer along one axis, with the blocks that the dimension's channels fall into.

    Attributes:
        name: of the layer.
        size: channels of the dimension.
        block: places of a block along the axis.
        repeat: places of a channel, the least where they differ.
        blocks: of each of the dimension's places on the axis the blocks that each channel is in: [size, repeat].
    """

    def __init__(
        self,
        dimension: Dimension,
        scores: NDArray[np.float64],
        places: Sequence[Place],
        across: Sequence[Place],
        pattern: BlockPattern,
        density: float,
    ) -> None:
        axis = places[0].axis
        self.name, self.size = places[0].name, dimension.size
        self.block, self._width = (pattern.rows, pattern.cols) if axis == 0 else (pattern.cols, pattern.rows)
        self.repeat = min(place.repeat for place in places)
        self.blocks = [
            ((place.start + np.arange(self.size * place.repeat)) // self.block).reshape(self.size, -1)
            for place in places
        ]
        self._scores = scores if axis == 0 else scores.T
        self._places, self._across, self._density = places, across, density
        rows, columns = self._scores.shape
        self._areas = np.outer(_lengths(rows, self.block), _lengths(columns, self._width))
        self._sums = _summed(self._scores, self._width, axis=1)

    @property
    def features(self) -> NDArray[np.float64]:
        """All scores of each channel on this axis: [size, ..]."""
        parts = [self._scores[p.start : p.start + self.size * p.repeat].reshape(self.size, -1) for p in self._places]
        return np.concatenate(parts, axis=1)

    def moved(self, order: NDArray[np.int64]) -> NDArray[np.float64]:
        """The scores in this order, summed over the blocks of the other axis: [places of the axis, blocks across]."""
        places = indices(dict.fromkeys(self._places, order), len(self._scores))
        if not self._across:
            return self._sums[places]
        across = indices(dict.fromkeys(self._across, order), self._scores.shape[1])
        return _summed(self._scores[places][:, across], self._width, axis=1)

    def mask(self, moved: NDArray[np.float64], softness: float = 0.0) -> tuple[NDArray[np.float64], float]:
        """The mask over the blocks of `moved`, and what is kept if it is hard.

        Args:
            moved: as from `moved`.
            softness: 0 for a mask of zeros and ones as the pattern projects it, else the width of its edge in standard
                deviations of the blocks' scores.
        """
        sums = _summed(moved, self.block, axis=0)
        means = sums / self._areas
        first = np.argsort(-means, axis=None, kind="stable")
        budget = self._density * self._scores.size + self.block * self._width / 2
        hard = np.zeros(means.shape, dtype=np.bool_)
        hard.flat[first[np.cumsum(self._areas.flat[first]) <= budget]] = True
        kept = float(sums[hard].sum())
        width = softness * float(means.std())
        if not width or hard.all() or not hard.any():
            return hard.astype(np.float64), kept
        edge = (means[hard].min() + means[~hard].max()) / 2
        return 1 / (1 + np.exp(np.clip((edge - means) / width, -50, 50))), kept

    def gains(
        self, moved: NDArray[np.float64], mask: NDArray[np.float64], starts: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """What each channel of `moved` would keep under `mask` in the places of some others.

        Args:
            moved: as from `moved`.
            mask: [blocks along, blocks across].
            starts: [n] the channels whose places are asked for.

        Returns:
            [size, n].
        """
        result = np.zeros((self.size, len(starts)))
        for place, blocks in zip(self._places, self.blocks, strict=True):
            mine = moved[place.start : place.start + blocks.size].reshape(*blocks.shape, -1)
            for t in range(place.repeat):
                at = blocks[starts, t]
                result += (mine[:, t] @ mask[at[0] : at[-1] + 1].T)[:, at - at[0]]
        return result


def views(
    dimension: Dimension, scores: Mapping[str, NDArray[np.float64]], pattern: BlockPattern, density: float
) -> list[View]:
    """The axes on which it matters where the channels are; not those where each has whole blocks to itself."""
    result = []
    for name in dict.fromkeys(place.name for place in (*dimension.rows, *dimension.columns) if place.name in scores):
        rows = [place for place in dimension.rows if place.name == name]
        columns = [place for place in dimension.columns if place.name == name]
        for places, across, block in ((rows, columns, pattern.rows), (columns, rows, pattern.cols)):
            if any(place.start % block or place.repeat % block for place in places):
                result.append(View(dimension, scores[name], places, across, pattern, density))
    return result


def _lengths(size: int, block: int) -> NDArray[np.int64]:
    """Of the blocks along an axis."""
    return np.diff(np.append(np.arange(0, size, block), size))


def _summed(array: NDArray[np.float64], block: int, axis: int) -> NDArray[np.float64]:
    return array if block == 1 else np.add.reduceat(array, np.arange(0, array.shape[axis], block), axis=axis)
