"""N of every M adjacent inputs kept: `nm:N:M`, for example the `nm:2:4` of sparse tensor cores."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UsageError
from .block import BlockPattern

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SYNTAX = re.compile(r"nm:(\d+):(\d+)")


@dataclass(frozen=True, slots=True)
class NMPattern(BlockPattern):
    """At most `n` weights in each group of `m` adjacent inputs of an output (NVIDIA 2020, "A100 whitepaper").

    Groups start at input 0; one that the matrix's edge cuts off may also keep `n`. Packed as `block:1x1`.
    """

    rows: int = field(default=1, init=False)
    cols: int = field(default=1, init=False)
    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise UsageError(f"pattern 'nm:{self.n}:{self.m}': N must be at least 1 and less than M")

    @classmethod
    def parse(cls, text: str) -> NMPattern | None:
        """`nm:N:M` to a pattern; None when the text names another pattern."""
        match = _SYNTAX.fullmatch(text)
        return cls(int(match[1]), int(match[2])) if match else None

    def __str__(self) -> str:
        return f"nm:{self.n}:{self.m}"

    def project(self, scores: NDArray[np.float64], density: float) -> NDArray[np.bool_]:
        """The mask [out, in] of the `n` largest scores of every group; ties go to the earlier input.

        The pattern has one density, N/M: it is the nearest to any `density` asked for but 0, which keeps nothing.
        """
        out, inputs = scores.shape
        if not density:
            return np.zeros(scores.shape, dtype=np.bool_)
        groups = -(-inputs // self.m)
        padded = np.full((out, groups * self.m), -np.inf)
        padded[:, :inputs] = scores
        best = np.argsort(-padded.reshape(out, groups, self.m), axis=2, kind="stable")[:, :, : self.n]
        mask = np.zeros((out, groups, self.m), dtype=np.bool_)
        np.put_along_axis(mask, best, True, axis=2)
        return mask.reshape(out, -1)[:, :inputs]
