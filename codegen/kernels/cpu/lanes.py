"""Vectors of float32 as TVM expressions: adjacent elements, broadcasts, shuffles and 4 x 4 transposes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .abi import Buffer, Expr

# Columns that `transpose` turns at a time: 4 x 4 blocks in each 128-bit lane, which is what shuffles do in one cycle.
WIDE = 16


def whole_lanes(width: int) -> int:
    """Lanes of the widest vectors that `width` elements fill; 1 where that is none.

    A vector that is wider than the target's becomes several; so nothing here depends on the target.
    """
    return next(lanes for lanes in (16, 8, 4, 1) if width % lanes == 0)


def adjacent(start: Expr, lanes: int) -> Expr:
    """The index of `lanes` adjacent elements."""
    from tvm.tirx.script import builder as T

    return T.Ramp(start, T.int64(1), lanes) if lanes > 1 else start


def broadcast(scalar: Expr, lanes: int) -> Expr:
    """`scalar` in every lane."""
    from tvm.tirx.script import builder as T

    return T.Broadcast(scalar, lanes) if lanes > 1 else scalar


def zeros(lanes: int) -> Buffer:
    """A buffer of `lanes` zeros that stays in a register.

    So small a buffer with constant indices does; above 1,023 bytes TVM would take it from the heap.
    """
    from tvm.tirx.script import builder as T

    buffer = T.alloc_buffer((lanes,))
    T.buffer_store(buffer, broadcast(T.float32(0), lanes), [adjacent(T.int64(0), lanes)])
    return buffer


def shuffle(vectors: Sequence[Expr], picks: Sequence[int]) -> Expr:
    """The elements `picks` of `vectors` laid end to end."""
    from tvm import tirx

    return tirx.Shuffle(list(vectors), [tirx.const(pick, "int32") for pick in picks])


def transpose(rows: Sequence[Expr]) -> list[Expr]:
    """Four vectors of 16 to four: lane 4n + i of vector j goes to lane 4n + j of vector i."""
    from tvm.tirx.script import builder as T

    def blend(a: Expr, b: Expr, quarter: tuple[int, int, int, int]) -> Any:
        """The same choice of four in each 128-bit lane; 0-3 are a's, 4-7 b's."""
        picks = [(p if p < 4 else p - 4 + WIDE) + n for n in range(0, WIDE, 4) for p in quarter]
        return T.Bind(shuffle((a, b), picks))

    a, b, c, d = rows
    ab_low, ab_high = blend(a, b, (0, 4, 1, 5)), blend(a, b, (2, 6, 3, 7))
    cd_low, cd_high = blend(c, d, (0, 4, 1, 5)), blend(c, d, (2, 6, 3, 7))
    return [
        blend(ab_low, cd_low, (0, 1, 4, 5)),
        blend(ab_low, cd_low, (2, 3, 6, 7)),
        blend(ab_high, cd_high, (0, 1, 4, 5)),
        blend(ab_high, cd_high, (2, 3, 6, 7)),
    ]
