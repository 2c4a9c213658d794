"""Weights as floating-point numbers: `fp32`, `bf16`, `fp16`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from .values import Values

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What a tensor that holds weights may be.
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Floats(Values):
    """Rounded to the nearest, ties to even; no table.

    Attributes:
        name: "float32", "float16" or "bfloat16".
    """

    name: str = "float32"

    @classmethod
    def parse(cls, text: str) -> Floats | None:
        """`fp32`, `bf16`, `fp16`, or numpy's names of them."""
        name = _NAMES.get(text, text)
        return cls(name) if name in DTYPES else None

    def __str__(self) -> str:
        return next(short for short, name in _NAMES.items() if name == self.name)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of codes, which are the weights."""
        return DTYPES[self.name]

    def fit(self, weight: NDArray[Any], importance: NDArray[Any] | None = None) -> NDArray[np.float32]:
        """Nothing to fit."""
        return np.zeros(0, dtype=np.float32)

    def encode(self, weight: NDArray[Any], table: NDArray[np.float32]) -> NDArray[Any]:
        """Rounded."""
        return weight.astype(self.dtype)

    def decode(self, codes: NDArray[Any], table: NDArray[np.float32]) -> NDArray[np.float32]:
        """Exact."""
        return codes.astype(np.float32)
