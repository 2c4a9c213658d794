"""Single weights kept or dropped on their own: `unstructured`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .block import BlockPattern

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class UnstructuredPattern(BlockPattern):
    """Blocks of one weight by another name: what the papers mean by "unstructured". Packed as `block:1x1`."""

    rows: int = field(default=1, init=False)
    cols: int = field(default=1, init=False)

    @classmethod
    def parse(cls, text: str) -> UnstructuredPattern | None:
        """`unstructured` to a pattern; None when the text names another pattern."""
        return cls() if text == "unstructured" else None

    def __str__(self) -> str:
        return "unstructured"

    def project(self, scores: NDArray[np.float64], density: float) -> NDArray[np.bool_]:
        """The mask [out, in] of the weights of largest score, as many as are nearest to `density`.

        Ties go to the earlier weight. The same mask as `block:1x1` gives, in linear time: no sorting.
        """
        flat = scores.ravel()
        count = int(np.floor(density * flat.size + 0.5)) if density else 0
        if not 0 < count < flat.size:
            return np.full(scores.shape, count > 0, dtype=np.bool_)
        least = np.partition(flat, flat.size - count)[flat.size - count]
        mask = flat > least
        ties = np.flatnonzero(flat == least)
        mask[ties[: count - int(np.count_nonzero(mask))]] = True
        return np.asarray(mask.reshape(scores.shape), dtype=np.bool_)
