"""Reading nodes: their operator, their attributes, their tensors; what does not fit is said in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...ir import SparsecError
from .structure import node_label

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray


def attribute(node: onnx_ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute that has the type of `default`, or `default` where the node does not say.

    Raises:
        SparsecError: the attribute has another type.
    """
    found = node.attributes.get(name)
    if found is None:
        return default
    value = None if found.is_ref() else found.value
    if not isinstance(value, type(default)) or isinstance(value, bool):
        raise SparsecError(
            f"{node_label(node)}: attribute '{name}' is {found.type.name.lower()}, expected {type(default).__name__}. "
            "Export the model again."
        )
    return value


def operand(node: onnx_ir.Node, index: int) -> onnx_ir.Value | None:
    """Input number `index`; None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def read_tensor(tensor: onnx_ir.TensorProtocol, name: str | None) -> NDArray[Any]:
    """The tensor as an array; external data is mapped, not copied.

    Raises:
        SparsecError: its bytes do not fit its shape and type.
    """
    try:
        array: NDArray[Any] = tensor.numpy()
    except Exception as error:  # every way in which bytes can fail to be an array
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SparsecError(
            f"tensor '{name}' of shape {list(tensor.shape)} cannot be read ({reason}). Export the model again."
        ) from None
    return array
