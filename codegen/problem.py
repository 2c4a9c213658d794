"""What a kernel is generated and tuned for; frozen, and so the key of the tuning database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..ir import Epilogue
from ..ir.sparse_matrix import DOT_INPUTS
from ..ir.values import Floats, Int8, Values
from ..ir.values.floats import DTYPES

if TYPE_CHECKING:
    from ..ir import SparseMatrix


# Inputs that are multiplied together, by how X is given.
TOGETHER = {"float": 1, "bfloat16": 2, "uint8": DOT_INPUTS, "static": DOT_INPUTS, "dynamic": DOT_INPUTS}
INTEGERS = frozenset(x for x, inputs in TOGETHER.items() if inputs == DOT_INPUTS)
# Of so many products of uint8 and int8 the sum still fits int32, whatever they are: 2^31 / (255 * 128).
MAX_INTEGER_INPUTS = 65_793


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
        dtype: of X, bias, residual and Y: "float32", "float16" or "bfloat16"; sums are float32.
        kind: what W is stored as; None for floats of `dtype`.
        x: how X is given. "float": as `dtype`, and multiplied so. "bfloat16": as float32, rounded to bfloat16 on the
            way, with sums of products of pairs in float32. Else products are of 8-bit integers, with sums in int32:
            "uint8": X is quantised; "static": it is float32, quantised on the way by one scale and zero point;
            "dynamic": by those of each row.
        y: "float": Y is `dtype`; "uint8": quantised by one scale and zero point.
    """

    in_features: int
    out_features: int
    block: tuple[int, int]
    panel: int
    density: float
    epilogue: Epilogue = field(default_factory=Epilogue)
    dtype: str = "float32"
    kind: Values | None = None
    x: str = "float"
    y: str = "float"

    def __post_init__(self) -> None:
        whole = self.block[1] % self.together == 0 and self.in_features % self.together == 0
        if self.x == "bfloat16" and not (self.kind == Floats("bfloat16") and whole):
            raise ValueError(
                f"products of bfloat16 need such weights and pairs of inputs, not {self.values} in blocks of "
                f"{self.block[1]} of {self.in_features:,}"
            )
        if self.integers and not (self.kind == Int8() and whole and self.in_features < MAX_INTEGER_INPUTS):
            raise ValueError(
                f"products of integers need int8 weights with one scale an output and whole fours of fewer than "
                f"{MAX_INTEGER_INPUTS:,} inputs, not {self.values} in blocks of {self.block[1]} of {self.in_features:,}"
            )

    @classmethod
    def of(cls, matrix: SparseMatrix, epilogue: Epilogue, x: str = "float", y: str = "float") -> Problem:
        """The problem that `matrix` poses.

        Raises:
            ValueError: `x` asks for products of several inputs, which the matrix is not packed for.
        """
        if TOGETHER[x] != matrix.together:
            raise ValueError(f"X as '{x}' and inputs {matrix.together} together do not go with each other")
        density = matrix.blocks / max(matrix.pattern.grid(matrix.shape)[0] * matrix.pattern.grid(matrix.shape)[1], 1)
        return cls(
            in_features=matrix.shape[1],
            out_features=matrix.shape[0],
            block=matrix.block,
            panel=matrix.panel,
            density=float(f"{density:.2g}"),
            epilogue=epilogue,
            dtype=matrix.dtype,
            kind=None if matrix.kind == Floats(matrix.dtype) else matrix.kind,
            x=x,
            y=y,
        )

    @property
    def values(self) -> Values:
        """What W is stored as."""
        return self.kind or Floats(self.dtype)

    @property
    def integers(self) -> bool:
        """Whether products are of integers."""
        return self.x in INTEGERS

    @property
    def together(self) -> int:
        """As in `SparseMatrix`."""
        return TOGETHER[self.x]

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
            f"density {self.density:g} {fused}{parameters} {self.dtype}{self._formats}"
        )

    @property
    def _formats(self) -> str:
        """What is not as `dtype` says, in words."""
        words = [] if self.kind is None else [f"values {self.kind}"]
        words += [f"x {self.x}"] if self.x != "float" else []
        words += [f"y {self.y}"] if self.y != "float" else []
        return "".join(f" {word}" for word in words)


def itemsize(dtype: str) -> int:
    """Bytes of one element of a problem's dtype."""
    return DTYPES[dtype].itemsize
