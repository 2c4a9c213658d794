"""Metrics of classes and tokens: top1, top5, perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .compared import first, squeezed
from .metric import Misfit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .metric import Run

    Array = NDArray[Any]
    Floats = NDArray[np.float64]

# A cross entropy whose exponential is still a finite number, which no limit allows.
_WORST = 700.0
# Rows of logits that are looked at together: a vocabulary has 100,000 words.
_CHUNK = 256


def top(runs: Iterable[Run], k: int, reference: bool) -> float:
    """The share of samples (tokens) whose label is among the `k` highest of [N, C] ([N, T, C]); of ties the first."""
    hits = total = 0
    for run in runs:
        scores, targets = _scored(run, reference)
        if scores.shape[1] <= k > 1:
            raise Misfit(f"of {scores.shape[1]} classes the label is always among the top {k}; take top1")
        for part, target in _chunks(scores, targets):
            own = np.take_along_axis(part, target[:, None], 1)
            before = np.arange(part.shape[1]) < target[:, None]
            hits += int((((part > own) | ((part == own) & before)).sum(1) < k).sum())
        total += len(targets)
    return hits / _counted(total)


def perplexity(runs: Iterable[Run]) -> float:
    """The exponential of the mean cross entropy of labels [N, T] and logits [N, T, V], or [N] and [N, V].

    Nothing is shifted: a label is what its own position should tell.
    """
    lost, total = 0.0, 0
    for run in runs:
        scores, targets = _scored(run, False)
        for part, target in _chunks(scores, targets):
            lost -= float(_log_shares(part.astype(np.float64))[np.arange(len(part)), target].sum())
        total += len(targets)
    return math.exp(min(lost / _counted(total), _WORST))


def _log_shares(scores: Floats) -> Floats:
    """Logarithms of probabilities [M, V]: of logits by softmax; outputs that are probabilities already as they are."""
    if (scores >= 0).all() and np.abs(scores.sum(1) - 1).max() < 1e-2:
        return np.asarray(np.log(scores))
    shifted = scores - scores.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def _scored(run: Run, reference: bool) -> tuple[Array, Array]:
    """Scores [M, classes] and labels [M] of all samples or tokens of a run whose label is not negative."""
    name, scores = first(run.outputs)
    scores = squeezed(scores)
    if scores.ndim not in (2, 3):
        raise Misfit(
            f"it needs an output [N, classes] or [N, tokens, classes]; the first of floats, '{name}', is "
            f"{list(run.outputs[name].shape)}"
        )
    if reference:
        assert run.dense is not None
        targets = squeezed(first(run.dense, "the dense model's output")[1]).argmax(-1)
    else:
        assert run.labels is not None
        targets = squeezed(run.labels)
        if targets.dtype.kind not in "iu":
            raise Misfit(f"labels must be integers, the numbers of classes; these are {targets.dtype}")
    if targets.shape != scores.shape[:-1]:
        raise Misfit(
            f"labels are {list(targets.shape)}, and the output '{name}' {list(scores.shape)} needs "
            f"{list(scores.shape[:-1])}"
        )
    scores, targets = scores.reshape(-1, scores.shape[-1]), targets.reshape(-1)
    if targets.max(initial=0) >= scores.shape[1]:
        raise Misfit(
            f"there is a label {targets.max()}, and the output '{name}' has the classes 0 to {scores.shape[1] - 1}"
        )
    counts = targets >= 0
    return (scores, targets) if counts.all() else (scores[counts], targets[counts])


def _chunks(scores: Array, targets: Array) -> Iterator[tuple[Array, Array]]:
    for start in range(0, len(targets), _CHUNK):
        yield scores[start : start + _CHUNK], targets[start : start + _CHUNK]


def _counted(total: int) -> int:
    if not total:
        raise Misfit("no label counts: all are negative")
    return total
