"""Copy a tile of rows into a panel [inputs, rows]: a transpose, four rows by sixteen inputs at a time in registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lanes import WIDE, adjacent, shuffle, transpose

if TYPE_CHECKING:
    from .abi import Arguments, Expr


def pack_rows(args: Arguments, row: Expr, rows: Expr, stride: int, inputs: int) -> None:
    """Emit `workspace[k * stride + r] = x[(row + r) * inputs + k]` for r < rows, k < inputs."""
    from tvm.tirx.script import builder as T

    whole = inputs // WIDE * WIDE
    fours = T.truncdiv(rows, T.int64(4))

    def copy(r: Expr, k: Expr) -> None:
        T.buffer_store(args.workspace, args.x[(row + r) * inputs + k], [k * stride + r])

    with T.serial(T.int64(whole // WIDE)) as i:
        with T.serial(fours) as four:
            _transpose(args, row, four * 4, i * WIDE, stride, inputs)
        with T.serial(rows - fours * 4) as r, T.serial(T.int64(WIDE)) as k:
            copy(fours * 4 + r, i * WIDE + k)
    with T.serial(T.int64(inputs - whole)) as k, T.serial(rows) as r:
        copy(r, whole + k)


def _transpose(args: Arguments, row: Expr, r: Expr, k: Expr, stride: int, inputs: int) -> None:
    """Rows r..r+3 of inputs k..k+15."""
    from tvm.tirx.script import builder as T

    four = [T.Bind(args.x[adjacent((row + r + i) * inputs + k, WIDE)]) for i in range(4)]
    # Lane n of column j holds rows r..r+3 of input k + 4n + j.
    for j, column in enumerate(transpose(four)):
        for n in range(WIDE // 4):
            part = shuffle([column], range(4 * n, 4 * n + 4))
            T.buffer_store(args.workspace, part, [adjacent((k + 4 * n + j) * stride + r, 4)])
