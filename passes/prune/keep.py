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

    def __str__(self) -> str:
        return f"{self.pattern}: {self.zeros:.1%} zeros, {self.stored:.1%} stored, {self.waste:.0%} of it zeros"


def find_pattern(weight: NDArray[np.float32]) -> Found:
    """The block shape that stores `weight` [out, in] at least cost; no weight is changed.

    The cost of a stored weight falls with the block's outputs, which fill a vector, and every block costs an index:
    `stored * (1 + 4 / R) + blocks`. Without such a price blocks of one weight would always waste least.
    """
    kept = weight != 0
    best = (float("inf"), BlockPattern(1, 1), 1.0)
    for rows in _ROWS:
        for cols in _COLS:
            pattern = BlockPattern(rows, cols)
            blocks = int((pattern.reduce(kept) > 0).sum())
            stored = blocks * rows * cols
            cost = stored * (1 + 4 / rows) + blocks
            if cost < best[0]:
                best = (cost, pattern, min(1.0, stored / max(weight.size, 1)))
    return Found(best[1], 1.0 - float(kept.sum()) / max(weight.size, 1), best[2])
