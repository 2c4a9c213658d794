"""What an operator's function is called with besides its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx_ir
import torch

from ...frontend.nodes import attribute

if TYPE_CHECKING:
    from collections.abc import Sequence

Tensor: TypeAlias = Any

_FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.DOUBLE)
_OTHERS = {
    onnx_ir.DataType.BOOL: torch.bool,
    onnx_ir.DataType.INT8: torch.int8,
    onnx_ir.DataType.INT16: torch.int16,
    onnx_ir.DataType.INT32: torch.int32,
    onnx_ir.DataType.INT64: torch.int64,
    onnx_ir.DataType.UINT8: torch.uint8,
}


@dataclass(frozen=True)
class Call:
    """A node, and the form in which it is computed.

    Attributes:
        node: whose attributes count.
        opset: of ONNX's own operators in the model.
        floats: the one type that floats of every width are computed in.
    """

    node: onnx_ir.Node
    opset: int
    floats: Any

    def get(self, name: str, default: Any) -> Any:
        """An attribute, or `default`, whose type it must have."""
        return attribute(self.node, name, default)

    def ints(self, name: str) -> list[int] | None:
        """A list of integers; None where the node does not say."""
        return list(self.get(name, ())) if name in self.node.attributes else None


def dtype_of(number: int, floats: Any) -> Any:
    """PyTorch's name for ONNX's type `number`; all floats are `floats`.

    Raises:
        TypeError: it has none.
    """
    kind = onnx_ir.DataType(number)
    if kind not in _FLOATS and kind not in _OTHERS:
        raise TypeError(f"there are no tensors of {kind.name}")
    return floats if kind in _FLOATS else _OTHERS[kind]


def tensor_of(constant: onnx_ir.TensorProtocol, floats: Any) -> Tensor:
    """A constant; all floats are `floats`.

    Raises:
        TypeError: its type is neither a number nor a boolean.
    """
    dtype, array = dtype_of(constant.dtype, floats), constant.numpy()
    if dtype is floats:  # PyTorch does not know NumPy's bfloat16
        array = array.astype("float64" if floats is torch.float64 else "float32")
    return torch.tensor(array, dtype=dtype)


Op: TypeAlias = Callable[..., Any]


def numbers(tensor: Tensor) -> list[int]:
    """A tensor of integers as a list: a shape, axes, pads."""
    found = tensor.reshape(-1).tolist()
    return [int(number) for number in found]


def axes_of(call: Call, tensor: Tensor | None, rank: int) -> list[int] | None:
    """Axes from the second input (of new opsets) or the attribute (of old ones), not negative; None for neither."""
    found: Sequence[int] | None = numbers(tensor) if tensor is not None else call.ints("axes")
    return None if found is None else [axis % rank for axis in found]
