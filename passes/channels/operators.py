"""What each operator does to the channels along its inputs' axes: `RULES`, one rule an operator.

A rule ties axes that must keep one order, freezes those whose order matters, keeps those whole that something works
across (but for products with weights, whose columns can be left out), and returns its output's axes. An operator
without a rule, or with an output that the rule does not speak of, freezes all it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from .axes import Axis, cut, extent, fixed, free, freeze, keep_whole, merge, repeated, reshape, tie
from .constants import small_constant
from .recurrent import recurrent

if TYPE_CHECKING:
    import onnx_ir

Axes: TypeAlias = list[Axis]
Size: TypeAlias = "int | str | None"  # a number, a name that the model gives, or unknown
Sizes: TypeAlias = "Sequence[Size] | None"  # None: even the number of axes is unknown


class UnknownError(Exception):
    """A rule cannot tell what happens to the channels; all that the node reads keeps its order."""


class Call:
    """A node as a rule sees it.

    Attributes:
        node: the node.
        inputs: the axes of the inputs that carry data, as many as `RULES` says; those left out at the end are absent.
        numbered: the same by the number of the input.
        given: the shapes of these inputs, as far as they are inferred.
        constant: of each of these inputs, whether it is made of initialisers only.
        result: the shape of the output.
    """

    def __init__(
        self, node: onnx_ir.Node, numbered: dict[int, Axes], given: list[Sizes], constant: list[bool], result: Sizes
    ) -> None:
        self.node, self.numbered, self.inputs = node, numbered, [*numbered.values()]
        self.given, self.constant, self.result = given, constant, result

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute that has the type of `default`, or `default`."""
        found = self.node.attributes.get(name)
        if found is None:
            return default
        if found.is_ref() or not isinstance(found.value, type(default)):
            raise UnknownError
        return found.value

    def integers(self, index: int, name: str = "") -> tuple[int, ...] | None:
        """Constant numbers from input number `index` or, in older opsets, the attribute `name`; None if left out."""
        if name in self.node.attributes:
            return tuple(self.attribute(name, ()))
        if index >= len(self.node.inputs) or self.node.inputs[index] is None:
            return None
        numbers = small_constant(self.node.inputs[index])
        if numbers is None or numbers.dtype.kind not in "iu":
            raise UnknownError
        return tuple(int(number) for number in numbers.ravel())

    @property
    def sizes(self) -> list[int | None]:
        """The output's sizes as numbers."""
        if self.result is None:
            raise UnknownError
        return [size if isinstance(size, int) else None for size in self.result]


def position(axis: int, rank: int) -> int:
    """A possibly negative number of an axis as one from the front."""
    if not -rank <= axis < rank:
        raise UnknownError
    return axis % rank


# ---- One place of the output for one of the input ----


def keep(call: Call) -> Axes:
    """Element by element."""
    return call.inputs[0]


def softmax(call: Call) -> Axes:
    """Softmax, LogSoftmax: along an axis, or before opset 13 from it on, whatever its order."""
    x = call.inputs[0]
    axis = call.attribute("axis", 1)
    keep_whole(*x[position(axis, len(x)) :])
    return x


def broadcast(call: Call) -> Axes:
    """Element by element, of several inputs."""
    return _broadcast(call.inputs)


def _broadcast(inputs: Sequence[Axes]) -> Axes:
    rank = max(len(axes) for axes in inputs)
    result = []
    for place in range(rank):
        here = [axes[place - rank + len(axes)] for axes in inputs if place >= rank - len(axes)]
        wide = [axis for axis in here if extent(axis) != 1]
        for axis in wide[1:]:
            tie(wide[0], axis)
        known = [axis for axis in wide if extent(axis) is not None]
        result.append((known or wide or here)[0])
    return result


def normalise(call: Call) -> Axes:
    """LayerNormalization: the mean over axes has no order, scale and bias lie along them."""
    x = call.inputs[0]
    keep_whole(*x[position(call.attribute("axis", -1), len(x)) :])
    return _broadcast(call.inputs)


def by_channel(call: Call) -> Axes:
    """BatchNormalization, InstanceNormalization: every parameter has one value a channel."""
    x, *parameters = call.inputs
    if len(x) < 2 or call.attribute("training_mode", 0) or any(len(axes) != 1 for axes in parameters):
        raise UnknownError
    for (axis,) in parameters:
        tie(x[1], axis)
    return x


# ---- Products ----


def matmul(call: Call) -> Axes:
    """[.., m, k] by [.., k, n]."""
    a, b = call.inputs
    if len(a) < 2 or len(b) < 2:
        raise UnknownError
    _contract(call, a[-1], b[-2])
    return [*_batch(a, b), a[-2], b[-1]]


def _contract(call: Call, x: Axis, weight: Axis) -> None:
    """Sum over two axes. Channels can be left out of it where one side is a weight: as if that were zero there."""
    tie(x, weight)
    if not any(call.constant[:2]):
        keep_whole(x)


def _batch(a: Axes, b: Axes) -> Axes:
    return _broadcast([a[:-2], b[:-2]]) if len(a) > 2 or len(b) > 2 else []


def gemm(call: Call) -> Axes:
    """A' B' + C."""
    a, b = call.inputs[:2]
    if len(a) != 2 or len(b) != 2:
        raise UnknownError
    a = a[::-1] if call.attribute("transA", 0) else a
    b = b[::-1] if call.attribute("transB", 0) else b
    _contract(call, a[1], b[0])
    return _broadcast([[a[0], b[1]], *call.inputs[2:]])


