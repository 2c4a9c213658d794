"""Layers of integer products that follow each other hand over 8-bit codes instead of floats.

    Y = SparseLinear(X)     X int8 inside         Q = QSparseLinear(X)    rounded to Z's grid at once
    Z = SparseLinear(Y)     Y int8 inside   ->    Z = SparseLinear(Q)     read as it is

The same where a model rounds Y itself, to signed codes: the operator's are these, shifted.

    Y = SparseLinear(X)
    C = QuantizeLinear(Y)                         Q = QSparseLinear(X)
    D = DequantizeLinear(C)                 ->    Z = SparseLinear(Q)
    Z = SparseLinear(D)     D int8 inside
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir

    from ..ir import Grid, Layer
    from .plan import Candidate


def chained(candidates: Mapping[str, Candidate]) -> dict[str, Candidate]:
    """`candidates`, all of which become sparse, with codes handed over wherever every reader takes them on one grid."""
    readers = {one.layer.nodes[0]: one for one in candidates.values()}
    result = dict(candidates)
    for name, one in candidates.items():
        values = _handed_over(one.layer)
        following = [(readers.get(node), value) for value in values for node, _ in value.uses()]
        grids = {_grid(reader, value, one.layer) for reader, value in following}
        # A residual may have any shape that broadcasts, which only floats do.
        able = one.x != "float" and not one.layer.epilogue.residual and not one.layer.transpose_y
        if not able or len(grids) != 1 or None in grids:
            continue
        result[name] = replace(result[name], y_grid=grids.pop())
        for reader, _ in following:
            assert reader is not None, "None has no grid"
            result[reader.layer.name] = replace(result[reader.layer.name], x="uint8")
    return result


def _handed_over(layer: Layer) -> list[onnx_ir.Value]:
    """What those that follow read: the layer's output, or what its signed codes are dequantised to; [] for neither."""
    output = layer.nodes[-1].outputs[0]
    values = [output]
    if layer.y_grid is not None and layer.y_codes is None:
        codes = next(iter(output.uses())).node.outputs[0]
        values = [node.outputs[0] for node, _ in codes.uses()]
        if codes.is_graph_output() or any(node.op_type != "DequantizeLinear" for node, _ in codes.uses()):
            return []
    return [] if any(value.is_graph_output() or not value.uses() for value in values) else values


def _grid(reader: Candidate | None, value: onnx_ir.Value, before: Layer) -> Grid | None:
    """On which a reader takes `value`, that the layer `before` makes, as codes; None for none."""
    if reader is None or reader.layer.x is not value or reader.layer.transpose_x or reader.x != "static":
        return None
    if before.y_grid is None:
        return reader.x_grid
    return before.y_grid if reader.layer.x_grid == before.y_grid else None
