"""What a model's outputs are worth, on data that no weight was fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir import SparsecError
from ..calibration import Run, default_metric, find_metric, masks
from ..report import Fidelity, Quality
from .sensitivity import output_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..calibration import Drop, Samples

    Outputs = dict[str, Any]
    Model = Callable[[Mapping[str, NDArray[Any]]], Outputs]

# Metrics that compare outputs number by number; tokens that a mask leaves out are zero in both.
_BY_NUMBER = ("cosine", "mse")


class Judge:
    """A metric, the samples it is taken on, and its value for the dense model.

    Attributes:
        metric: the task's, or the agreement with the dense model.
        dense: its value for the dense model.
        holds_back: whether the samples are others than those that weights are fitted to.
        count: of the samples.
    """

    def __init__(
        self, dense: Model, seen: Samples, held_back: Samples, separate: bool, metric: Any, limit: Drop | None
    ) -> None:
        """Run the dense model.

        Args:
            dense: from feeds to outputs.
            seen: what weights are fitted to.
            held_back: what is judged by.
            separate: whether the latter are a source of their own.
            metric: what `find_metric` takes, or None for one that suits labels and outputs.
            limit: how much worse the metric may become, if that was said.

        Raises:
            SparsecError: the metric cannot be computed.
        """
        self._seen, self._samples, self._limit = seen, held_back, limit
        self.holds_back = separate or held_back is not seen
        self.count = held_back.count
        self._expected = [dense(feeds) for feeds in held_back.runs]
        self._labels: list[Any] = held_back.labels or [None] * len(held_back.runs)
        if metric is None:
            self.metric = default_metric(self._labels[0], self._expected[0])
        else:
            self.metric = find_metric(metric, held_back.labels is not None)
        self.dense = self._score(self._expected)

    def compare(self, model: Model) -> tuple[float, float | None]:
        """For another model with the same outputs: their relative squared error, and the metric's value.

        The latter is None where the outputs are nothing that has one.
        """
        found = [model(feeds) for feeds in self._samples.runs]
        pairs = zip(self._expected, found, self._samples.runs, strict=True)
        error = float(np.mean([output_error(y0, y, feeds) for y0, y, feeds in pairs]))
        try:
            return error, self._score(found)
        except SparsecError:
            return error, None

    def allows(self, value: float) -> bool:
        """Whether the limit does; without one everything is allowed."""
        return self._limit is None or self._limit.allows(self.metric, self.dense, value)

    def beyond(self, value: float) -> str:
        """What is lost where the limit does not allow it, in words; else ""."""
        if self._limit is None or self.allows(value):
            return ""
        lost = self._limit.lost(self.metric, self.dense, value)
        return f"{self.metric.name} {self.dense:.4g} -> {value:.4g} loses {lost}, allowed to lose {self._limit}"

    def rank(self, error: float, value: float | None) -> tuple[float, float]:
        """To order models by, the better the larger: by the metric, then by the outputs' error."""
        if value is None:
            return -math.inf, -error
        return value if self.metric.higher_is_better else -value, -error

    def quality(self, model: Model) -> tuple[Fidelity, Quality]:
        """Both, for the report."""
        found = [model(feeds) for feeds in self._samples.runs]
        masked = [
            [_masked(outputs, feeds) for outputs, feeds in zip(side, self._samples.runs, strict=True)]
            for side in (self._expected, found)
        ]
        fidelity = Fidelity(
            _distances(*masked), self._samples.count, self._seen.count, self._samples.name, self.holds_back
        )
        quality = Quality(
            metric=self.metric.name,
            higher_is_better=self.metric.higher_is_better,
            against="the dense model's outputs" if self.metric.reference else "labels",
            dense=self.dense,
            value=self._score(found),
            limit="" if self._limit is None else str(self._limit),
        )
        return fidelity, quality

    def _score(self, found: list[Outputs]) -> float:
        runs = zip(self._samples.runs, found, self._expected, self._labels, strict=True)
        masked = self.metric.reference and self.metric.name in _BY_NUMBER
        return self.metric.score(
            Run(feeds, _masked(outputs, feeds), _masked(dense, feeds), labels)
            if masked
            else Run(feeds, outputs, dense, labels)
            for feeds, outputs, dense, labels in runs
        )


def _masked(outputs: Outputs, feeds: Mapping[str, NDArray[Any]]) -> Outputs:
    """Outputs [batch, tokens, ...] with zeros where the mask among the inputs has them."""
    keep = masks(feeds)
    if keep is None:
        return outputs
    return {
        name: np.where(keep.reshape(*keep.shape, *(1,) * (y.ndim - 2)), y, 0)
        if isinstance(y, np.ndarray) and y.dtype.kind == "f" and y.shape[:2] == keep.shape
        else y
        for name, y in outputs.items()
    }


def _distances(expected: list[Outputs], found: list[Outputs]) -> dict[str, float]:
    """By output of floats: the root of the mean squared difference, as a share of that of the dense output."""
    lost: dict[str, float] = {}
    power: dict[str, float] = {}
    for y0, y in zip(expected, found, strict=True):
        for name, dense in y0.items():
            if isinstance(dense, np.ndarray) and dense.dtype.kind == "f":
                wide = dense.astype(np.float64)
                lost[name] = lost.get(name, 0.0) + float(np.square(y[name] - wide).sum())
                power[name] = power.get(name, 0.0) + float(np.square(wide).sum())
    return {name: (lost[name] / power[name]) ** 0.5 for name in lost if power[name]}
