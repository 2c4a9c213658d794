"""The one signature that every CPU kernel has, as TVM builder calls (see `codegen.kernel.Variant`)."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        x: [rows * K] float32. values, indices, indptr: the packed weight. bias: [N]. residual, y: [rows * N].
        workspace: private scratch memory, float32.
        row_begin, row_end, panel_begin, panel_end: what this call computes, int64.
    """

    x: Buffer
    values: Buffer
    indices: Buffer
    indptr: Buffer
    bias: Buffer
    residual: Buffer
    y: Buffer
    workspace: Buffer
    row_begin: Expr
    row_end: Expr
    panel_begin: Expr
    panel_end: Expr


@contextmanager
def function(problem: Problem, symbol: str, workspace: int) -> Iterator[Arguments]:
    """Open a TVM function named `symbol`; statements go into its body.

    Pointers are raw, so that a call costs no checks: the operator checks once, when it is created. `align=4`: ONNX
    Runtime promises no more, and unaligned vector loads cost nothing on data that is aligned.
    """
    from tvm.tirx.script import builder as T

    k, n = problem.in_features, problem.out_features

    def buffer(name: str, size: Expr, dtype: str = "float32") -> Buffer:
        return T.decl_buffer((size,), dtype, data=pointers[name], align=4)

    with T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
        names = ("x", "values", "indices", "indptr", "bias", "residual", "y", "workspace")
        kinds = {"indices": "int32", "indptr": "int32"}
        pointers = {name: T.arg(name, T.handle(kinds.get(name, "float32"))) for name in names}
        row_begin, row_end, panel_begin, panel_end = (
            T.arg(name, T.int64()) for name in ("row_begin", "row_end", "panel_begin", "panel_end")
        )
        yield Arguments(
            x=buffer("x", row_end * k),
            values=buffer("values", problem.in_features * problem.out_features),
            indices=buffer("indices", problem.in_features * problem.out_features, "int32"),
            indptr=buffer("indptr", problem.block_rows + 1, "int32"),
            bias=buffer("bias", n),
            residual=buffer("residual", row_end * n),
            y=buffer("y", row_end * n),
            workspace=buffer("workspace", max(workspace, 1)),
            row_begin=row_begin,
            row_end=row_end,
            panel_begin=panel_begin,
            panel_end=panel_end,
        )
