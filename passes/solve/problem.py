"""What a method is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ...ir import SparsecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...ir import Pattern
    from .statistics import Statistics


@dataclass(frozen=True)
class Problem:
    """min tr((W - W0) H (W - W0)ᵀ) over weights W whose zeros are legal for the pattern.

    Attributes:
        weight: W0, [out, in] float64; zero where an input is dead.
        statistics: H.
        pattern: the shape of sparsity.
    """

    weight: NDArray[np.float64]
    statistics: Statistics
    pattern: Pattern

    @classmethod
    def of(cls, weight: NDArray[np.float32], statistics: Statistics, pattern: Pattern) -> Problem:
        """Check `weight` [out, in] against `statistics`, and clear the weights of dead inputs.

        Raises:
            SparsecError: the weight is no matrix with as many inputs as the statistics, is empty or is not finite.
        """
        if weight.ndim != 2 or weight.shape[1] != len(statistics.dead) or not weight.size:
            raise SparsecError(
                f"a weight [out, in] with {len(statistics.dead)} inputs was expected, not {list(weight.shape)}"
            )
        if not np.isfinite(weight).all():
            raise SparsecError("the layer's weight has NaN or infinite values: no pruning can be computed for it")
        return cls(np.where(statistics.dead, 0.0, weight.astype(np.float64)), statistics, pattern)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    def loss(self, weight: NDArray[np.float64]) -> float:
        """Of `weight` [out, in]: what the methods make small."""
        return self.statistics.loss(weight - self.weight)

    def masked(self, mask: NDArray[np.bool_]) -> Solution:
        """The original weights in `mask` [out, in], zero elsewhere."""
        return Solution(np.where(mask, self.weight, 0.0), mask)


@dataclass(frozen=True)
class Solution:
    """Weights for one density.

    Attributes:
        weight: [out, in] float64, zero outside the mask.
        mask: [out, in] bool, legal for the pattern.
    """

    weight: NDArray[np.float64]
    mask: NDArray[np.bool_]


# From a problem and densities to a solution for each.
Method: TypeAlias = Callable[[Problem, Sequence[float]], list[Solution]]
