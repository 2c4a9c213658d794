"""Weights fitted once more, layer after layer, to what the pruned model itself gives each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ...passes.solve import Moments, Statistics, refit, round_weights
from ..exporter import bias_place
from ..parallel import each
from .gather import finite
from .rows import groups_of, masks, rows, source_of
from .samples import spread
from .trial import Weights
from .walk import Walk

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ...ir import Layer, Program
    from ...ir.values import Values
    from ..machine import Machine
    from .samples import Samples

# Share of an input's second moment that its variance must exceed: sums are in float32.
STILL = 1e-5
# Bytes that may be kept of what all runs compute, of both models together: they choose how many of the runs are used.
BYTES = 2**30


def repair(
    program: Program,
    pruned: Mapping[str, Weights],
    samples: Samples,
    machine: Machine,
    folder: Path,
    threads: int = 1,
    done: Callable[[str], None] = lambda what: None,
    most_bytes: int = BYTES,
    kinds: Mapping[str, Values] | None = None,
) -> dict[str, Weights]:
    """New values for the weights that are kept, and new biases: the dense layers' outputs from the pruned inputs.

    A layer thereby also makes good what the layers before it got wrong, and the mean of its outputs is again that of
    the dense layer's, which is what bias and BatchNorm correction are for. Both models are run once, piece by piece.

    Args:
        program: the dense model.
        pruned: by layer name; where a weight is zero it stays zero.
        samples: what the weights are fitted to.
        machine: where the model runs.
        folder: scratch space.
        threads: layers fitted side by side.
        done: is told each layer.
        most_bytes: of activations; runs that would take more are left out, evenly.
        kinds: what weights are stored as, by layer name: they are rounded before the layers that follow are fitted.
    """
    kinds = kinds or {}
    walk = Walk(program, _by_source(program, pruned), machine, folder)
    dense, current = walk.feeds({}), dict(pruned)
    runs = spread(samples.runs, most_bytes // (2 * _largest(walk, samples.runs[0], dense) or 1))
    states = [(dict(feeds), dict(feeds)) for feeds in runs]
    for piece in walk.pieces:
        fed, first = walk.feeds(current), [members[0] for members in piece.stops]
        sums: list[list[Moments]] = []
        for number, (feeds, (values, values0)) in enumerate(zip(runs, states, strict=True)):
            piece.run(values, fed)
            piece.run(values0, dense)
            work = [
                (layer, finite(values[name], layer, samples.name), values0[name], number, masks(feeds))
                for layer, name in ((layer, piece.x[layer.name]) for layer in first)
            ]
            new = list(each(_of_run, work, threads))
            sums = [_added(*pair) for pair in zip(sums, new, strict=True)] if sums else new
        moments = [[_means(one) for one in groups] for groups in sums]
        todo = [(layer, found) for members, found in zip(piece.stops, moments, strict=True) for layer in members]
        fitted = list(each(lambda one: _refit(one[0], current[one[0].name], one[1], kinds), todo, threads))
        for (layer, _), better in zip(todo, fitted, strict=True):
            current[layer.name] = better
            done(layer.name)
    return current


def _by_source(program: Program, names: Collection[str]) -> list[list[Layer]]:
    """Layers with the same rows together."""
    sources: dict[Hashable, list[Layer]] = {}
    for layer in program.layers:
        if layer.name in names:
            sources.setdefault(source_of(layer), []).append(layer)
    return list(sources.values())


def _largest(walk: Walk, feeds: Mapping[str, NDArray[Any]], weights: Mapping[str, Any]) -> int:
    """Bytes that one run keeps, at most."""
    values, largest = dict(feeds), 0
    for piece in walk.pieces:
        piece.run(values, weights)
        largest = max(largest, sum(value.nbytes for value in values.values()))
    return largest


def _of_run(work: tuple[Layer, NDArray[Any], NDArray[Any], int, NDArray[np.bool_] | None]) -> list[Moments]:
    """Of each group of a layer: the sums over one run."""
    layer, x, x0, number, keep = work
    pairs = zip(rows(layer, x, number, keep), rows(layer, x0, number, keep), strict=True)
    return [_sums(one, one0) for one, one0 in pairs]


def _sums(x: NDArray[np.float32], x0: NDArray[np.float32]) -> Moments:
    """Of the rows of one run, not yet divided by their number."""
    products = (x.T @ x).astype(np.float64), (x.T @ x0).astype(np.float64)
    return Moments(*products, x.sum(0, dtype=np.float64), x0.sum(0, dtype=np.float64), len(x))


def _added(sums: list[Moments], new: list[Moments]) -> list[Moments]:
    """Of each group."""
    return [
        Moments(a.hessian + b.hessian, a.cross + b.cross, a.mean + b.mean, a.mean0 + b.mean0, a.rows + b.rows)
        for a, b in zip(sums, new, strict=True)
    ]


def _means(a: Moments) -> Moments:
    n = max(a.rows, 1)
    return Moments(a.hessian / n, a.cross / n, a.mean / n, a.mean0 / n, a.rows)


def covariance(moment: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of inputs with this second moment [in, in]; those that never vary, of which rounding leaves anything, have none.

    Where none varies it is the moment.
    """
    hessian = moment - np.outer(mean, mean)
    still = np.diagonal(hessian) <= STILL * np.diagonal(moment)
    if still.all():
        return moment
    hessian[still] = hessian[:, still] = 0
    return hessian


def _refit(layer: Layer, weights: Weights, moments: list[Moments], kinds: Mapping[str, Values]) -> Weights:
    """Each group by itself."""
    groups = groups_of(layer)
    with_bias = bias_place(layer) is not None
    parts = zip(np.split(layer.weight, groups), np.split(weights.matrix, groups), moments, strict=True)
    results = [refit(dense, now != 0, one, with_bias, now) for dense, now, one in parts]
    matrix, table = np.concatenate([weight for weight, _ in results]), None
    kind, means = kinds.get(layer.name), moments[0]
    if kind is not None and groups == 1:
        # What the bias makes good does not count. Where pruning left only zeros, all weights count the same.
        moment = covariance(means.hessian, means.mean) if with_bias else means.hessian
        statistics = Statistics.of(moment, power=1.0)
        fitted = matrix
        matrix, table = round_weights(fitted, weights.matrix != 0, fitted, statistics, kind, layer.table)
    if not with_bias:
        return Weights(matrix, None, table)
    own = np.zeros(layer.out_features) if layer.bias is None else layer.bias
    shift = np.concatenate([shift for _, shift in results if shift is not None])
    if table is not None:
        shift = shift + (fitted.astype(np.float64) - matrix) @ means.mean
    return Weights(matrix, (own + shift).astype(np.float32), table)
