"""Metrics of numbers: mse, cosine, spearman."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from .compared import numbers, with_dense, with_labels
from .metric import Misfit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .compared import Pairs
    from .metric import Run

    Floats = NDArray[np.float64]


def squared_error(runs: Iterable[Run]) -> float:
    """The mean of squared differences from the labels."""
    lost, total = 0.0, 0
    for run in runs:
        for found, expected in with_labels(run).values():
            lost += float(np.square(found - expected).sum())
            total += found.size
    return lost / max(total, 1)


def relative_error(runs: Iterable[Run]) -> float:
    """Squared differences over the squares of the dense outputs, each summed over all runs; the mean of the outputs.

    An output that is 0 throughout in the dense model counts 0 where it stays so, else 1.
    """
    lost: dict[str, float] = {}
    power: dict[str, float] = {}
    for run in runs:
        for name, (found, expected) in with_dense(run).items():
            lost[name] = lost.get(name, 0.0) + float(np.square(found - expected).sum())
            power[name] = power.get(name, 0.0) + float(np.square(expected).sum())
    errors = [lost[name] / power[name] if power[name] else float(lost[name] > 0) for name in lost]
    return sum(errors) / len(errors)


def similarity(pairs: Iterable[Pairs], of: Callable[[Floats, Floats], Floats]) -> float:
    """The mean over outputs of the mean over samples of a similarity of rows.

    Where a sample has only one number, which is similar to any other, all samples together are one row.
    """
    values: dict[str, list[Floats]] = {}
    single: dict[str, list[tuple[Floats, Floats]]] = {}
    for pair in pairs:
        for name, (found, expected) in pair.items():
            if found.shape[1] == 1:
                single.setdefault(name, []).append((found, expected))
            elif found.size:
                values.setdefault(name, []).append(of(found, expected))
    for name, parts in single.items():
        found, expected = (np.concatenate(side).reshape(1, -1) for side in zip(*parts, strict=True))
        values.setdefault(name, []).append(of(found, expected))
    if not values:
        raise Misfit("the outputs are empty")
    return float(np.mean([np.concatenate(parts).mean() for parts in values.values()]))


def cosines(found: Floats, expected: Floats) -> Floats:
    """[N]: of rows that are 0, 1 where both are, else 0."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    same = ~(found.any(1) | expected.any(1))
    cosines = np.clip((found * expected).sum(1) / lengths, -1, 1)
    return np.where(lengths == 0, same.astype(np.float64), cosines)


def order(runs: Iterable[Run]) -> float:
    """Spearman's coefficient of all samples' outputs and labels, one number each."""

    def correlations(found: Floats, expected: Floats) -> Floats:
        if expected.size > 1 and np.ptp(expected) == 0:
            raise Misfit(f"all labels are {expected.flat[0]:g}, which puts the samples in no order")
        return rank_correlations(found, expected)

    return similarity(map(numbers, runs), correlations)


def rank_correlations(found: Floats, expected: Floats) -> Floats:
    """[N]: Spearman's coefficient, with the mean rank for ties; of rows without order 1 where both are, else 0."""
    if found.shape[1] < 2:
        raise Misfit("an order needs two samples or more")
    return np.array([_rank_correlation(a, b) for a, b in zip(found, expected, strict=True)])


def _rank_correlation(found: Floats, expected: Floats) -> float:
    a, b = (ranks - ranks.mean() for ranks in (_ranks(found), _ranks(expected)))
    lengths = math.sqrt(float(a @ a) * float(b @ b))
    if not lengths:
        return float(not a.any() and not b.any())
    return max(-1.0, min(1.0, float(a @ b) / lengths))


def _ranks(values: Floats) -> Floats:
    """1 for the lowest; those that are equal share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)
