"""Which schedules are worth trying: plain data, the best guess first."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..kernels.schedule import Schedule

if TYPE_CHECKING:
    from ..problem import Problem
    from ..target import Target

# Rows of X up to which one variant of a kernel serves, the last for any number. Within a class the same tile wins.
ROW_CLASSES = (3, 11, 47, 2**63 - 1)


def row_class(rows: int) -> int:
    """Index into `ROW_CLASSES`."""
    return next(i for i, most in enumerate(ROW_CLASSES) if rows <= most)


# Blocks of fewer outputs than this do not fill a vector: vectors run along the rows of X or the inputs of a block.
_NARROW = 16


def candidates(problem: Problem, target: Target, rows: int) -> list[Schedule]:
    """Schedules for `rows` rows of X, the first being what fits most machines."""
    if rows <= ROW_CLASSES[0]:
        return _single_rows(problem)
    if rows <= ROW_CLASSES[1]:
        return _few_rows(problem, target)
    return _many_narrow(problem, rows) if problem.block[0] < _NARROW else _many_wide(problem, target, rows)


def _single_rows(problem: Problem) -> list[Schedule]:
    """Bound by memory: one row, several chains of sums."""
    outputs = [
        Schedule("outputs", 1, prefetch=8),
        Schedule("outputs", 1),
        Schedule("outputs", 1, accumulators=16, prefetch=16),
    ]
    if problem.block[0] >= _NARROW:
        return outputs
    return [Schedule("inputs", 1, accumulators=4), *outputs[:2], Schedule("inputs", 1, accumulators=1)]


def _few_rows(problem: Problem, target: Target) -> list[Schedule]:
    most = _tile_rows(problem, target)
    tile = min(8, most)
    outputs = [
        Schedule("outputs", tile, parts_per_thread=2),
        Schedule("outputs", tile, prefetch=8, parts_per_thread=2),
        Schedule("outputs", tile, pack=True, prefetch=8, parts_per_thread=2),
        Schedule("outputs", min(4, most), prefetch=8, parts_per_thread=2),
    ]
    if problem.block[0] >= _NARROW:
        return outputs
    narrow = [Schedule("rows", 8, parts_per_thread=2), Schedule("inputs", 8, parts_per_thread=2)]
    return [*(reversed(narrow) if problem.block[1] >= 4 else narrow), outputs[0]]


def _many_narrow(problem: Problem, rows: int) -> list[Schedule]:
    """Vectors along the rows; the more rows a tile has, the more each index brings, up to what the cache holds."""
    largest = 64 if problem.block[0] <= 4 else 32
    tiles = [tile for tile in (largest, 32, 16) if tile <= max(16, rows)]
    parts = 2 if rows <= 2 * largest else 1
    found = [Schedule("rows", tile, parts_per_thread=parts) for tile in dict.fromkeys(tiles)]
    return [*found, Schedule("inputs", 8, parts_per_thread=parts)]


def _many_wide(problem: Problem, target: Target, rows: int) -> list[Schedule]:
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


def _tile_rows(problem: Problem, target: Target) -> int:
    """The most rows whose sums, one panel of weights and one broadcast fit the vector registers."""
    registers = 32 if target.lanes == 16 or target.arch == "aarch64" else 16
    vectors = -(-problem.panel // min(target.lanes, 16))
    return max(1, min(16, (registers - vectors - 1) // vectors))
