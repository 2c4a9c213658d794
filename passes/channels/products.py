"""Products, pools and sums: what they do to the channels along their inputs' axes."""

from __future__ import annotations

from .axes import Axis, extent, fixed, free, freeze, keep_whole, repeated, tie
from .call import Axes, Call, UnknownError, position
from .elements import spread


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
    return spread([a[:-2], b[:-2]]) if len(a) > 2 or len(b) > 2 else []


def gemm(call: Call) -> Axes:
    """A' B' + C."""
    a, b = call.inputs[:2]
    if len(a) != 2 or len(b) != 2:
        raise UnknownError
    a = a[::-1] if call.attribute("transA", 0) else a
    b = b[::-1] if call.attribute("transB", 0) else b
    _contract(call, a[1], b[0])
    return spread([[a[0], b[1]], *call.inputs[2:]])


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
