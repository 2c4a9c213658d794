"""Shapes of all values, by ONNX's inference and what it leaves open."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import onnx_ir
from onnx_ir.passes.common import ShapeInferencePass

from .constants import small_constant
from .partial import known_numbers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .call import Size, Sizes

# Each round lets what was found reach further; an encoder takes three.
_ROUNDS = 8
# From a shape that is asked for back to the one whose sizes it takes.
_MOST_NODES = 10
_MOST_SIZES = 64


def infer_shapes(model: onnx_ir.Model) -> dict[str | None, Sizes]:
    """The shapes that can be known, by the values' names; names stand for sizes that are equal wherever they appear.

    ONNX's inference gives up on the -1 of a Reshape where other sizes have no number. Exporters write the heads of
    attention so: [batch, tokens, 384] to [batch, tokens, -1, 32] and back to [batch, tokens, -1]. Before opset 14 it
    gives up on the whole of a Reshape to what is partly computed, even on the number of axes.
    """
    copy = model.clone()  # which shares the tensors
    infer = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)
    for _ in range(_ROUNDS):
        infer(copy)
        asked = [(value, sizes) for node in copy.graph for value, sizes in _asked(node)]
        for value, entries in asked:
            value.shape = onnx_ir.Shape(entries)
        found = [found for node in copy.graph for found in _missing(node)]
        for value, axis, size in found:
            assert value.shape is not None, "its other sizes are known"
            value.shape = onnx_ir.Shape([*value.shape[:axis], size, *value.shape[axis + 1 :]])
        if not found and not asked:
            break
    values = (*copy.graph.inputs, *(value for node in copy.graph for value in node.outputs))
    return {value.name: sizes for value in values if value.name and (sizes := _sizes(value)) is not None}


def _asked(node: onnx_ir.Node) -> Iterator[tuple[onnx_ir.Value, list[Size]]]:
    """The shape that a Reshape asks for, where nothing of it is known."""
    if node.op_type != "Reshape" or node.domain not in ("", "ai.onnx") or node.outputs[0].shape is not None:
        return
    entries = _entries(node.inputs[1], _MOST_NODES)
    if entries is not None:  # 0 copies a size, -1 is what is left
        yield node.outputs[0], [None if isinstance(size, int) and size <= 0 else size for size in entries]


def _entries(value: onnx_ir.Value | None, nodes: int) -> list[Size] | None:
    """A vector of sizes: numbers, names that Shape reads, None; None where not even its length is known."""
    found, sizes = _computed(value, nodes), None if value is None else _sizes(value)
    if found is not None or sizes is None or len(sizes) > 1:
        return found
    length = sizes[0] if sizes else 1
    return [None] * length if isinstance(length, int) and length <= _MOST_SIZES else None


def _computed(value: onnx_ir.Value | None, nodes: int) -> list[Size] | None:
    constant, node = small_constant(value), None if value is None else value.producer()
    if constant is not None:
        return [int(number) for number in constant.ravel()] if constant.dtype.kind in "iu" else None
    if node is None or node.domain not in ("", "ai.onnx") or nodes == 0 or node.inputs[0] is None:
        return None
    if node.op_type == "Shape":
        start, end = node.attributes.get("start"), node.attributes.get("end")
        sizes = _sizes(node.inputs[0])
        return sizes and sizes[0 if start is None else start.value : None if end is None else end.value]
    if node.op_type == "Concat":
        pieces = [_entries(piece, nodes - 1) for piece in node.inputs]
        return None if any(piece is None for piece in pieces) else [size for piece in pieces for size in piece or ()]
    inner = _entries(node.inputs[0], nodes - 1)
    if inner is None or node.op_type in ("Cast", "Identity", "Unsqueeze"):
        return inner
    numbers = [small_constant(number) for number in node.inputs[1:]]
    ranges = [int(array.item()) for array in numbers if array is not None and array.size == 1]
    if node.op_type == "Gather" and len(ranges) == 1 and -len(inner) <= ranges[0] < len(inner):
        return [inner[ranges[0]]]
    if node.op_type == "Slice" and len(ranges) == len(numbers) > 1 and ranges[2:] in ([], [0], [0, 1]):
        return inner[ranges[0] : ranges[1]]
    return None


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
