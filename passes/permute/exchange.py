"""Exchange channels between places until no pair of places gains: `exchange`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rounds at most, each of exchanges that do not touch one another.
MOST_ROUNDS = 60
# Pairs of classes looked at in one round, for each class.
PAIRS = 4
# A gain below this share of the largest is rounding.
LEAST_GAIN = 1e-12


def exchange(gains: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """A balanced assignment of channels to classes of places that are worth the same; never less than the present one.

    An exact assignment (Hungarian, auction) of a thousand channels takes seconds, and the gains change with the next
    mask; exchanges come within a few per mille of it.

    Args:
        gains: [size, classes] what each channel, numbered by its present place, is worth in each class.
        starts: [classes] the first place of each class; the classes are neighbouring places.

    Returns:
        [size] int64: which channel comes to each place.
    """
    size, classes = gains.shape
    ends = np.append(starts[1:], size)
    home = np.repeat(np.arange(classes), ends - starts)
    order = np.arange(size)
    least = LEAST_GAIN * float(np.abs(gains).max(initial=0.0))
    for _ in range(MOST_ROUNDS):
        # Step 1. What each pair of classes gains by its best exchange: the sums are independent of each other.
        moves = gains[order] - gains[order, home][:, None]
        best = np.maximum.reduceat(moves, starts, axis=0)
        both = np.triu(best + best.T, 1)
        pairs = np.flatnonzero(both > least)
        if not len(pairs):
            break
        # Step 2. The best pairs first, each class once.
        top = pairs[np.argsort(-both.flat[pairs], kind="stable")[: PAIRS * classes]]
        used = np.zeros(classes, dtype=np.bool_)
        for g, h in zip(*(part.tolist() for part in np.divmod(top, classes)), strict=True):
            if not (used[g] or used[h]):
                used[[g, h]] = True
                i = starts[g] + np.argmax(moves[starts[g] : ends[g], h])
                j = starts[h] + np.argmax(moves[starts[h] : ends[h], g])
                order[[i, j]] = order[[j, i]]
    return order
