"""Weights fitted once more, layer after layer, to what the pruned model itself gives each layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ...passes.solve import Moments, refit
from ..exporter import bias_place
from ..parallel import each
from .gather import finite
from .rows import groups_of, masks, rows, source_of
from .trial import Trial, Weights

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ...ir import Layer, Program
    from ..machine import Machine
    from .samples import Samples

# Seconds that the passes over the data may take. Where one pass for each set of layers with the same input would take
# longer, neighbouring sets share a pass: they then do not see what became of each other.
SECONDS = 60.0


def repair(
    program: Program,
    pruned: Mapping[str, Weights],
    samples: Samples,
    machine: Machine,
    folder: Path,
    threads: int = 1,
    done: Callable[[str], None] = lambda what: None,
    seconds: float = SECONDS,
) -> dict[str, Weights]:
    """New values for the weights that are kept, and new biases: the dense layers' outputs from the pruned inputs.

    A layer thereby also makes good what the layers before it got wrong, and the mean of its outputs is again that of
    the dense layer's, which is what bias and BatchNorm correction are for.

    Args:
        program: the dense model.
        pruned: by layer name; where a weight is zero it stays zero.
        samples: what the weights are fitted to.
        machine: where the model runs.
        folder: scratch space.
        threads: layers fitted side by side.
        done: is told each layer.
        seconds: that running the model may take, roughly.
    """
    layers = [layer for layer in program.layers if layer.name in pruned]
    trial = Trial(program, layers, machine, folder, watched=True)
    current = dict(pruned)
    dense, sources = trial.feeds({}), _by_source(layers)
    start = time.perf_counter()
    trial.watch(samples.runs[0], dense, [layers[0].name])
    full_pass = 2 * len(samples.runs) * (time.perf_counter() - start)
    for stage in _stages(sources, full_pass, seconds):
        moments = _moments(trial, stage, trial.feeds(current), dense, samples, threads)
        work = [(layer, found) for members, found in zip(stage, moments, strict=True) for layer in members]
        fitted = each(lambda one: _refit(one[0], current[one[0].name], one[1]), work, threads)
        for (layer, _), new in zip(work, list(fitted), strict=True):
            current[layer.name] = new
            done(layer.name)
    return current


def _by_source(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers with the same rows together, in the order of the graph."""
    sources: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        sources.setdefault(source_of(layer), []).append(layer)
    return list(sources.values())


def _stages(sources: list[list[Layer]], full_pass: float, seconds: float) -> list[list[list[Layer]]]:
    """Neighbouring sources that share a pass."""
    passes = max(1, min(len(sources), int(seconds / max(full_pass, 1e-9))))
    cuts = np.linspace(0, len(sources), passes + 1).round().astype(int)
    return [sources[a:b] for a, b in pairwise(cuts)]


def _moments(
    trial: Trial,
    stage: list[list[Layer]],
    pruned: dict[str, Any],
    dense: dict[str, Any],
    samples: Samples,
    threads: int,
) -> list[list[Moments]]:
    """Of each source of the stage, for each group: one pass over the data with both models."""
    first = [members[0] for members in stage]
    names = [layer.name for layer in first]
    sums: list[list[Moments]] = []
    for number, feeds in enumerate(samples.runs):
        found, wanted = trial.watch(feeds, pruned, names), trial.watch(feeds, dense, names)
        keep = masks(feeds)
        work = [
            (layer, finite(found[layer.name], layer, samples.name), wanted[layer.name], number, keep) for layer in first
        ]
        new = list(each(_of_run, work, threads))
        sums = (
            [[_added(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(sums, new, strict=True)]
            if sums
            else new
        )
    return [[_means(one) for one in groups] for groups in sums]


def _of_run(work: tuple[Layer, NDArray[Any], NDArray[Any], int, NDArray[np.bool_] | None]) -> list[Moments]:
    """Of each group of a layer: the sums over one run."""
    layer, x, x0, number, keep = work
    pairs = zip(rows(layer, x, number, keep), rows(layer, x0, number, keep), strict=True)
    return [_sums(one, one0) for one, one0 in pairs]


def _sums(x: NDArray[np.float32], x0: NDArray[np.float32]) -> Moments:
    """Of the rows of one run, not yet divided by their number."""
    products = (x.T @ x).astype(np.float64), (x.T @ x0).astype(np.float64)
    return Moments(*products, x.sum(0, dtype=np.float64), x0.sum(0, dtype=np.float64), len(x))


def _added(a: Moments, b: Moments) -> Moments:
    return Moments(a.hessian + b.hessian, a.cross + b.cross, a.mean + b.mean, a.mean0 + b.mean0, a.rows + b.rows)


def _means(a: Moments) -> Moments:
    n = max(a.rows, 1)
    return Moments(a.hessian / n, a.cross / n, a.mean / n, a.mean0 / n, a.rows)


def _refit(layer: Layer, weights: Weights, moments: list[Moments]) -> Weights:
    """Each group by itself."""
    groups = groups_of(layer)
    with_bias = bias_place(layer) is not None
    parts = zip(np.split(layer.weight, groups), np.split(weights.matrix, groups), moments, strict=True)
    results = [refit(dense, now != 0, one, with_bias, now) for dense, now, one in parts]
    matrix = np.concatenate([weight for weight, _ in results])
    if not with_bias:
        return Weights(matrix)
    own = np.zeros(layer.out_features) if layer.bias is None else layer.bias
    shift = np.concatenate([shift for _, shift in results if shift is not None])
    return Weights(matrix, (own + shift).astype(np.float32))
