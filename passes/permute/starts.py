"""Orders to begin a search with. None depends on the order of the other axis, so they go together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .views import View

# Steps of the power method; a direction that is only near the principal one serves as well.
POWER_STEPS = 12


def by_norm(views: Sequence[View], rng: np.random.Generator) -> NDArray[np.int64]:
    """The channels with most saliency first."""
    return np.argsort(-np.sum([view.features.sum(axis=1) for view in views], axis=0), kind="stable")


def by_zeros(views: Sequence[View], rng: np.random.Generator) -> NDArray[np.int64]:
    """Channels with the same zeros side by side, those that fill whole blocks first: finds exact blocks again."""
    zeros = np.packbits(np.concatenate([view.features == 0 for view in views], axis=1), axis=1)
    _, groups, counts = np.unique(zeros, axis=0, return_inverse=True, return_counts=True)
    groups = groups.reshape(-1)
    return np.lexsort((groups, counts[groups] % _channels(views) != 0))


def by_bisection(views: Sequence[View], rng: np.random.Generator) -> NDArray[np.int64]:
    """Halved again and again along the principal direction of the roots of the scores, down to one block."""
    return _bisect(np.sqrt(np.concatenate([view.features for view in views], axis=1)), _channels(views), rng)


STARTS: tuple[Callable[[Sequence[View], np.random.Generator], NDArray[np.int64]], ...] = (
    by_norm,
    by_zeros,
    by_bisection,
)


def _channels(views: Sequence[View]) -> int:
    """Of the largest block."""
    return max(max(1, view.block // view.repeat) for view in views)


def _bisect(features: NDArray[np.float64], block: int, rng: np.random.Generator) -> NDArray[np.int64]:
    size = len(features)
    if size <= block:
        return np.arange(size)
    centred = features - features.mean(axis=0)
    along = rng.standard_normal(size)
    for _ in range(POWER_STEPS):
        along = centred @ (along @ centred)
        along /= np.linalg.norm(along) or 1.0
    half = -(-size // (2 * block)) * block
    order = np.argsort(-along, kind="stable")
    parts = np.sort(order[:half]), np.sort(order[half:])
    return np.concatenate([part[_bisect(features[part], block, rng)] for part in parts])