def conv(call: Call) -> Axes:
    """One group, or several, which then move whole."""
    x, weight, *bias = call.inputs
    group = call.attribute("group", 1)
    if len(x) < 3 or len(weight) != len(x) or any(len(axes) != 1 for axes in bias):
        raise UnknownError
    channels, outputs = extent(x[1]), extent(weight[0])
    if group == 1:
        _contract(call, x[1], weight[1])
    elif channels and outputs and channels == group * (extent(weight[1]) or 0) and outputs % group == 0:
        groups = free(group)
        tie(repeated(groups, channels // group), x[1])
        tie(repeated(groups, outputs // group), weight[0])
        freeze(weight[1])
    else:
        raise UnknownError
    for (axis,) in bias:
        tie(weight[0], axis)
    return _spatial(call, x[0], weight[0], frozen=[*x[2:], *weight[2:]])


def conv_transpose(call: Call) -> Axes:
    """One group; the weight is [in, out, ..]."""
    x, weight, *bias = call.inputs
    if len(x) < 3 or len(weight) != len(x) or call.attribute("group", 1) != 1 or any(len(axes) != 1 for axes in bias):
        raise UnknownError
    _contract(call, x[1], weight[0])
    for (axis,) in bias:
        tie(weight[1], axis)
    return _spatial(call, x[0], weight[1], frozen=[*x[2:], *weight[2:]])


def pool(call: Call) -> Axes:
    """Along [N, C, ..] everything but N and C."""
    x = call.inputs[0]
    if len(x) < 3:
        raise UnknownError
    return _spatial(call, x[0], x[1], frozen=x[2:])


def _spatial(call: Call, batch: Axis, channels: Axis, frozen: Axes) -> Axes:
    """[N, C, ..] with new spatial axes."""
    freeze(*frozen)
    rank = len(call.inputs[0])
    sizes = call.sizes if call.result is not None and len(call.result) == rank else [None] * rank
    return [batch, channels, *(fixed(size) for size in sizes[2:])]


def global_pool(call: Call) -> Axes:
    """Every spatial axis to one place."""
    x = call.inputs[0]
    return [*x[:2], *(fixed(1) for _ in x[2:])]


def reduce(call: Call) -> Axes:
    """Over some axes, in whatever order."""
    x = call.inputs[0]
    axes = call.integers(1, "axes")
    if not axes and call.attribute("noop_with_empty_axes", 0):
        return x
    gone = {position(axis, len(x)) for axis in axes or range(len(x))}
    keep_whole(*(x[i] for i in gone))
    if call.attribute("keepdims", 1):
        return [fixed(1) if i in gone else axis for i, axis in enumerate(x)]
    return [axis for i, axis in enumerate(x) if i not in gone]


# ---- Axes moved, split and joined ----


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
    if small_constant(call.node.inputs[1]) is None and call.sizes[same:].count(None) > 1:
        keep_whole(*x)  # no constant could say the new shape
    return [*x[:same], *reshape(x[same:], call.sizes[same:])]


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
    if small_constant(call.node.inputs[1]) is None:
        keep_whole(*result)
    return result


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
        indices = small_constant(node.inputs[1]) if node.op_type == "Gather" and index == 0 else None
        if indices is None or any(not -len(axes) <= i < len(axes) for i in indices.ravel()):
            return set(axes)
        picked.update(axes[i] for i in indices.ravel())
    return picked


Rule: TypeAlias = "Callable[[Call], list[Axes]]"  # the axes of each output that it speaks of


def _first(rule: Callable[[Call], Axes]) -> Rule:
    return lambda call: [rule(call)]


_ANY = 1_000_000

_ONE = (
    "Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu HardSigmoid "
    "HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Sigmoid Sign Sin "
    "Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
_SEVERAL = (
    "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor"
)
_REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"

_OF_ONE_OUTPUT: dict[str, tuple[Callable[[Call], Axes], int]] = {
    **dict.fromkeys(_ONE.split(), (keep, 1)),
    **dict.fromkeys(_SEVERAL.split(), (broadcast, _ANY)),
    **{f"Reduce{name}": (reduce, 1) for name in _REDUCTIONS.split()},
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), (pool, 1)),
    **dict.fromkeys(("LogSoftmax", "Softmax"), (softmax, 1)),
    **dict.fromkeys(("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"), (global_pool, 1)),
    "BatchNormalization": (by_channel, 5),
    "Concat": (concat, _ANY),
    "Conv": (conv, 3),
    "ConvTranspose": (conv_transpose, 3),
    "Expand": (expand, 1),
    "Flatten": (flatten, 1),
    "Gather": (gather, 2),
    "Gemm": (gemm, 3),
    "InstanceNormalization": (by_channel, 3),
    "LayerNormalization": (normalise, 3),
    "MatMul": (matmul, 2),
    "Pad": (pad, 1),
    "RMSNormalization": (normalise, 2),
    "Reshape": (to_shape, 1),
    "Resize": (resize, 1),
    "Shape": (measure, 1),
    "Size": (measure, 1),
    "Slice": (slice_, 1),
    "Squeeze": (squeeze, 1),
    "Transpose": (transpose, 1),
    "Unsqueeze": (unsqueeze, 1),
    "Upsample": (resize, 1),
}


def _recurrent(call: Call) -> list[Axes]:
    found = recurrent(call)
    if found is None:
        raise UnknownError
    return found


# Operators of which inputs may be left out in front of others.
GAPS = frozenset({"GRU", "LSTM", "RNN"})
# To each operator its rule, and how many of its inputs carry data; what it reads besides keeps its order.
RULES: dict[str, tuple[Rule, int]] = {
    **{name: (_first(rule), count) for name, (rule, count) in _OF_ONE_OUTPUT.items()},
    "Split": (split, 1),
    **dict.fromkeys(sorted(GAPS), (_recurrent, 8)),
}
