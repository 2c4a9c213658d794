"""Channels in another order, so that what matters lies in the same blocks; folded into the weights around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...ir import Program, parse_pattern
from ...passes.channels import find_dimensions
from ...passes.permute import kept, reorder, search_all
from ..frontend.find import find_layers

if TYPE_CHECKING:
    from collections.abc import Collection

    from ...ir import Layer
    from .gather import Calibration

# What blocks keep must grow by this share; less is not worth another order of the weights.
LEAST_GAIN = 0.01


def reordered(
    program: Program, layers: Collection[Layer], calibration: Calibration, pattern: str, density: float
) -> tuple[Program, float, float] | None:
    """The same function with channels reordered wherever all that reads and writes them can follow.

    Args:
        program: what was read; it is not changed.
        layers: those that will be pruned.
        calibration: whose input norms weigh the weights, as Wanda does.
        pattern: of the blocks.
        density: that they will have.

    Returns:
        The program, and which share of the saliency Σ w² E[x²] blocks keep at that density before and after; None
        where nothing can be reordered or little is gained.
    """
    dimensions = find_dimensions(program)
    scores = {}
    for layer in layers:
        norms = [one.diagonal for one in calibration.statistics[layer.name]]
        rows = layer.out_features // len(norms)
        saliency = np.square(layer.weight, dtype=np.float64) * np.repeat(norms, rows, axis=0)
        # Every layer counts the same, whatever the size of its outputs.
        scores[layer.name] = saliency / max(float(saliency.sum()), np.finfo(np.float64).tiny)
    touched = [d for d in dimensions if any(place.name in scores for place in (*d.rows, *d.columns))]
    block = parse_pattern(pattern)
    if not touched:
        return None
    orders = search_all(touched, scores, block, density)
    before, after = kept({}, scores, block, density), kept(orders, scores, block, density)
    if after < before * (1 + LEAST_GAIN):
        return None
    model = reorder(program.model, orders)
    return Program(model, find_layers(model), program.source), before / len(scores), after / len(scores)
