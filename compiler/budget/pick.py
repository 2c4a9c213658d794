"""A point of the frontier that a person picks: it must be one, and a target that it misses is said all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...ir import UsageError

if TYPE_CHECKING:
    from .judge import Judge


def check_pick(pick: int, points: int) -> None:
    """Refuse a number beyond the frontier: another point than the one that was meant would replace an artifact.

    Args:
        pick: the number that was given; 0 is the dense model.
        points: how many points there are besides.

    Raises:
        UsageError: there is no such point.
    """
    if pick > points:
        there = f"points 0 to {points}" if points else "point 0 only, the dense model"
        raise UsageError(f"--pick {pick}: the frontier has {there}; report.json and the table of the first run show it")


def too_slow(pick: int, wanted: float, reached: float) -> str:
    """That the picked point is slower than `--speedup` asks, or ""."""
    if reached >= wanted:
        return ""
    return f"point {pick} is {reached:.2f}x as fast, {wanted:g}x was asked for (--speedup): pick a faster one."


def too_far(pick: int, judge: Judge, value: float | None) -> str:
    """That the picked point loses more of the metric than `--max-drop` allows, or ""."""
    if value is None:
        return f"the outputs of point {pick} have no {judge.metric.name}: pick a point that changes less."
    lost = judge.beyond(value)
    return f"point {pick}: {lost} (--max-drop): pick a slower one, or allow more." if lost else ""
