"""A metric that a user's function computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ....ir import SparsecError
from ..function import words
from .metric import Metric, Misfit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .metric import Run

    Array = NDArray[Any]


def own(function: Callable[..., Any], name: str) -> Metric:
    """The metric that a user's function computes."""
    higher = getattr(function, "higher_is_better", True)
    if not isinstance(higher, bool):
        raise SparsecError(f"metric '{name}': its higher_is_better is {higher!r}, expected True or False")
    return Metric(name, higher, needs_labels=False, reference=False, compute=lambda runs: _call(function, list(runs)))


def _call(function: Callable[..., Any], runs: Sequence[Run]) -> float:
    outputs, feeds = _listed([run.outputs for run in runs]), _listed([run.feeds for run in runs])
    labels = _joined([run.labels for run in runs if run.labels is not None])
    try:
        value = function(outputs, labels, feeds)
    except Exception as error:  # whatever a user's function may raise
        raise Misfit(
            f"it failed ({words(error)}); it was called with outputs of {sorted(outputs)}, labels of "
            f"{_described(labels)} and feeds of {sorted(feeds)}, a list of {len(runs)} arrays by each name: "
            "correct the function"
        ) from error
    try:
        number = float(value)
    except Exception as error:
        raise Misfit(
            f"it returned a value of type {type(value).__name__} ({words(error)}), expected one number"
        ) from error
    if not math.isfinite(number):
        raise Misfit(f"it returned {number}, expected a finite number; correct the function, or check the outputs")
    return number


def _listed(dictionaries: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [one[name] for one in dictionaries] for name in dictionaries[0]} if dictionaries else {}


def _joined(labels: list[Array]) -> Array | list[Array] | None:
    if not labels:
        return None
    stack = len({array.shape[1:] for array in labels}) == 1
    return np.concatenate(labels) if stack else labels


def _described(labels: Array | list[Array] | None) -> str:
    if isinstance(labels, np.ndarray):
        return f"{labels.dtype}{list(labels.shape)}"
    return "None" if labels is None else f"{len(labels)} runs"
