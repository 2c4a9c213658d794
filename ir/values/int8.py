"""Symmetric 8-bit integers: `int8` with one scale an output, `int8:G` with one an output and G inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from .values import Values

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SYNTAX = re.compile(r"int8(?::(\d+))?")
_LARGEST = 127


@dataclass(frozen=True, slots=True)
class Int8(Values):
    """weight = scale * code, codes -127 to 127 (-128 where a model came with it).

    The table is [out, groups] float32 scales; one group unless `group` says how many inputs share a scale.
    """

    group: int = 0

    def __post_init__(self) -> None:
        if self.group < 0:
            raise UsageError(f"int8:{self.group}: a group needs at least one input")

    @classmethod
    def parse(cls, text: str) -> Int8 | None:
        """`int8` or `int8:G`."""
        match = _SYNTAX.fullmatch(text)
        if match is None:
            return None
        if match[1] and not int(match[1]):
            raise UsageError("int8:0: a group needs at least one input")
        return cls(int(match[1] or 0))

    def __str__(self) -> str:
        return f"int8:{self.group}" if self.group else "int8"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of codes."""
        return np.dtype(np.int8)

    def table_size(self, shape: tuple[int, int], padding: int = 0) -> int:
        """One scale an output and group of inputs."""
        return shape[0] * -(-shape[1] // self.group) + padding if self.group else shape[0]

    def laid_out(self, table: NDArray[np.float32], padding: int) -> NDArray[np.float32]:
        """[groups, out], so that vectors of outputs meet vectors of scales; the last may stick out of a last group."""
        return np.pad(table.T.ravel(), (0, padding if self.group else 0))

    def fit(self, weight: NDArray[Any], importance: NDArray[Any] | None = None) -> NDArray[np.float32]:
        """The largest weight of each group becomes 127: nothing is clipped. A group of zeros gets the scale 1."""
        starts = np.arange(0, weight.shape[1], self.group or max(weight.shape[1], 1))
        largest = np.maximum.reduceat(np.abs(weight), starts, axis=1)
        scales = (largest / _LARGEST).astype(np.float32)
        # Of a group so small that its scale is no normal number the weights are zero for all purposes.
        return np.where(scales >= np.finfo(np.float32).tiny, scales, np.float32(1))

    def encode(self, weight: NDArray[Any], table: NDArray[np.float32]) -> NDArray[Any]:
        """Rounded to even, and clipped to what the type holds."""
        codes = np.rint(weight.astype(np.float64) / self._spread(table, weight.shape[1]))
        return np.clip(codes, -_LARGEST - 1, _LARGEST).astype(np.int8)

    def decode(self, codes: NDArray[Any], table: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale * code, in float32."""
        return codes.astype(np.float32) * self._spread(table, codes.shape[1])

    def _spread(self, table: NDArray[np.float32], inputs: int) -> NDArray[np.float32]:
        """The scale of every weight: [out, 1] or [out, in]."""
        return table.repeat(min(self.group, inputs), axis=1)[:, :inputs] if self.group else table
