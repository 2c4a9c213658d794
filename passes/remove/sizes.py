"""Numbers of channels that nodes name: shapes of Reshape and Expand, edges of Slice and Split, groups, hidden sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from ..channels.axes import extent
from ..channels.constants import small_constant
from ..channels.dimensions import OVERRIDABLE_FROM_IR
from ..channels.partial import joined_numbers, joined_pieces, known_numbers
from .masks import axis_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..channels.axes import Axis
    from ..channels.call import Axes
    from .masks import Keep


class Resizing:
    """A node, and what stays along the axes of the values around it.

    Attributes:
        old: the node as it came, whose constants are read.
        node: its copy, which is changed.
        model: the copy's.
        inputs, outputs: the axes of what it reads and makes; none where their number is unknown.
        read, made: of each of these axes which places stay; None where all do.
    """

    def __init__(
        self,
        old: onnx_ir.Node,
        node: onnx_ir.Node,
        model: onnx_ir.Model,
        axes: Mapping[onnx_ir.Value, Axes | None],
        keep: Keep,
    ) -> None:
        self.old, self.node, self.model = old, node, model
        self.inputs: list[Axes] = [axes.get(value) or [] if value is not None else [] for value in old.inputs]
        self.outputs: list[Axes] = [axes.get(value) or [] for value in old.outputs]
        self.read, self.made = (
            [[axis_mask(axis, keep) for axis in one] for one in side] for side in (self.inputs, self.outputs)
        )

    @property
    def changes(self) -> bool:
        """Whether anything goes around the node."""
        return any(mask is not None for masks in (*self.read, *self.made) for mask in masks)

    def integer(self, name: str, default: int) -> int:
        """An attribute."""
        found = self.old.attributes.get(name)
        return default if found is None else int(found.value)

    def numbers(self, index: int, name: str = "") -> list[int] | None:
        """Constant numbers from input number `index` or, in older opsets, the attribute `name`; None without any."""
        if name in self.old.attributes:
            return [int(number) for number in self.old.attributes[name].value]
        found = small_constant(self.old.inputs[index]) if index < len(self.old.inputs) else None
        return None if found is None else [int(number) for number in found.ravel()]

    def set_numbers(self, index: int, name: str, numbers: Sequence[int]) -> None:
        """Put `numbers` where these were, or would be: an attribute or a new initialiser."""
        opset = self.model.graph.opset_imports.get("", 0)
        if name in self.old.attributes or (name and opset < _INPUTS_SINCE[self.old.op_type]):
            self.node.attributes[name] = onnx_ir.AttrInt64s(name, numbers)
            return
        old = small_constant(self.old.inputs[index]) if index < len(self.old.inputs) else None
        self.set_input(index, self.constant(np.array(numbers, np.int64 if old is None else old.dtype)))

    def set_input(self, index: int, value: onnx_ir.Value) -> None:
        """Read `value`; what was read there goes, if nobody else reads it."""
        if index >= len(self.node.inputs):
            self.node.resize_inputs(index + 1)
        before = self.node.inputs[index]
        self.node.replace_input_with(index, value)
        _drop_if_unused(before)

    def constant(self, array: NDArray[Any]) -> onnx_ir.Value:
        """A new initialiser."""
        graph = self.model.graph
        value = onnx_ir.Value(name=self.unused())
        value.const_value = onnx_ir.Tensor(array, name=value.name)
        graph.register_initializer(value)
        if self.model.ir_version < OVERRIDABLE_FROM_IR:  # there an initialiser has to be a graph input too
            value.type = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype))
            value.shape = onnx_ir.Shape(array.shape)
            graph.inputs.append(value)
        return value

    def unused(self) -> str:
        """A name for a new value."""
        return _unused(f"{self.node.outputs[0].name}.sizes", self.model.graph)


def resize(
    old: onnx_ir.Node,
    node: onnx_ir.Node,
    model: onnx_ir.Model,
    axes: Mapping[onnx_ir.Value, Axes | None],
    keep: Keep,
) -> None:
    """Change the numbers in `node`, a copy of `old`, to those of the channels that stay.

    Args:
        old: the node whose values `axes` knows.
        node: its copy.
        model: the copy's.
        axes: as `find_channels` has them.
        keep: of the segments from which channels go, which stay.
    """
    rule = _RULES.get(old.op_type) if old.domain == "" else None
    if rule is None:
        return
    resizing = Resizing(old, node, model, axes, keep)
    if resizing.changes:
        rule(resizing)


def _reshape(found: Resizing) -> None:
    """Where the shape is computed: as many leading axes as stay what they are, then numbers, one of them unknown."""
    x, result = found.inputs[0], found.outputs[0]
    numbers, wanted = found.numbers(1), [_size(*pair) for pair in zip(result, found.made[0], strict=True)]
    if numbers is None:
        entries = joined_numbers(found.old.inputs[1])
        entries = entries if entries and len(entries) == len(result) else None
        if entries and all(entry == -1 for entry, mask in zip(entries, found.made[0], strict=True) if mask is not None):
            return  # what is left of the elements is right as it is
        same = next((i for i, axis in enumerate(result) if i >= len(x) or axis is not x[i]), len(result))
        if wanted[same:].count(None) > 1:
            _join(found, 1)
            return
        found.node.attributes.pop("allowzero", None)
        new = [0] * same + [-1 if size is None else size for size in wanted[same:]]
    else:
        read = [_size(*pair) for pair in zip(x, found.read[0], strict=True)]
        # A zero copies the size of what is read.
        copied = [read[i] if number == 0 and i < len(read) else number for i, number in enumerate(numbers)]
        new = [
            number if number == -1 or size is None or copy == size else size
            for number, copy, size in zip(numbers, copied, wanted, strict=True)
        ]
    if new != numbers:
        found.set_numbers(1, "", new)


def _join(found: Resizing, index: int) -> None:
    """Other numbers in the shape that is input number `index`.

    Those that are computed stay. So do -1, which is what is left, and 1, which Expand stretches.
    """
    before, after = found.old.inputs[index], found.node.inputs[index]
    pieces, copies = joined_pieces(before), joined_pieces(after)
    lengths = [len(known_numbers(piece) or ()) for piece in pieces or ()]
    assert pieces and copies, "the analysis read it"
    # The shape that Expand reads may be shorter than what it makes.
    start = len(found.made[0]) - sum(lengths)
    changed = False
    for i, (old, length) in enumerate(zip(pieces, lengths, strict=True)):
        numbers, stop = small_constant(old), start + length
        if numbers is not None:
            places = zip(found.outputs[0][start:stop], found.made[0][start:stop], numbers.ravel().tolist(), strict=True)
            new = [number if mask is None or number in (-1, 1) else _size(axis, mask) for axis, mask, number in places]
            if new != numbers.ravel().tolist():
                copies[i], changed = found.constant(np.array(new, numbers.dtype)), True
        start = stop
    if not changed:
        return
    shape = copies[0]
    if small_constant(before) is None:
        node = onnx_ir.node("Concat", copies, {"axis": 0}, name=found.unused())
        shape = node.outputs[0]
        shape.name = found.unused()
        found.model.graph.insert_before(found.node, node)
    assert shape is not None, "a number has changed"
    found.set_input(index, shape)


def _expand(found: Resizing) -> None:
    _join(found, 1)


def _fill(found: Resizing) -> None:
    _join(found, 0)


def _slice(found: Resizing) -> None:
    starts, ends = found.numbers(1, "starts") or [], found.numbers(2, "ends") or []
    axes = found.numbers(3, "axes") or range(len(starts))
    rank = len(found.inputs[0])
    for k, axis in enumerate(axes):
        mask = found.read[0][axis % rank]
        if mask is not None:
            start, end, _ = slice(starts[k], ends[k]).indices(len(mask))
            starts[k], ends[k] = int(mask[:start].sum()), int(mask[: max(start, end)].sum())
    found.set_numbers(1, "starts", starts)
    found.set_numbers(2, "ends", ends)


def _split(found: Resizing) -> None:
    axis = found.integer("axis", 0) % len(found.inputs[0])
    sizes = [_size(axes[axis], masks[axis]) for axes, masks in zip(found.outputs, found.made, strict=True)]
    if found.read[0][axis] is None or (found.numbers(1, "split") is None and len(set(sizes)) == 1):
        return
    found.node.attributes.pop("num_outputs", None)
    found.set_numbers(1, "split", [size or 0 for size in sizes])


def _pad(found: Resizing) -> None:
    pads = found.numbers(1, "pads") or []
    axes = found.numbers(3) or range(len(found.inputs[0]))
    for k, axis in enumerate(axes):
        mask, after = found.made[0][axis % len(found.inputs[0])], k + len(pads) // 2
        if mask is not None:
            stay = int(mask[: pads[k]].sum()), int(mask[len(mask) - pads[after] :].sum())
            pads[k], pads[after] = stay
    found.set_numbers(1, "pads", pads)


def _conv(found: Resizing) -> None:
    mask, channels = found.read[0][1], extent(found.inputs[1][1])
    if mask is not None and channels and found.integer("group", 1) > 1:
        found.node.attributes["group"] = onnx_ir.AttrInt64("group", int(mask.sum()) // channels)


def _recurrent(found: Resizing) -> None:
    mask = found.read[2][2]
    if mask is not None:
        found.node.attributes["hidden_size"] = onnx_ir.AttrInt64("hidden_size", int(mask.sum()))


def _size(axis: Axis, mask: NDArray[np.bool_] | None) -> int | None:
    """Places that stay; None where their number is unknown."""
    size = extent(axis)
    return size if mask is None or size is None else int(mask.sum())


def _unused(name: str, graph: onnx_ir.Graph) -> str:
    """`name`, or with the first free number behind it."""
    taken = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
    taken |= {*graph.initializers}
    return next(text for k in count() if (text := f"{name}.{k}" if k else name) not in taken)


def _drop_if_unused(value: onnx_ir.Value | None) -> None:
    """Remove an initialiser, or a node and what only it read, that nobody reads any more."""
    if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    node, graph = value.producer(), value.graph
    if node is None:
        if graph is not None and value.name is not None:
            graph.initializers.pop(value.name, None)
    elif len(node.outputs) == 1 and node.graph is not None:
        sources = [*node.inputs]
        node.graph.remove(node, safe=True)
        for source in sources:
            _drop_if_unused(source)


_RULES: Mapping[str, Callable[[Resizing], None]] = {
    "ConstantOfShape": _fill,
    "Conv": _conv,
    "Expand": _expand,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
}
# The opset in which what were attributes became inputs.
_INPUTS_SINCE = {"Pad": 11, "Slice": 10, "Split": 13}
