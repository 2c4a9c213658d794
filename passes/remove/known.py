"""What channels are whatever the model reads: constants, followed from the initialisers through the nodes.

    A[2] = 0, b[2] = -1
    h = Gemm<transB=1>(x, A, b)           h[:, 2] = -1
    r = Relu(h)                     ->    r[:, 2] = 0
    s = Add(r, x)                         nothing is known of s

Known of a channel is the one number that all elements are which belong to it. Each operator has a rule that proves it
of what it makes (proofs.py); one without a rule proves nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..channels.axes import leaves
from ..channels.constants import small_constant
from ..channels.dimensions import OVERRIDABLE_FROM_IR
from .masks import axis_mask
from .proofs import PROOFS

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from ...ir import Program
    from ..channels import Channels
    from ..channels.axes import Axis, Segment
    from .masks import Keep

    # One number a channel; NaN where it is not known.
    Numbers: TypeAlias = NDArray[np.float64]
    # A value, and the number of one of its axes from the right: -1 is the last.
    Along: TypeAlias = tuple[onnx_ir.Value, int]


class Known:
    """What is known of the channels along each axis of each value."""

    def __init__(self, program: Program, channels: Channels, segments: Collection[Segment], keep: Keep) -> None:
        """Follow the constants through the main graph.

        Args:
            program: whose graph it is.
            channels: of that program.
            segments: of which something is asked.
            keep: of those from which channels go, which stay: what goes is not looked at.
        """
        self._model, self._channels, self._segments = program.model, channels, segments
        self._found: dict[tuple[Along, Segment], Numbers] = {}
        for value in self._model.graph.initializers.values():
            if (tensor := self.constant(value)) is not None:
                axes = channels.axes.get(value) or []
                for along, segment in self._places(value):
                    self._found[along, segment] = common_numbers(tensor, axes, along[1], segment, keep)
        for node in self._model.graph:
            proof = PROOFS.get(node.op_type)
            if proof is None or node.domain != "":
                continue
            for value in node.outputs:
                for along, segment in self._places(value):
                    with np.errstate(all="ignore"):
                        numbers = np.asarray(proof(self, node, along, segment))
                    if not np.isnan(numbers).all():
                        self._found[along, segment] = np.broadcast_to(numbers, (segment.size or 0,))

    def get(self, along: Along, segment: Segment) -> Numbers:
        """[channels] float64 of a segment along an axis; NaN where nothing is known."""
        found = self._found.get((along, segment))
        return np.full(segment.size or 0, np.nan) if found is None else found

    def is_zero(self, along: Along, segment: Segment) -> NDArray[np.bool_]:
        """[channels] which are known to be zero."""
        return np.equal(self.get(along, segment), 0)

    def operand(self, value: onnx_ir.Value, axis: int, segment: Segment) -> Numbers | float:
        """The same of a value that is broadcast, if need be."""
        if segment in self.segments((value, axis)):
            return self.get((value, axis), segment)
        tensor = self.constant(value)
        array = small_constant(value) if tensor is None else tensor.numpy()
        uniform = array is not None and array.size > 0 and (array == array.flat[0]).all()
        return float(array.flat[0]) if array is not None and uniform else np.nan

    def constant(self, value: onnx_ir.Value) -> onnx_ir.TensorProtocol | None:
        """The floats of an initialiser that no caller can replace; of other values None."""
        replaceable = value.is_graph_input() and self._model.ir_version >= OVERRIDABLE_FROM_IR
        tensor = None if replaceable or not value.is_initializer() else value.const_value
        return tensor if tensor is not None and tensor.dtype.is_floating_point() else None

    def home(self, value: onnx_ir.Value, segment: Segment) -> Along | None:
        """The one axis along which the segment lies; None where it lies along none, or several."""
        found = [along for along, other in self._places(value) if other is segment]
        return found[0] if len(found) == 1 else None

    def segments(self, along: Along) -> set[Segment]:
        """Those of which something is asked along an axis; none where there is no such axis."""
        value, axis = along
        axes = self._channels.axes.get(value) or []
        return {s for s, _ in leaves(axes[axis]) if s in self._segments} if -len(axes) <= axis < 0 else set()

    def rank(self, value: onnx_ir.Value) -> int:
        """The number of axes; 0 where it is unknown."""
        return len(self._channels.axes.get(value) or [])

    def _places(self, value: onnx_ir.Value) -> Iterator[tuple[Along, Segment]]:
        for axis in range(-self.rank(value), 0):
            for segment in self.segments((value, axis)):
                yield (value, axis), segment


def common_numbers(
    tensor: onnx_ir.TensorProtocol, axes: Sequence[Axis], axis: int, segment: Segment, keep: Keep
) -> Numbers:
    """[channels] the one number that all elements of a channel are, NaN where they differ; zero where there are none.

    Args:
        tensor: of any type of floats.
        axes: of the tensor.
        axis: on which the segment lies, from the right.
        segment: whose channels are looked at.
        keep: which places of the other axes are looked at, as far as it says.
    """
    array, own = tensor.numpy(), axis % len(axes)
    for i, other in enumerate(axes):
        mask = axis_mask(other, keep) if i != own else None
        if mask is not None:
            array = np.compress(mask, array, axis=i)
    array, found, start = np.moveaxis(array, own, 0), [], 0
    for one, repeat in leaves(axes[own]):
        places = (one.size or 0) * repeat
        if one is segment:
            found.append(array[start : start + places].reshape(one.size or 0, -1 if array.size else 0))
        start += places
    elements = np.concatenate(found, axis=1)
    if not elements.size:
        return np.zeros(len(elements))
    same = (elements == elements[:, :1]).all(axis=1)
    return np.where(same, elements[:, 0].astype(np.float64), np.nan)
