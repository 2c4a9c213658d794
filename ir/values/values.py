"""What every kind of values offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Values(ABC):
    """How single weights become numbers in memory, and back; frozen, and so a part of keys.

    A weight is `decode(code, table)`: the code is one small number a weight, the table what they share (scales, a
    codebook; empty for floats). Code 0 always is the weight 0, so zeros stay exact zeros.
    """

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Values | None:
        """The kind that `text` names; None when it names another."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Of codes."""

    @property
    def bits(self) -> int:
        """Of one code as packed."""
        return self.dtype.itemsize * 8

    def table_size(self, shape: tuple[int, int], padding: int = 0) -> int:
        """Elements of the table of a weight (out, in); with `padding` as `laid_out` has it."""
        return 0

    def laid_out(self, table: NDArray[np.float32], padding: int) -> NDArray[np.float32]:
        """The table as kernels read it, flat: block rows padded to `padding` outputs must not reach beyond its end."""
        return table.ravel()

    @abstractmethod
    def fit(self, weight: NDArray[Any], importance: NDArray[Any] | None = None) -> NDArray[np.float32]:
        """The table that represents `weight` [out, in] best; zeros do not count.

        Args:
            weight: kept weights, zero elsewhere.
            importance: [in], how much a squared error of each input's weights counts (diag H); None for equally.
        """

    @abstractmethod
    def encode(self, weight: NDArray[Any], table: NDArray[np.float32]) -> NDArray[Any]:
        """The nearest codes [out, in]; a weight other than zero may become code 0."""

    @abstractmethod
    def decode(self, codes: NDArray[Any], table: NDArray[np.float32]) -> NDArray[np.float32]:
        """Weights [out, in] float32; exact for what `encode` was given if that came from `decode`."""

    def round(self, weight: NDArray[Any], table: NDArray[np.float32]) -> NDArray[np.float32]:
        """`weight` [out, in] as it is after packing."""
        return self.decode(self.encode(weight, table), table)
