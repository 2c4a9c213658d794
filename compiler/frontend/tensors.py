"""Every tensor that a model holds, and who holds it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import onnx
import onnx_ir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Smaller tensors stay messages: copying them costs less than an array's own overhead.
_LARGE = 4096


def held_tensors(
    model: onnx_ir.Model,
) -> Iterator[tuple[onnx_ir.TensorProtocol, Callable[[onnx_ir.TensorProtocol], None]]]:
    """Initialisers and tensor attributes at any depth, each with a function that puts another in its place."""
    roots = (model.graph, *(function.graph for function in model.functions.values()))
    for graph in (graph for root in roots for graph in (root, *root.subgraphs())):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value, partial(setattr, value, "const_value")
        for node in graph:
            for attribute in list(node.attributes.values()):
                if attribute.type == onnx_ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.as_tensor(), partial(_set_attribute, node, attribute)


def external_tensors(
    model: onnx_ir.Model,
) -> Iterator[tuple[onnx_ir.ExternalTensor, Callable[[onnx_ir.TensorProtocol], None]]]:
    """Those of the tensors whose data lies in other files."""
    for tensor, put in held_tensors(model):
        if isinstance(tensor, onnx_ir.ExternalTensor):
            yield tensor, put


def let_go_of_message(model: onnx_ir.Model) -> None:
    """Take the tensors out of the message that the model was read from, so that its memory can be freed.

    A tensor of a message keeps the whole of it alive, and each reading of it copies its bytes: a model and the arrays
    of its weights would be in memory twice.
    """
    for tensor, put in held_tensors(model):
        if isinstance(tensor, onnx_ir.TensorProtoTensor):
            put(_own(tensor))


def _own(tensor: onnx_ir.TensorProtoTensor) -> onnx_ir.TensorProtocol:
    """A large tensor as an array, any other as a message of its own; both are written out as `tensor` would be."""
    proto = tensor.raw
    plain = proto.HasField("raw_data") and not proto.HasField("data_location") and not proto.HasField("segment")
    if plain and proto.ByteSize() >= _LARGE:
        try:
            array = tensor.numpy()
            if tensor.dtype.bitwidth >= 8:  # smaller ones an array holds unpacked
                properties = dict(tensor.metadata_props) or None
                return onnx_ir.Tensor(
                    array, tensor.dtype, name=tensor.name, doc_string=tensor.doc_string, metadata_props=properties
                )
        except (ValueError, TypeError):
            pass  # bytes that do not fill the shape: an error where the tensor is read, if it ever is
    copy = onnx.TensorProto()
    copy.CopyFrom(proto)
    return onnx_ir.TensorProtoTensor(copy)


def _set_attribute(node: onnx_ir.Node, old: onnx_ir.Attr, tensor: onnx_ir.TensorProtocol) -> None:
    node.attributes.add(onnx_ir.AttrTensor(old.name, tensor, doc_string=old.doc_string))
