"""Copy a tile of rows into a panel [inputs, rows]: a transpose, four rows by sixteen inputs at a time in registers."""

from __future__ import annotations

from .abi import Arguments, Expr

# Inputs that one step transposes, and rows: 4 x 4 blocks in each 128-bit lane, which is what shuffles do in one cycle.
_WIDE = 16
_ROWS = 4


def pack_rows(args: Arguments, row: Expr, size: int, stride: int, inputs: int) -> None:
    """Emit `workspace[k * stride + r] = x[(row + r) * inputs + k]` for r < size, k < inputs."""
    from tvm.tirx.script import builder as T

    whole = inputs // _WIDE * _WIDE
    fours = size // _ROWS * _ROWS
    with T.serial(T.int64(whole // _WIDE)) as i:
        for r in range(0, fours, _ROWS):
            _transpose(args, row, r, i * _WIDE, stride, inputs)
        for r in range(fours, size):
            with T.serial(T.int64(_WIDE)) as j:
                k = i * _WIDE + j
                T.buffer_store(args.workspace, args.x[(row + r) * inputs + k], [k * stride + r])
    if whole < inputs:
        with T.serial(T.int64(inputs - whole)) as j:
            for r in range(size):
                k = whole + j
                T.buffer_store(args.workspace, args.x[(row + r) * inputs + k], [k * stride + r])


def _transpose(args: Arguments, row: Expr, r: int, k: Expr, stride: int, inputs: int) -> None:
    """Rows r..r+3 of inputs k..k+15."""
    from tvm import tirx
    from tvm.tirx.script import builder as T

    def load(i: int) -> Expr:
        return T.Bind(args.x[tirx.Ramp((row + r + i) * inputs + k, T.int64(1), _WIDE)])

    def shuffle(a: Expr, b: Expr, lane: tuple[int, int, int, int]) -> Expr:
        """The same choice of four in each 128-bit lane; 0-3 are a's, 4-7 b's."""
        picks = [(p if p < 4 else p - 4 + _WIDE) + 4 * n for n in range(_WIDE // 4) for p in lane]
        return T.Bind(tirx.Shuffle([a, b], [tirx.const(p, "int32") for p in picks]))

    a, b, c, d = (load(i) for i in range(_ROWS))
    ab_low, ab_high = shuffle(a, b, (0, 4, 1, 5)), shuffle(a, b, (2, 6, 3, 7))
    cd_low, cd_high = shuffle(c, d, (0, 4, 1, 5)), shuffle(c, d, (2, 6, 3, 7))
    # Lane n of column j holds rows r..r+3 of input k + 4n + j.
    columns = [
        shuffle(ab_low, cd_low, (0, 1, 4, 5)),
        shuffle(ab_low, cd_low, (2, 3, 6, 7)),
        shuffle(ab_high, cd_high, (0, 1, 4, 5)),
        shuffle(ab_high, cd_high, (2, 3, 6, 7)),
    ]
    for j, column in enumerate(columns):
        for n in range(_WIDE // 4):
            part = tirx.Shuffle([column], [tirx.const(4 * n + e, "int32") for e in range(4)])
            where = (k + 4 * n + j) * stride + r
            T.buffer_store(args.workspace, part, [tirx.Ramp(where, T.int64(1), 4)])
