"""Which schedules are worth trying: plain data, the best guess first."""

from __future__ import annotations

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


def candidates(problem: Problem, target: Target, rows: int) -> list[Schedule]:
    """Schedules for `rows` rows of X, the first being what fits most machines."""
    if rows <= ROW_CLASSES[0]:
        return [
            Schedule("outputs", 1, accumulators=8, prefetch=8),
            Schedule("outputs", 1, accumulators=8),
            Schedule("outputs", 1, accumulators=16, prefetch=16),
        ]
    most = _tile_rows(problem, target)
    if rows <= ROW_CLASSES[1]:
        tile = min(8, most)
        return [
            Schedule("outputs", tile, parts_per_thread=2),
            Schedule("outputs", tile, prefetch=8, parts_per_thread=2),
            Schedule("outputs", tile, pack=True, prefetch=8, parts_per_thread=2),
            Schedule("outputs", min(4, most), prefetch=8, parts_per_thread=2),
        ]
    tiles = [t for t in dict.fromkeys((most, most - 1, 8, min(rows, most))) if 1 <= t <= most]
    found = [Schedule("outputs", t, pack=True, prefetch=8) for t in tiles]
    if rows < 4 * most:
        # Few tiles: split the outputs too, so that all threads have the same work.
        found = [Schedule("outputs", t, pack=True, prefetch=8, parts_per_thread=p) for t in tiles for p in (2, 1)]
    found.append(Schedule("outputs", most, pack=True, prefetch=16))
    found.append(Schedule("outputs", min(8, most)))
    return found


def _tile_rows(problem: Problem, target: Target) -> int:
    """The most rows whose sums, one panel of weights and one broadcast fit the vector registers."""
    registers = 32 if target.lanes == 16 or target.arch == "aarch64" else 16
    vectors = -(-problem.panel // min(target.lanes, 16))
    return max(1, min(16, (registers - vectors - 1) // vectors))
