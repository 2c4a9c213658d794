"""Vectors of integers in which some numbers are known: what exporters compute shapes by."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from .constants import small_constant

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir

# None for a number that is not known.
Partial: TypeAlias = "list[int | None]"

# Of a shape that torch.Tensor.expand computes seven nodes lie in a row. Nodes that are read twice are evaluated twice.
_MOST_NODES = 10
_MOST_NUMBERS = 64


def known_numbers(value: onnx_ir.Value | None, nodes: int = _MOST_NODES) -> Partial | None:
    """What `value`, a vector or a single number, is known to hold; None where not even its length is known."""
    constant = small_constant(value)
    if constant is not None:
        return [int(number) for number in constant.ravel()] if constant.dtype.kind in "iub" else None
    node = None if value is None else value.producer()
    if node is None or node.domain or nodes == 0 or node.op_type not in _OPERATORS:
        return None
    try:
        found = _OPERATORS[node.op_type](node, nodes - 1)
    except Exception:  # whatever a malformed node provokes: it is then nothing that is known
        return None
    return found if found is not None and len(found) <= _MOST_NUMBERS else None


def joined_numbers(value: onnx_ir.Value | None) -> Partial | None:
    """The numbers of a shape that is a constant, or joined of constants and of computed numbers, which are None."""
    found: Partial = []
    for piece in joined_pieces(value) or ():
        constant, numbers = small_constant(piece), known_numbers(piece)
        if numbers is None:
            return None
        found += [None] * len(numbers) if constant is None else numbers
    return found or None


def joined_pieces(value: onnx_ir.Value | None) -> list[onnx_ir.Value | None] | None:
    """What a shape is joined of, or the shape itself if it is a constant; None where it is neither."""
    if small_constant(value) is not None:
        return [value]
    node = None if value is None else value.producer()
    return None if node is None or node.domain or node.op_type != "Concat" else [*node.inputs]


def _concat(node: onnx_ir.Node, nodes: int) -> Partial | None:
    pieces = [known_numbers(piece, nodes) for piece in node.inputs]
    return None if any(piece is None for piece in pieces) else [number for piece in pieces for number in piece or ()]


def _one(node: onnx_ir.Node, nodes: int) -> Partial | None:
    """Unsqueeze of a single number."""
    maker = None if node.inputs[0] is None else node.inputs[0].producer()
    indices = None
    if maker is not None and not maker.domain and maker.op_type == "Gather":
        indices = small_constant(maker.inputs[1])
    return [None] if indices is not None and indices.ndim == 0 else known_numbers(node.inputs[0], nodes)


def _same(node: onnx_ir.Node, nodes: int) -> Partial | None:
    return known_numbers(node.inputs[0], nodes)


def _filled(node: onnx_ir.Node, nodes: int) -> Partial | None:
    length, found = known_numbers(node.inputs[0], nodes), node.attributes.get("value")
    if length is None or len(length) != 1 or length[0] is None or length[0] > _MOST_NUMBERS:
        return None
    content = 0 if found is None else found.as_tensor().numpy().item()
    return [int(content)] * length[0]


def _shape(node: onnx_ir.Node, nodes: int) -> Partial | None:
    """Of a vector, its length; of anything else so many unknown numbers as are asked for."""
    start, end = node.attributes.get("start"), node.attributes.get("end")
    if start is not None and end is not None and 0 <= start.value < end.value:
        return [None] * (end.value - start.value)
    inner = known_numbers(node.inputs[0], nodes) if start is None and end is None else None
    return None if inner is None else [len(inner)]


def _pairwise(rule: Callable[[int, int], int]) -> Callable[[onnx_ir.Node, int], Partial | None]:
    def evaluate(node: onnx_ir.Node, nodes: int) -> Partial | None:
        both = _together(node, nodes)
        if both is None:
            return None
        return [None if None in (a, b) else rule(a or 0, b or 0) for a, b in zip(*both, strict=True)]

    return evaluate


def _where(node: onnx_ir.Node, nodes: int) -> Partial | None:
    found = _together(node, nodes)
    if found is None:
        return None
    return [(a if c else b) if c is not None else (a if a == b else None) for c, a, b in zip(*found, strict=True)]


def _together(node: onnx_ir.Node, nodes: int) -> list[Partial] | None:
    """The inputs, single numbers as often as the others are long."""
    found = [known_numbers(value, nodes) for value in node.inputs]
    length = max((len(one) for one in found if one is not None), default=0)
    if any(one is None or len(one) not in (1, length) for one in found):
        return None
    return [one * length if len(one) < length else one for one in found if one is not None]


_OPERATORS: dict[str, Callable[[onnx_ir.Node, int], Partial | None]] = {
    "Cast": _same,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Equal": _pairwise(lambda a, b: int(a == b)),
    "Identity": _same,
    "Mul": _pairwise(lambda a, b: a * b),
    "Reshape": _same,
    "Shape": _shape,
    "Unsqueeze": _one,
    "Where": _where,
}
