"""A point of the frontier that a person picks: it must be one."""

from __future__ import annotations

from ...ir import UsageError


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
