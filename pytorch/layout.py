"""How a weight lies in its tensor, and in the matrix [out, in] that the compiler will find."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True, slots=True)
class Layout:
    """A weight [out, in, *kernel] as a matrix [out, in * kernel], and back.

    Attributes:
        shape: of the tensor.
        gates: order of the gates along the rows in ONNX, as indices into PyTorch's; () where there are none.
        positions_first: whether the matrix is [out, kernel * in] instead.
    """

    shape: tuple[int, ...]
    gates: tuple[int, ...] = ()
    positions_first: bool = False

    @property
    def kernel(self) -> int:
        """Positions of the kernel; 1 where there is none."""
        return prod(self.shape[2:])

    @property
    def matrix(self) -> tuple[int, int]:
        """The matrix's shape."""
        return self.shape[0], prod(self.shape[1:])

    def to_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as a matrix."""
        rows = tensor.movedim(1, -1) if self.positions_first else tensor
        return _regated(rows.reshape(self.matrix), self.gates)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_matrix`."""
        rows = _regated(matrix, tuple(self.gates.index(gate) for gate in range(len(self.gates))))
        if self.positions_first:
            return rows.reshape(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1)
        return rows.reshape(self.shape)


def _regated(rows: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    if not order:
        return rows
    return rows.reshape(len(order), -1, rows.shape[1])[list(order)].reshape(rows.shape)
