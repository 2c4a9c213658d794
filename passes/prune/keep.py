"""Keep exactly the zeros that are there: find the block shape that wastes least on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...ir import BlockPattern

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...ir import Pattern

_ROWS = (1, 2, 4, 8, 16, 32, 64)
_COLS = (1, 2, 4, 8, 16, 32)

# Below this share of zeros no block shape can pay.
LEAST_ZEROS = 0.2


@dataclass(frozen=True, slots=True)
class Found:
    """A block shape for the zeros of a weight.

    Attributes:
        pattern: the shape.
        zeros: share of the weight that is zero.
        stored: share of the weight that lies in blocks with a weight other than zero.
    """

    pattern: Pattern
    zeros: float
    stored: float

    @property
    def waste(self) -> float:
        """Share of the stored weights that are zero."""
        return 1.0 - (1.0 - self.zeros) / self.stored if self.stored else 0.0

    @property
    def usable(self) -> bool:
        """Whether the zeros form blocks that need not be stored."""
        return self.stored <= 1 - LEAST_ZEROS

    def __str__(self) -> str:
        if not self.usable:
            return f"{self.zeros:.1%} zeros, but scattered: {self.pattern} would store {self.stored:.1%}"
        return f"{self.zeros:.1%} zeros in {self.pattern}, {self.stored:.1%} stored"


def find_pattern(weight: NDArray[np.float32]) -> Found:
    """The block shape that stores `weight` [out, in] at least cost; no weight is changed.

    The cost of a stored weight falls with the block's outputs, which fill a vector, and every block costs an index:
    `stored * (1 + 4 / R) + blocks`. Without such a price blocks of one weight would always waste least.
    """
    kept = weight != 0
    best = (float("inf"), BlockPattern(1, 1), 1.0)
    by_rows = kept
    for rows in _ROWS:
        by_rows = by_rows if rows == 1 else _halve(by_rows, axis=0)
        blocks = by_rows
        for cols in _COLS:
            blocks = blocks if cols == 1 else _halve(blocks, axis=1)
            count = int(blocks.sum())
            stored = count * rows * cols
            cost = stored * (1 + 4 / rows) + count
            if cost < best[0]:
                best = (cost, BlockPattern(rows, cols), min(1.0, stored / max(weight.size, 1)))
    return Found(best[1], 1.0 - float(kept.sum()) / max(weight.size, 1), best[2])


def _halve(kept: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    """Neighbours along `axis` together: kept where either is."""
    starts = np.arange(0, kept.shape[axis], 2)
    return np.logical_or.reduceat(kept, starts, axis=axis)
