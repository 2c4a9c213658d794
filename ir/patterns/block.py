"""Blocks of R outputs by C inputs, kept or dropped whole: `block:RxC`, and `group:g` for `block:gx1`.

Aligned groups (Hartenstein et al. 2020, "Weight Pruning for DNNs on GPUs") are the column blocks `block:gx1`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UsageError
from ..sparse_matrix import SparseMatrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..values import Values

_SYNTAX = re.compile(r"block:(\d+)x(\d+)|group:(\d+)")


@dataclass(frozen=True, slots=True)
class BlockPattern:
    """Blocks of `rows` outputs by `cols` inputs on a grid aligned to the matrix's first row and column.

    Where the matrix is not a multiple of the block, the last blocks of a row or column are cut off at the edge.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise UsageError(f"pattern 'block:{self.rows}x{self.cols}': both sizes must be at least 1")

    @classmethod
    def parse(cls, text: str) -> BlockPattern | None:
        """`block:RxC` or `group:g` to a pattern; None when the text names another pattern."""
        match = _SYNTAX.fullmatch(text)
        if match is None:
            return None
        rows, cols, group = match.groups()
        return cls(int(group), 1) if group else cls(int(rows), int(cols))

    def __str__(self) -> str:
        return f"group:{self.rows}" if self.cols == 1 < self.rows else f"block:{self.rows}x{self.cols}"

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Block rows and block columns of a matrix of this shape."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.cols)

    def reduce(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of `scores` [out, in] in each block: [block rows, block columns]."""
        out, inputs = scores.shape
        by_row = np.add.reduceat(scores, np.arange(0, out, self.rows), axis=0)
        return np.add.reduceat(by_row, np.arange(0, inputs, self.cols), axis=1)

    def expand(self, blocks: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
        """A mask over blocks to a mask over single weights [out, in]."""
        return blocks.repeat(self.rows, axis=0)[: shape[0]].repeat(self.cols, axis=1)[:, : shape[1]]

    def project(self, scores: NDArray[np.float64], density: float) -> NDArray[np.bool_]:
        """The mask [out, in] of the blocks of largest score that keeps the share of weights nearest to `density`.

        Blocks are taken by their mean score, so that a block cut off at the edge competes fairly; ties go to the
        earlier block, so equal scores give equal masks.
        """
        sizes = self.reduce(np.ones(scores.shape))
        order = np.argsort(-(self.reduce(scores) / sizes).ravel(), kind="stable")
        # Half a block of slack makes it the nearest share, not the next below; nothing is kept of nothing.
        budget = density * scores.size + (0.5 * min(self.rows * self.cols, scores.size) if density else 0)
        kept = order[np.cumsum(sizes.ravel()[order]) <= budget]
        blocks = np.zeros(sizes.size, dtype=np.bool_)
        blocks[kept] = True
        return self.expand(blocks.reshape(sizes.shape), (scores.shape[0], scores.shape[1]))

    def pack(
        self,
        weight: NDArray[np.float32],
        dtype: str = "float32",
        kind: Values | None = None,
        table: NDArray[np.float32] | None = None,
        together: int = 1,
    ) -> SparseMatrix:
        """Pack `weight` [out, in]: `SparseMatrix.from_dense`."""
        return SparseMatrix.from_dense(weight, self, dtype, kind, table, together)
