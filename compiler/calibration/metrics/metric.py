"""A measure of a model over runs, and what it says where it cannot be computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ....ir import SparsecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class Misfit(Exception):  # noqa: N818  # never leaves this folder: `Metric.score` says it with the metric's name
    """Why a metric cannot be computed."""


@dataclass(frozen=True, eq=False, slots=True)
class Run:
    """One run of a model.

    Attributes:
        feeds: its inputs by name.
        outputs: its outputs by name, in the model's order.
        dense: the dense model's outputs for the same inputs; needed by metrics with `reference`.
        labels: [samples, ...], or None.
    """

    feeds: Mapping[str, Array]
    outputs: Mapping[str, Any]
    dense: Mapping[str, Any] | None = None
    labels: Array | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """A measure of a model over runs.

    Attributes:
        name: as the user wrote it.
        higher_is_better: otherwise a lower value is.
        needs_labels: every run must have labels.
        reference: every run must have the dense model's outputs, which stand for the labels.
        compute: the value over all runs, in one pass.
    """

    name: str
    higher_is_better: bool
    needs_labels: bool
    reference: bool
    compute: Callable[[Iterable[Run]], float]

    def score(self, runs: Iterable[Run]) -> float:
        """The value over `runs`, which may be a generator: only a user's function needs them all at once.

        Raises:
            SparsecError: the outputs or labels are not what the metric needs, it failed, or its value is not finite.
        """
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused below
                value = self.compute(self._complete(runs))
        except Misfit as misfit:
            raise SparsecError(f"metric '{self.name}': {misfit}") from misfit.__cause__
        if not math.isfinite(value):
            raise SparsecError(
                f"metric '{self.name}' is {value}, no finite number: the outputs that it compares have infinite or "
                "very large values; check them, or choose another metric"
            )
        return value

    def _complete(self, runs: Iterable[Run]) -> Iterator[Run]:
        seen = False
        for run in runs:
            if self.needs_labels and run.labels is None:
                raise Misfit("it needs labels, and there are none: give one label a sample, as an array 'labels'")
            if self.reference and run.dense is None:
                raise Misfit("it compares with the dense model's outputs, and there are none")
            seen = True
            yield run
        if not seen:
            raise Misfit("there is no sample to compute it of")

    def drop(self, dense: float, value: float) -> tuple[float, float]:
        """How much worse `value` is than `dense`: the difference, and its share of `dense`; negative where better.

        A metric that is 0 for the dense model has no share of it: both numbers are the difference.
        """
        lost = dense - value if self.higher_is_better else value - dense
        return lost, lost / abs(dense) if dense else lost
