"""Axes that are moved, split and joined: what that does to the channels along them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from .axes import cut, extent, fixed, free, freeze, keep_whole, merge, reshape, tie
from .call import Axes, Call, UnknownError, position
from .constants import small_constant
from .partial import joined_numbers

if TYPE_CHECKING:
    import onnx_ir


def transpose(call: Call) -> Axes:
    """By `perm`, or in reverse."""
    x = call.inputs[0]
    perm = call.attribute("perm", tuple(range(len(x)))[::-1])
    if sorted(perm) != list(range(len(x))):
        raise UnknownError
    return [x[i] for i in perm]


def flatten(call: Call) -> Axes:
    """[.., ..] to two axes."""
    x = call.inputs[0]
    axis = call.attribute("axis", 1)
    axis = axis + len(x) if axis < 0 else axis
    if not 0 <= axis <= len(x):
        raise UnknownError
    return [merge(part) if part else fixed(1) for part in (x[:axis], x[axis:])]


def to_shape(call: Call) -> Axes:
    """Reshape: leading axes that stay, by their names too; the others by their sizes."""
    x, given, result = call.inputs[0], call.given[0], call.result
    if result is None:
        raise UnknownError
    same = 0
    if given is not None and len(given) == len(x):
        while same < min(len(x), len(result)) and given[same] is not None and given[same] == result[same]:
            same += 1
    moved = reshape(x[same:], call.sizes[same:])
    if call.sizes[same:].count(None) > 1:
        # No constant could say the new shape: what is computed has to go on being right.
        entries = joined_numbers(call.node.inputs[1])
        if entries is None or len(entries) != len(result):
            keep_whole(*x)
        else:
            keep_whole(*(axis for axis, entry in zip(moved, entries[same:], strict=True) if entry is None))
    return [*x[:same], *moved]


def squeeze(call: Call) -> Axes:
    """Without some axes of size 1."""
    x = call.inputs[0]
    axes = call.integers(1, "axes")
    if axes is None:
        if any(extent(axis) is None for axis in x):
            raise UnknownError
        keep_whole(*x)  # one that is left alone would go
        return [axis for axis in x if extent(axis) != 1]
    gone = {position(axis, len(x)) for axis in axes}
    return [axis for i, axis in enumerate(x) if i not in gone]


def unsqueeze(call: Call) -> Axes:
    """With some axes of size 1."""
    x, axes = list(call.inputs[0]), call.integers(1, "axes")
    if axes is None:
        raise UnknownError
    for i in sorted(position(axis, len(x) + len(axes)) for axis in axes):
        x.insert(i, fixed(1))
    return x


def expand(call: Call) -> Axes:
    """Stretch axes of size 1; their copies are all the same, and so free."""
    x, sizes = call.inputs[0], call.sizes
    if len(sizes) < len(x):
        raise UnknownError
    result = [fixed(size) if size is None else free(size) for size in sizes]
    for i, axis in enumerate(x, start=len(sizes) - len(x)):
        size = extent(axis)
        if size is None:
            result[i] = fixed(sizes[i])
        elif size != 1:
            result[i] = axis
    # Sizes that are computed have to go on being right.
    entries = joined_numbers(call.node.inputs[1])
    if entries is None or len(entries) > len(sizes):
        keep_whole(*result)
    else:
        computed = zip(result[len(sizes) - len(entries) :], entries, strict=True)
        keep_whole(*(axis for axis, entry in computed if entry is None))
    return result


def fill(call: Call) -> Axes:
    """ConstantOfShape: one number everywhere, and so free where a constant says how often."""
    entries = joined_numbers(call.node.inputs[0])
    if entries is None or any(entry is not None and entry < 0 for entry in entries):
        raise UnknownError
    freeze(*call.inputs[0])
    return [fixed(None) if entry is None else free(entry) for entry in entries]


def concat(call: Call) -> Axes:
    """Joined along one axis; along the others all have one order."""
    first = call.inputs[0]
    if any(len(axes) != len(first) for axes in call.inputs):
        raise UnknownError
    joined = position(call.attribute("axis", 1), len(first))
    for other in call.inputs[1:]:
        for i, axis in enumerate(other):
            if i != joined:
                tie(first[i], axis)
    return [
        tuple(part for axes in call.inputs for part in axes[i]) if i == joined else axis for i, axis in enumerate(first)
    ]


def split(call: Call) -> list[Axes]:
    """Of each output the axes."""
    x = call.inputs[0]
    i, count = position(call.attribute("axis", 0), len(x)), len(call.node.outputs)
    size, lengths = extent(x[i]), call.integers(1, "split")
    if size is None:
        raise UnknownError
    if lengths is None:
        each = -(-size // count)
        lengths = tuple(min(each, size - each * k) for k in range(count))
    if len(lengths) != count or sum(lengths) != size or min(lengths) < 0:
        raise UnknownError
    edges = [sum(lengths[:k]) for k in range(count + 1)]
    return [[*x[:i], cut(x[i], a, b), *x[i + 1 :]] for a, b in pairwise(edges)]


def slice_(call: Call) -> Axes:
    """A range of an axis is its channels; anything else freezes the axis."""
    x = list(call.inputs[0])
    starts, ends = (_tried(call, index, name) for index, name in ((1, "starts"), (2, "ends")))
    axes, steps = call.integers(3, "axes"), _tried(call, 4, "steps")
    if axes is None:
        if starts is None:
            raise UnknownError
        axes = tuple(range(len(starts)))
    if any(given is not None and len(given) != len(axes) for given in (starts, ends, steps or None)):
        raise UnknownError
    for k, axis in enumerate(axes):
        i = position(axis, len(x))
        size = extent(x[i])
        step = None if steps is None else steps[k] if steps else 1
        if starts is None or ends is None or step != 1 or size is None:
            freeze(x[i])
            x[i] = fixed(None if call.result is None else call.sizes[i])
        else:
            start, end, _ = slice(starts[k], ends[k]).indices(size)
            x[i] = cut(x[i], start, max(start, end))
    return x


def _tried(call: Call, index: int, name: str) -> tuple[int, ...] | None:
    """Constant numbers, () where they are left out, None where they are not constant."""
    try:
        return call.integers(index, name) or ()
    except UnknownError:
        return None


def pad(call: Call) -> Axes:
    """Along an axis of channels only with one constant, which is the same in whatever order."""
    x, pads, axes = list(call.inputs[0]), call.integers(1, "pads"), call.integers(3)
    if pads is None or len(pads) != 2 * len(axes or x):
        raise UnknownError
    constant = call.attribute("mode", "constant") == "constant"
    for i, before, after in zip(axes or range(len(x)), pads, pads[len(pads) // 2 :], strict=False):
        i = position(i, len(x))
        size = extent(x[i])
        if size is None or not constant or before < 0 or after < 0:
            if before or after:
                freeze(x[i])
                x[i] = fixed(None if size is None else size + before + after)
        else:
            x[i] = tuple(part for axis in (free(before), x[i], free(after)) if extent(axis) for part in axis)
    return x


def gather(call: Call) -> Axes:
    """By constant or computed indices along one axis, which keeps its order."""
    x, indices = call.inputs
    i = position(call.attribute("axis", 0), len(x))
    freeze(x[i], *indices)
    return [*x[:i], *indices, *x[i + 1 :]]


def resize(call: Call) -> Axes:
    """Axes that are scaled by 1 stay."""
    x = call.inputs[0]
    scales = small_constant(call.node.inputs[-1]) if len(call.node.inputs) in (2, 3) else None
    mode = call.attribute("coordinate_transformation_mode", "half_pixel")
    if scales is None or scales.size != len(x) or mode == "tf_crop_and_resize" or "axes" in call.node.attributes:
        raise UnknownError
    same = [scale == 1 for scale in scales.ravel()]
    freeze(*(axis for axis, stays in zip(x, same, strict=True) if not stays))
    sizes = call.sizes
    return [axis if stays else fixed(size) for axis, stays, size in zip(x, same, sizes, strict=True)]


def measure(call: Call) -> Axes:
    """Shape, Size: read no elements, but how many there are."""
    x = call.inputs[0]
    if call.node.op_type == "Size":
        keep_whole(*x)
        return []
    seen = range(len(x))[call.attribute("start", 0) : call.attribute("end", len(x))]
    keep_whole(*(x[i] for i in _picked(call.node.outputs[0], list(seen))))
    return [fixed(len(seen))]


def _picked(sizes: onnx_ir.Value, axes: list[int]) -> set[int]:
    """Of the axes whose sizes these are those that somebody looks at."""
    picked: set[int] = set(axes) if sizes.is_graph_output() else set()
    for node, index in sizes.uses():
        found = None if node.domain or index else _read_of(node, axes)
        if found is None:
            return set(axes)
        picked.update(found)
    return picked


def _read_of(node: onnx_ir.Node, axes: list[int]) -> list[int] | None:
    """What Gather or Slice takes of the sizes of these axes; None where that is not known."""
    if node.op_type == "Gather":
        indices = small_constant(node.inputs[1])
        if indices is None or any(not -len(axes) <= i < len(axes) for i in indices.ravel()):
            return None
        return [axes[i] for i in indices.ravel()]
    # Before opset 10 the numbers of Slice are attributes.
    numbers = [small_constant(value) for value in node.inputs[1:]]
    if node.op_type != "Slice" or len(numbers) < 2 or any(array is None or array.size != 1 for array in numbers):
        return None
    start, end, *rest = (int(array.item()) for array in numbers if array is not None)
    return axes[start:end] if rest in ([], [0], [0, 1], [-1], [-1, 1]) else None
