"""Numbers and names as a table shows them. ASCII only, so that any terminal and log can."""

from __future__ import annotations

import math


def percent(share: float) -> str:
    """A share of zeros: `0.9` to "90 %". Neither 0 nor 100 is shown for what is not quite."""
    value = 100 * share
    if 0 < value < 1:
        return "<1 %"
    if 99 < value < 100:
        return f"{math.floor(10 * value) / 10:.1f} %"
    return f"{value:.0f} %"


def number(value: float) -> str:
    """Three significant digits, never an exponent: "0.0213", "6.41", "90.1", "2,250"."""
    if not math.isfinite(value) or value <= 0:
        return f"{value:g}"
    # Rounding comes first: 9.999 has two digits before the point.
    rounded = float(f"{value:.2e}")
    decimals = 2 - math.floor(math.log10(rounded))
    return f"{value:,.{min(max(decimals, 0), 6)}f}"


def factor(value: float) -> str:
    """A speedup: "0.94x", "1.31x", "14.1x"."""
    if value < 9.995:
        return f"{value:.2f}x"
    return f"{value:.1f}x" if value < 99.95 else f"{value:,.0f}x"


def size(nbytes: int) -> str:
    """Bytes in decimal units: "512 B", "3.16 MB"."""
    if nbytes < 1000:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{number(value)} {unit}"
    return f"{number(value / 1000)} TB"


def count(things: int, noun: str) -> str:
    """A number of things: "1 layer", "12 layers"."""
    return f"{things:,} {noun}" if things == 1 else f"{things:,} {noun}s"


def shorten(name: str, width: int) -> str:
    """`name` with its middle left out where it is longer than `width`; the end, which says more, keeps more."""
    if len(name) <= width:
        return name
    tail = max((width - 2) * 3 // 5, 1)
    return f"{name[: max(width - 2 - tail, 0)]}..{name[-tail:]}"


def fold(name: str, width: int, lines: int = 2) -> list[str]:
    """`name` on at most `lines` lines, broken behind a separator where there is one; the middle goes where it must.

    "/encoder/layer.0/attention/query/MatMul" -> "/encoder/layer.0/attention/", "query/MatMul"
    """
    broken: list[str] = []
    rest = name
    while len(rest) > width and len(broken) < lines - 1:
        room = (lines - len(broken) - 1) * width  # for all that follows this line
        at = max((i + 1 for i in range(width) if rest[i] in "/._:-" and len(rest) - i - 1 <= room), default=width)
        broken.append(rest[:at])
        rest = rest[at:]
    if len(rest) > width:
        return fold(shorten(name, width * lines), width, lines)
    return [*broken, rest]
