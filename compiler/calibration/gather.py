"""The second moments of layers' inputs, in one streaming pass through ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir import SparsecError
from ...passes.solve import Statistics
from ..parallel import each
from .rows import masks, rows, source_of
from .trial import Trial

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ...ir import Layer, Program
    from ..machine import Machine
    from .samples import Samples


@dataclass(frozen=True)
class Calibration:
    """What the samples say about the layers.

    Attributes:
        statistics: by layer name, one for each of its groups; layers with the same input share them.
        means: by layer name, of each of its groups the mean of X: [in].
        rows: by layer name, the rows of X that were seen.
        samples: how many there were.
        source: where they came from.
    """

    statistics: dict[str, tuple[Statistics, ...]]
    means: dict[str, tuple[NDArray[np.float64], ...]]
    rows: dict[str, int]
    samples: int
    source: str

    def error(self, layer: Layer, weight: NDArray[np.float32]) -> float:
        """Relative squared error of the layer's outputs with `weight` [out, in], on the dense model's inputs."""
        statistics = self.statistics[layer.name]
        dense = np.split(layer.weight.astype(np.float64), len(statistics))
        new = np.split(weight.astype(np.float64), len(statistics))
        parts = list(zip(dense, new, statistics, strict=True))
        power = sum(one.loss(w0) for w0, _, one in parts)
        return sum(one.loss(w - w0) for w0, w, one in parts) / power if power else 0.0

    @property
    def scarce(self) -> dict[str, tuple[int, int]]:
        """Rows seen and inputs of the layers that saw fewer rows than they have inputs: damping makes up for it."""
        sizes = {name: (self.rows[name], len(found[0].dead)) for name, found in self.statistics.items()}
        return {name: (rows, inputs) for name, (rows, inputs) in sizes.items() if rows < inputs}


def gather(
    program: Program,
    layers: Sequence[Layer],
    samples: Samples,
    machine: Machine,
    folder: Path,
    threads: int = 1,
    done: Callable[[str], None] = lambda what: None,
) -> Calibration:
    """Run the model on all samples and sum Xᵀ X over the inputs X [rows, in] of each layer, in float64.

    Memory: one [in, in] an input, and the activations of one run. Tokens that a mask among the inputs leaves out do
    not count.

    Raises:
        SparsecError: the model cannot be run on the samples, an activation is NaN or infinite, or those of a layer are
            all zero.
    """
    trial = Trial(program, layers, machine, folder, watched=True)
    weights = trial.feeds({})
    owners = {source_of(layer): layer for layer in reversed(layers)}
    moments: dict[Any, NDArray[np.float64]] = {}
    sums: dict[Any, NDArray[np.float64]] = {}
    seen = dict.fromkeys(owners, 0)
    for number, feeds in enumerate(samples.runs):
        watched = trial.watch(feeds, weights, [layer.name for layer in owners.values()])
        work = [
            (layer, finite(watched[layer.name], layer, samples.name), number, masks(feeds)) for layer in owners.values()
        ]
        for source, (new, total, count) in zip(owners, each(_moment, work, threads), strict=True):
            moments[source] = moments[source] + new if source in moments else new
            sums[source] = sums[source] + total if source in sums else total
            seen[source] += count
        done(f"run {number + 1}")
    # The first such layer of the graph: those behind it may only follow.
    for source, layer in reversed(owners.items()):
        if not moments[source].any():
            what = "only zeros" if seen[source] else "nothing"
            raise SparsecError(
                f"calibration data '{samples.name}': {what} ever flowed into layer '{layer.name}', so its weight "
                f"cannot be fitted; add samples that reach it, or leave it as it is with --sparsity '{layer.name}=0'"
            )
    statistics = {source: _statistics(stack / max(seen[source], 1)) for source, stack in moments.items()}
    return Calibration(
        statistics={layer.name: statistics[source_of(layer)] for layer in layers},
        means={layer.name: (*(sums[(at := source_of(layer))] / max(seen[at], 1)),) for layer in layers},
        rows={layer.name: seen[source_of(layer)] for layer in layers},
        samples=samples.count,
        source=samples.name,
    )


def _moment(
    work: tuple[Layer, NDArray[Any], int, NDArray[np.bool_] | None],
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Of one run, for each group: the sums of xᵀ x and of x; and the number of rows."""
    x = rows(*work)
    return (x.transpose(0, 2, 1) @ x).astype(np.float64), x.sum(axis=1, dtype=np.float64), x.shape[1]


def _statistics(moments: NDArray[np.float64]) -> tuple[Statistics, ...]:
    """Of [groups, in, in]. A group of only zeros, such as one dead channel, counts with the damping of the others."""
    diagonals = np.diagonal(moments, axis1=1, axis2=2)
    power = float(diagonals[diagonals != 0].mean())
    return tuple(Statistics.of(moment, power=power) for moment in moments)


def finite(x: NDArray[Any], layer: Layer, source: str) -> NDArray[Any]:
    """`x`, if it is.

    Raises:
        SparsecError: it is not; the message names the layer.
    """
    if not np.isfinite(x).all():
        raise SparsecError(
            f"calibration data '{source}': the input of layer '{layer.name}' has NaN or infinite values; "
            "check the data with the dense model"
        )
    return x
