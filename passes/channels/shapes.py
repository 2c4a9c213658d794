"""Shapes of all values, by ONNX's inference and what it leaves open."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import onnx_ir
from onnx_ir.passes.common import ShapeInferencePass

from .partial import known_numbers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .call import Size, Sizes

# Each round lets what was found reach further; an encoder takes three.
_ROUNDS = 8


def infer_shapes(model: onnx_ir.Model) -> dict[str | None, Sizes]:
    """The shapes that can be known, by the values' names; names stand for sizes that are equal wherever they appear.

    ONNX's inference gives up on the -1 of a Reshape where other sizes have no number. Exporters write the heads of
    attention so: [batch, tokens, 384] to [batch, tokens, -1, 32] and back to [batch, tokens, -1].
    """
    copy = model.clone()  # which shares the tensors
    infer = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)
    for _ in range(_ROUNDS):
        infer(copy)
        found = [found for node in copy.graph for found in _missing(node)]
        for value, axis, size in found:
            assert value.shape is not None, "its other sizes are known"
            value.shape = onnx_ir.Shape([*value.shape[:axis], size, *value.shape[axis + 1 :]])
        if not found:
            break
    values = (*copy.graph.inputs, *(value for node in copy.graph for value in node.outputs))
    return {value.name: sizes for value in values if value.name and (sizes := _sizes(value)) is not None}


def _missing(node: onnx_ir.Node) -> Iterator[tuple[onnx_ir.Value, int, int]]:
    """Sizes that this node determines: a value, an axis, the number."""
    if node.domain not in ("", "ai.onnx") or not all(node.inputs[:2]) or len(node.inputs) < 2:
        return
    x, other, result = node.inputs[0], node.inputs[1], node.outputs[0]
    assert x is not None and other is not None
    given, sizes = _sizes(x), _sizes(result)
    if node.op_type == "Expand":
        yield from _stretched(node)
    if node.op_type == "Reshape" and given is not None and sizes is not None:
        same = 0
        while same < min(len(given), len(sizes)) and given[same] is not None and given[same] == sizes[same]:
            same += 1
        rest = [size for size in given[same:] if isinstance(size, int)]
        opened = [axis for axis in range(same, len(sizes)) if not isinstance(sizes[axis], int)]
        known = prod(size for size in sizes[same:] if isinstance(size, int))
        if len(opened) == 1 and len(rest) == len(given) - same and known and prod(rest) and not prod(rest) % known:
            yield result, opened[0], prod(rest) // known
    if node.op_type == "MatMul" and given and x.producer() is not None and not isinstance(given[-1], int):
        shape = _sizes(other) if other.const_value is None else list(other.const_value.shape.numpy())
        inner = shape[-2:][0] if shape else None
        if isinstance(inner, int):
            yield x, len(given) - 1, inner


def _stretched(node: onnx_ir.Node) -> Iterator[tuple[onnx_ir.Value, int, int]]:
    """Sizes of the result of Expand, by what is known of the shape."""
    x, result = node.inputs[0], node.outputs[0]
    given, sizes, wanted = None if x is None else _sizes(x), _sizes(result), known_numbers(node.inputs[1])
    if given is None or sizes is None or wanted is None:
        return
    rank = len(sizes)
    for axis, size in enumerate(sizes):
        old = given[axis - rank + len(given)] if axis >= rank - len(given) else 1
        new = wanted[axis - rank + len(wanted)] if axis >= rank - len(wanted) else 1
        if not isinstance(size, int) and isinstance(old, int) and new is not None and (old == 1 or new in (1, old)):
            yield result, axis, old if new == 1 else new


def _sizes(value: onnx_ir.Value) -> list[Size] | None:
    if value.shape is None:
        return None
    return [size if isinstance(size, int) else size.value for size in value.shape]
