"""What each option alone does to the outputs of the model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..calibration import Samples, Trial, Weights, masks, spread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ...ir import Layer
    from ..calibration.trial import Feeds
    from .options import Options

    # From feeds to outputs by name.
    Model = Callable[[Feeds], dict[str, Any]]

# Seconds that the runs may take together: they choose how many of the samples are looked at.
SECONDS = 30.0


def measure_errors(
    trial: Trial,
    layers: Sequence[Layer],
    options: Options,
    samples: Samples,
    done: Callable[[str], None],
    seconds: float = SECONDS,
) -> Options:
    """The options with `error` measured: one layer pruned, all others dense.

    Whole-model errors weigh what a layer's own error cannot: how much what follows cares. For small changes they add
    up, which is what the allocation assumes.
    """

    def model(weights: Mapping[str, Weights]) -> Model:
        fed = trial.feeds(weights)
        return lambda feeds: trial.run(feeds, fed)

    error = error_meter(model({}), samples, sum(map(len, options.values())), seconds)
    measured: Options = {}
    for layer in layers:
        measured[layer.name] = tuple(
            dataclasses.replace(option, error=error(model({layer.name: option.weights(layer)})))
            for option in options[layer.name]
        )
        done(layer.name)
    return measured


def error_meter(dense: Model, samples: Samples, models: int, seconds: float = SECONDS) -> Callable[[Model], float]:
    """From a model with other weights to the error of its outputs, on as many samples as so many `models` may take."""
    dense(samples.runs[0])
    start = time.perf_counter()
    dense(samples.runs[0])
    a_run = time.perf_counter() - start
    runs = spread(samples.runs, int(seconds / max(a_run * models, 1e-9)))
    expected = [dense(feeds) for feeds in runs]

    def error(model: Model) -> float:
        pairs = zip(expected, runs, strict=True)
        return float(np.mean([output_error(y0, model(feeds), feeds) for y0, feeds in pairs]))

    return error


def output_error(expected: Mapping[str, Any], found: Mapping[str, Any], feeds: Mapping[str, NDArray[Any]]) -> float:
    """Relative squared error of the outputs that are floats, their mean; tokens that a mask leaves out do not count."""
    keep = masks(feeds)
    errors = []
    for name, y0 in expected.items():
        if not isinstance(y0, np.ndarray) or y0.dtype.kind != "f" or not y0.size:
            continue
        wide, change = y0.astype(np.float64), found[name] - y0.astype(np.float64)
        if keep is not None and keep.shape == y0.shape[:2] and keep.any():
            wide, change = wide[keep], change[keep]
        power = float(np.square(wide).sum())
        # Beyond outputs of zeros (1) and of twice the size nothing can be told apart, and infinity adds to nothing.
        errors.append(min(float(np.square(change).sum()) / power, 4.0) if power and np.isfinite(change).all() else 4.0)
    return float(np.mean(errors)) if errors else 0.0
