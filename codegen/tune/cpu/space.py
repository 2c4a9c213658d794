"""Which schedules are worth trying: plain data, the best guess first."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...kernels.cpu.schedule import Schedule
from ...kernels.cpu.weights import is_flat

if TYPE_CHECKING:
    from ...problem import Problem
    from ...target import CpuTarget

# Rows of X up to which one variant of a kernel serves, the last for any number. Within a class the same tile wins.
ROW_CLASSES = (3, 11, 47, 2**63 - 1)


def row_class(rows: int) -> int:
    """Index into `ROW_CLASSES`."""
    return next(i for i, most in enumerate(ROW_CLASSES) if rows <= most)


# Blocks of fewer outputs than this do not fill a vector: vectors run along the rows of X or the inputs of a block.
_NARROW = 16
# A packed tile of rows stays below this many bytes, which a second-level cache holds.
_TILE_BYTES = 512 << 10


def candidates(problem: Problem, target: CpuTarget, rows: int) -> list[Schedule]:
    """Schedules for `rows` rows of X, the first being what fits most machines."""
    if problem.together > 1:
        return _dots(problem, target, rows)
    if problem.block[0] < _NARROW:
        found = _narrow(problem, target, rows)
        return found if is_flat(problem.values) else [one for one in found if one.kernel != "inputs"]
    if rows <= ROW_CLASSES[0]:
        return [
            Schedule("outputs", 1, prefetch=8),
            Schedule("outputs", 1),
            Schedule("outputs", 1, accumulators=16, prefetch=16),
        ]
    return _few_wide(problem, target) if rows <= ROW_CLASSES[1] else _many_wide(problem, target, rows)


def _narrow(problem: Problem, target: CpuTarget, rows: int) -> list[Schedule]:
    """Blocks of few outputs. At one row memory decides; the more rows a tile has, the more each index brings."""
    registers = _registers(target)
    width = min(problem.block[0], problem.panel)
    adjacent = problem.block[1] >= 4
    # At most half the registers hold sums.
    tiles = [
        tile
        for tile in (64, 32, 16, 8)
        if width * tile <= registers // 2 * target.lanes and 4 * problem.in_features * tile <= _TILE_BYTES
    ] or [8]
    # `inputs` keeps more beside its sums: 8 rows spill where there are 16 registers.
    few = 8 if registers == 32 else 4
    if rows <= ROW_CLASSES[0]:
        found = [Schedule("inputs", 4, accumulators=4), Schedule("outputs", 4)]
        return [*found, *([] if adjacent else [Schedule("rows", 4)]), Schedule("outputs", 1, prefetch=8)]
    if rows <= ROW_CLASSES[1]:
        both = [Schedule("rows", 8), Schedule("inputs", few)]
        return [*(reversed(both) if adjacent else both), Schedule("outputs", 8)]
    if rows <= ROW_CLASSES[2]:
        found = [Schedule("rows", tile) for tile in tiles if tile <= 32]
        return [*found, *([Schedule("inputs", few)] if adjacent else [])]
    return [Schedule("rows", tile) for tile in tiles]


def _dots(problem: Problem, target: CpuTarget, rows: int) -> list[Schedule]:
    """Products of several inputs at a time: tiles always are packed, being rounded on the way."""
    if rows <= ROW_CLASSES[0]:
        return [Schedule("dots", 1), Schedule("dots", 1, accumulators=16)]
    # Beside the sums: a panel's weights, and two inputs on their way.
    vectors = -(-problem.panel // target.lanes)
    most = max(1, min(16, (_registers(target) - vectors - 2) // vectors))
    tiles = [tile for tile in dict.fromkeys((most, min(rows, most), 8, 12)) if 1 <= tile <= most]
    tiles.sort(key=lambda tile: -(-rows // tile) * (tile + 1.5))
    parts = 2 if rows < 4 * most else 1
    found = [Schedule("dots", tile, parts_per_thread=parts) for tile in tiles]
    return [*found, *([replace(found[0], parts_per_thread=1)] if parts > 1 else [])]


def _few_wide(problem: Problem, target: CpuTarget) -> list[Schedule]:
    most = _tile_rows(problem, target)
    tile = min(8, most)
    return [
        Schedule("outputs", tile, parts_per_thread=2),
        Schedule("outputs", tile, prefetch=8, parts_per_thread=2),
        Schedule("outputs", tile, pack=True, prefetch=8, parts_per_thread=2),
        Schedule("outputs", min(4, most), prefetch=8, parts_per_thread=2),
    ]


def _many_wide(problem: Problem, target: CpuTarget, rows: int) -> list[Schedule]:
    """The largest tile that the registers hold, packed; two rows a register where a panel is one vector."""
    most = _tile_rows(problem, target)
    pairs = problem.panel == target.lanes == 16
    tiles = [tile for tile in dict.fromkeys((most, most - 1, 8, min(rows, most))) if 1 <= tile <= most]
    if pairs:
        tiles = [tile for tile in tiles if tile % 2 == 0]
    # Tiles that cover the rows with the least work first: the last one overlaps, and each has a cost of its own.
    tiles.sort(key=lambda tile: -(-rows // tile) * (tile + 1.5))
    # Few tiles: split the outputs too, so that all threads have the same work.
    parts = 2 if rows < 4 * most else 1
    best = Schedule("outputs", tiles[0], pack=True, prefetch=8, pairs=pairs, parts_per_thread=parts)
    return [
        *(replace(best, tile_rows=tile) for tile in tiles),
        replace(best, prefetch=16),
        *([replace(best, parts_per_thread=1)] if parts > 1 else []),
        Schedule("outputs", min(8, most), parts_per_thread=parts),
    ]


def _tile_rows(problem: Problem, target: CpuTarget) -> int:
    """The most rows whose sums, one panel of weights and one broadcast fit the vector registers."""
    vectors = -(-problem.panel // target.lanes)
    return max(1, min(16, (_registers(target) - vectors - 1) // vectors))


def _registers(target: CpuTarget) -> int:
    """Vector registers: AVX-512 and NEON have 32, AVX2 and SSE 16."""
    return 32 if target.lanes == 16 or target.arch == "aarch64" else 16
