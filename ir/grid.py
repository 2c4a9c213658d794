"""The values that 8 bits of an activation can be: value = scale * (code - zero point), codes 0 to 255."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import SparsecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CODES = 255
_LEAST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Grid:
    """One scale and zero point for a whole tensor, as in ONNX's QuantizeLinear to uint8.

    Attributes:
        scale: positive, finite, a float32.
        zero_point: 0 to 255, the code of 0.
    """

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if not _LEAST <= self.scale <= _LARGEST:
            raise SparsecError(f"scale {self.scale:g}: expected a positive finite number")
        if not 0 <= self.zero_point <= CODES:
            raise SparsecError(f"zero point {self.zero_point}: expected 0 to {CODES}")

    @classmethod
    def spanning(cls, low: float, high: float) -> Grid:
        """The finest grid from `low` to `high` and zero, which is a code of its own."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32(max((high - low) / CODES, _LEAST)))
        return cls(scale, int(np.clip(np.rint(-low / scale), 0, CODES)))

    def round(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """`values` as they are after quantising: nearest, ties to even, saturated."""
        codes = np.clip(np.rint(values / np.float32(self.scale)) + self.zero_point, 0, CODES)
        return np.asarray((codes - self.zero_point) * np.float32(self.scale), dtype=np.float32)
