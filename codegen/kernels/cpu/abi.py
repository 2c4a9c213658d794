"""The one signature that every CPU kernel has, as TVM builder calls (see `codegen.kernel.Variant`)."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...problem import Problem

# TVM's expressions and buffers have no useful static types.
Expr = Any
Buffer = Any


@dataclass(frozen=True, slots=True)
class Arguments:
    """The kernel's arguments as TVM sees them; buffers are flat.

    Attributes:
        x: [rows * K] float32 or uint8. values, indices, indptr, table: the packed weight; of scales the table is
            [groups, N]. sums: [N] int32, of each output's codes, for products of integers. bias: [N]. residual,
            y: [rows * N]; y is float32 or uint8.
        workspace: private scratch memory, float32, or int32 for products of several inputs.
        parameters: [5] float32: scale, its inverse and zero point of X, inverse of the scale and zero point of Y.
        row_begin, row_end, panel_begin, panel_end: what this call computes, int64.
    """

    x: Buffer
    values: Buffer
    indices: Buffer
    indptr: Buffer
    table: Buffer
    sums: Buffer
    bias: Buffer
    residual: Buffer
    y: Buffer
    workspace: Buffer
    parameters: Buffer
    row_begin: Expr
    row_end: Expr
    panel_begin: Expr
    panel_end: Expr


# The pointers in their order.
POINTERS = (
    "x", "values", "indices", "indptr", "table", "sums", "bias", "residual", "y", "workspace", "parameters",
)  # fmt: skip


def _dtypes(problem: Problem) -> dict[str, str]:
    """Of what is behind the pointers, where it is not float32; bfloat16 as bits, which every target understands."""
    values = problem.values.dtype.name
    return {
        "x": "uint8" if problem.x == "uint8" else "float32",
        "values": "uint16" if values == "bfloat16" else values,
        "indices": "int32",
        "indptr": "int32",
        "sums": "int32",
        "y": "uint8" if problem.y == "uint8" else "float32",
        "workspace": "int32" if problem.together > 1 else "float32",
    }


@contextmanager
def function(problem: Problem, symbol: str, workspace: int) -> Iterator[Arguments]:
    """Open a TVM function named `symbol`; statements go into its body.

    Pointers are raw, so that a call costs no checks: the operator checks once, when it is created. `align=4`: ONNX
    Runtime promises no more, and unaligned vector loads cost nothing on data that is aligned.
    """
    from tvm.tirx.script import builder as T

    k, n = problem.in_features, problem.out_features

    def buffer(name: str, size: Expr) -> Buffer:
        dtype = kinds.get(name, "float32")
        return T.decl_buffer((size,), dtype, data=pointers[name], align=min(4, np.dtype(dtype).itemsize))

    with T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
        kinds = _dtypes(problem)
        pointers = {name: T.arg(name, T.handle(kinds.get(name, "float32"))) for name in POINTERS}
        row_begin, row_end, panel_begin, panel_end = (
            T.arg(name, T.int64()) for name in ("row_begin", "row_end", "panel_begin", "panel_end")
        )
        yield Arguments(
            x=buffer("x", row_end * k),
            values=buffer("values", problem.in_features * problem.out_features),
            indices=buffer("indices", problem.in_features * problem.out_features),
            indptr=buffer("indptr", problem.block_rows + 1),
            table=buffer("table", problem.in_features * problem.out_features),
            sums=buffer("sums", n),
            bias=buffer("bias", n),
            residual=buffer("residual", row_end * n),
            y=buffer("y", row_end * n),
            workspace=buffer("workspace", max(workspace, 1)),
            parameters=buffer("parameters", 5),
            row_begin=row_begin,
            row_end=row_end,
            panel_begin=panel_begin,
            panel_end=panel_end,
        )
