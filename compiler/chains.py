"""Layers of integer products that follow each other hand over 8-bit codes instead of floats.

Y = SparseLinear(X)     X int8 inside         Q = QSparseLinear(X)    rounded to Z's grid at once
Z = SparseLinear(Y)     Y int8 inside   ->    Z = SparseLinear(Q)     read as it is
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..codegen.problem import INTEGERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..ir import Grid
    from .plan import Candidate


def chained(candidates: Mapping[str, Candidate]) -> dict[str, Candidate]:
    """`candidates`, all of which become sparse, with codes handed over wherever every reader takes them on one grid."""
    readers = {one.layer.nodes[0]: one for one in candidates.values()}
    result = dict(candidates)
    for name, one in candidates.items():
        value = one.layer.nodes[-1].outputs[0]
        following = [readers.get(node) for node, _ in value.uses()]
        grids = {_grid(reader, value) for reader in following}
        # A residual may have any shape that broadcasts, which only floats do.
        able = one.x in INTEGERS and not one.layer.epilogue.residual and not one.layer.transpose_y
        if not able or value.is_graph_output() or len(grids) != 1 or None in grids:
            continue
        result[name] = replace(result[name], y_grid=grids.pop())
        for reader in following:
            assert reader is not None, "None has no grid"
            result[reader.layer.name] = replace(result[reader.layer.name], x="uint8")
    return result


def _grid(reader: Candidate | None, value: object) -> Grid | None:
    """On which a reader takes `value` as codes; None for none."""
    if reader is None or reader.layer.x is not value or reader.layer.transpose_x or reader.x != "static":
        return None
    return reader.x_grid
