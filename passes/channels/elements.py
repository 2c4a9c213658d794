"""One place of the output for one of the input: what that does to the channels along their axes."""

from __future__ import annotations

from collections.abc import Sequence

from .axes import extent, keep_whole, tie
from .call import Axes, Call, UnknownError, position


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
    return spread(call.inputs)


def spread(inputs: Sequence[Axes]) -> Axes:
    """The axes of what several inputs are broadcast to."""
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
    return spread(call.inputs)


def by_channel(call: Call) -> Axes:
    """BatchNormalization, InstanceNormalization: every parameter has one value a channel."""
    x, *parameters = call.inputs
    if len(x) < 2 or call.attribute("training_mode", 0) or any(len(axes) != 1 for axes in parameters):
        raise UnknownError
    for (axis,) in parameters:
        tie(x[1], axis)
    return x
