"""What code generation hands to the library: machine code, and how the operator may call it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..ir import Epilogue

# `max_rows` of a variant that has no upper limit.
ANY_ROWS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled schedule of a kernel, for inputs of at most `max_rows` rows.

    The code is a TVM function over raw pointers and 64-bit integers,
    `(x, values, indices, indptr, bias, residual, y, workspace, row_begin, row_end, panel_begin, panel_end)`: it
    computes rows `row_begin` to `row_end`-1 of panels `panel_begin` to `panel_end`-1 and touches no other part of `y`
    [rows, out]. It is serial; the operator splits the work.

    Attributes:
        symbol: name of the TVM function; its entry is `__tvm_ffi_<symbol>`.
        max_rows: the largest number of rows of X that this variant is meant for.
        row_grain: rows that are computed together; the operator cuts the rows at multiples of it.
        workspace: float32 of private scratch memory that a call needs; 0 for none.
        parts_per_thread: pieces of work a thread that the operator should aim for.
        code: an ELF object file.
    """

    symbol: str
    max_rows: int
    row_grain: int
    workspace: int
    parts_per_thread: int
    code: bytes


@dataclass(frozen=True, slots=True)
class Kernel:
    """The variants of one sparse operator, by rising `max_rows`; the last is for `ANY_ROWS`.

    Attributes:
        name: what the node's attribute `kernel` says.
        in_features, out_features: K and N of the weight [N, K].
        block: (R, C) as stored.
        panel: outputs a panel.
        epilogue: what is fused; `bias` and `residual` say which pointers the code reads.
    """

    name: str
    in_features: int
    out_features: int
    block: tuple[int, int]
    panel: int
    epilogue: Epilogue
    variants: tuple[Variant, ...]
