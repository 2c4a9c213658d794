"""The signature of a GPU kernel as TVM builder calls: pointers out of `codegen.kernel.CUDA_ARGUMENTS`, and `rows`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...kernel import CUDA_ARGUMENTS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from ...problem import Problem

# TVM's expressions and buffers have no useful static types.
Expr = Any
Buffer = Any


def storage(dtype: str) -> str:
    """What an element of `dtype` is stored as; 16-bit floats travel as bits (see `floats.py`)."""
    return "float32" if dtype == "float32" else "uint16"


def used(problem: Problem, *more: str) -> tuple[str, ...]:
    """The arguments that any kernel for the problem has, and `more`, in the order of `CUDA_ARGUMENTS`."""
    names = {"x", "values", "indices", "indptr", "y", "rows", *more}
    names |= {name for name in ("bias", "residual") if getattr(problem.epilogue, name)}
    return tuple(name for name in CUDA_ARGUMENTS if name in names)


@contextmanager
def function(problem: Problem, symbol: str, names: Collection[str], workspace: int = 0) -> Iterator[dict[str, Any]]:
    """Open a TVM function named `symbol` with the parameters `names`; statements go into its body.

    Yields by name a flat buffer for each pointer, and for `rows` the expression. Pointers are raw, so that a launch
    costs no checks. Pointers are aligned to 16 bytes: device memory is allocated so, and rows are never cut.

    Args:
        problem: gives sizes and dtype.
        symbol: the function's name; its device functions are `symbol`_kernel, `symbol`_kernel_1, and so on.
        names: out of `CUDA_ARGUMENTS`; "rows" is always one.
        workspace: float32 of scratch memory for each row of X.
    """
    from tvm.tirx.script import builder as T

    dtypes = dict.fromkeys(("indices", "indptr", "order"), "int32") | {"workspace": "float32"}
    with T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
        dtypes = {name: dtypes.get(name, storage(problem.dtype)) for name in names if name != "rows"}
        pointers = {name: T.arg(name, T.handle(dtype)) for name, dtype in dtypes.items()}
        rows = T.arg("rows", T.int64())
        blocks = problem.block_rows * problem.block_cols
        sizes = {
            "x": rows * problem.in_features,
            "values": blocks * problem.panels * problem.panel * problem.block[1],
            "indices": blocks,
            "indptr": problem.block_rows + 1,
            "order": problem.block_rows,
            "bias": problem.out_features,
            "residual": rows * problem.out_features,
            "y": rows * problem.out_features,
            "workspace": rows * workspace,
        }
        arguments = {
            name: T.decl_buffer((sizes[name],), dtypes[name], data=pointer, align=16)
            for name, pointer in pointers.items()
        }
        yield arguments | {"rows": rows}
