"""The plainest choice: keep the blocks of the largest Euclidean norm, change nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...ir import Pattern


def prune_by_norm(weight: NDArray[np.float32], pattern: Pattern, sparsity: float) -> NDArray[np.float32]:
    """`weight` [out, in] with all but the blocks of largest norm set to zero (Hartenstein et al. 2020, not retrained).

    The share of zeros is the nearest to `sparsity` that whole blocks reach; zeros that were there already stay.
    """
    mask = pattern.project(np.square(weight, dtype=np.float64), 1.0 - sparsity)
    return np.where(mask, weight, np.float32(0))
