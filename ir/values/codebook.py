"""Codes into a table of weights: `codebook16` (4 bits) and `codebook256` (8 bits)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from .values import Values

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SIZES = (16, 256)
# Lloyd's steps; on a line they settle long before.
_STEPS = 50


@dataclass(frozen=True, slots=True)
class Codebook(Values):
    """weight = table[code] (Han et al., ICLR 2016, "Deep Compression"); the table is [size] float32, table[0] = 0.

    Attributes:
        size: 16 or 256 entries, zero included.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size not in _SIZES:
            raise UsageError(f"codebook{self.size}: a codebook has 16 or 256 entries")

    @classmethod
    def parse(cls, text: str) -> Codebook | None:
        """`codebook16` or `codebook256`."""
        name, digits = text[:8], text[8:]
        return cls(int(digits)) if name == "codebook" and digits.isdecimal() else None

    def __str__(self) -> str:
        return f"codebook{self.size}"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of codes."""
        return np.dtype(np.uint8)

    @property
    def bits(self) -> int:
        """4 or 8."""
        return 4 if self.size == 16 else 8

    def table_size(self, shape: tuple[int, int], padding: int = 0) -> int:
        """One entry a code."""
        return self.size

    def fit(self, weight: NDArray[Any], importance: NDArray[Any] | None = None) -> NDArray[np.float32]:
        """k-means on the weights other than zero; exact where these take no more values than there are entries.

        Entries that are not needed repeat the last one.
        """
        kept = weight != 0
        points, where = np.unique(weight[kept].astype(np.float64), return_inverse=True)
        each = np.ones(weight.shape) if importance is None else np.broadcast_to(importance, weight.shape)
        mass = np.bincount(where.ravel(), weights=each[kept], minlength=len(points))
        entries = self.size - 1
        centres = points if len(points) <= entries else _means(points, np.maximum(mass, 1e-30), entries)
        table = np.zeros(self.size, dtype=np.float32)
        if len(centres):
            table[1:] = np.pad(centres, (0, entries - len(centres)), mode="edge")
        return table

    def encode(self, weight: NDArray[Any], table: NDArray[np.float32]) -> NDArray[Any]:
        """The nearest entry; zeros and nothing else become code 0."""
        order = np.argsort(table[1:], kind="stable").astype(np.int64) + 1
        entries = table[order].astype(np.float64)
        nearest = np.searchsorted((entries[1:] + entries[:-1]) / 2, weight)
        return np.where(weight == 0, 0, order[nearest]).astype(np.uint8)

    def decode(self, codes: NDArray[Any], table: NDArray[np.float32]) -> NDArray[np.float32]:
        """Entries of the table."""
        return np.asarray(table[codes])


def _means(points: NDArray[np.float64], mass: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """`count` centres of `points` (sorted, on a line); the same every time.

    The better of what Lloyd's algorithm makes of two starts: the same share of mass^(1/3) for every centre, which is
    where the best quantiser of a density has them (Panter and Dite 1951), and equal steps, so that the result is never
    worse than these.
    """
    found = [
        _lloyd(points, mass, start)
        for start in (_shares(points, mass, count), np.linspace(points[0], points[-1], count))
    ]
    return min(found, key=lambda centres: _loss(points, mass, centres))


def _loss(points: NDArray[np.float64], mass: NDArray[np.float64], centres: NDArray[np.float64]) -> float:
    nearest = centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, points)]
    return float(mass @ np.square(points - nearest))


def _shares(points: NDArray[np.float64], mass: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    gaps = np.diff(points, prepend=points[0])
    spread = np.cumsum(np.cbrt(mass) * np.cbrt(np.maximum(gaps, 1e-30)) ** 2)
    aims = (np.arange(count) + 0.5) / count * spread[-1]
    centres = np.unique(points[np.minimum(np.searchsorted(spread, aims), len(points) - 1)])
    if len(centres) < count:
        rest = np.setdiff1d(points, centres)
        picks = np.linspace(0, len(rest) - 1, count - len(centres)).round().astype(np.int64)
        centres = np.sort(np.concatenate([centres, rest[picks]]))
    return np.asarray(centres)


def _lloyd(points: NDArray[np.float64], mass: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    masses, moments = (np.concatenate(([0.0], np.cumsum(a))) for a in (mass, mass * points))
    for _ in range(_STEPS):
        edges = np.searchsorted(points, (centres[1:] + centres[:-1]) / 2)
        bounds = np.concatenate(([0], edges, [len(points)]))
        inside = np.diff(masses[bounds])
        moved = np.diff(moments[bounds]) / np.maximum(inside, 1e-300)
        # Sums that cancel may be off: a mean lies between the points that it is of.
        first, last = points[np.minimum(bounds[:-1], len(points) - 1)], points[np.maximum(bounds[1:] - 1, 0)]
        moved = np.where((inside > 0) & (first <= last), np.clip(moved, first, last), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return np.asarray(centres)
