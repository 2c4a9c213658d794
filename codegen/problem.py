"""What a kernel is generated and tuned for; frozen, and so the key of the tuning database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..ir import Epilogue
from ..ir.sparse_matrix import DTYPES

if TYPE_CHECKING:
    from ..ir import SparseMatrix


@dataclass(frozen=True, slots=True)
class Problem:
    """One sparse linear operator `epilogue(x [rows, in] @ W.T)` with W [out, in] in blocks.

    Attributes:
        in_features, out_features: K and N.
        block: (R, C) as stored (`SparseMatrix.block`).
        panel: outputs a panel (`SparseMatrix.panel`).
        density: share of the blocks that are stored, to two significant digits, so that near problems share their code
            and their records.
        epilogue: what is fused.
        dtype: of X, W, bias, residual and Y: "float32", "float16" or "bfloat16"; sums are float32.
    """

    in_features: int
    out_features: int
    block: tuple[int, int]
    panel: int
    density: float
    epilogue: Epilogue = field(default_factory=Epilogue)
    dtype: str = "float32"

    @classmethod
    def of(cls, matrix: SparseMatrix, epilogue: Epilogue) -> Problem:
        """The problem that `matrix` poses."""
        density = matrix.blocks / max(matrix.pattern.grid(matrix.shape)[0] * matrix.pattern.grid(matrix.shape)[1], 1)
        return cls(
            in_features=matrix.shape[1],
            out_features=matrix.shape[0],
            block=matrix.block,
            panel=matrix.panel,
            density=float(f"{density:.2g}"),
            epilogue=epilogue,
            dtype=matrix.dtype,
        )

    @property
    def block_rows(self) -> int:
        """Block rows of the weight."""
        return -(-self.out_features // self.block[0])

    @property
    def panels(self) -> int:
        """Panels a block row."""
        return -(-self.block[0] // self.panel)

    @property
    def block_cols(self) -> int:
        """Block columns of the weight."""
        return -(-self.in_features // self.block[1])

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds a row of X, padding included; nearly, because `density` is rounded."""
        blocks = round(self.density * self.block_rows * self.block_cols)
        return blocks * self.panels * self.panel * self.block[1]

    @property
    def key(self) -> str:
        """The problem as text, for databases and kernel names."""
        e = self.epilogue
        fused = "+".join(
            name for name, used in (("bias", e.bias), (e.activation.value, True), ("residual", e.residual)) if used
        )
        parameters = f"({e.alpha:g},{e.beta:g})" if e.alpha or e.beta else ""
        return (
            f"{self.out_features}x{self.in_features} block {self.block[0]}x{self.block[1]} panel {self.panel} "
            f"density {self.density:g} {fused}{parameters} {self.dtype}"
        )


def itemsize(dtype: str) -> int:
    """Bytes of one element of a problem's dtype."""
    return DTYPES[dtype].itemsize
