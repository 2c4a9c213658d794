"""Write a model into one file, a tensor at a time.

`SerializeToString` needs the model twice more in memory, as a message and as bytes. Here the message is made without
the weights, cut where they belong, and they are written between the halves: the same bytes, without the copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import onnx
import onnx_ir

if TYPE_CHECKING:
    from collections.abc import Iterator

# Field numbers of onnx.proto; a tag is the number, shifted, and 2 for "length-delimited".
_GRAPH, _INITIALIZER = 7, 5


def write_model(model: onnx_ir.Model, file: BinaryIO) -> None:
    """Write the bytes that `onnx_ir.to_proto(model).SerializeToString()` would give."""
    proto = onnx_ir.to_proto(_without_weights(model))
    graph = onnx.GraphProto()
    graph.CopyFrom(proto.graph)
    del graph.initializer[:]
    proto.ClearField("graph")
    before, after = _cut(proto, _GRAPH)
    graph_before, graph_after = _cut(graph, _INITIALIZER)
    # The length stands in front, so the tensors are serialised twice: time for memory.
    length = len(graph_before) + sum(len(_field(_INITIALIZER, data)) for data in _tensors(model)) + len(graph_after)
    file.write(before + _header(_GRAPH, length) + graph_before)
    for data in _tensors(model):
        file.write(_field(_INITIALIZER, data))
    file.write(graph_after + after)


def _without_weights(model: onnx_ir.Model) -> onnx_ir.Model:
    """A copy whose initialisers are empty."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        value.const_value = onnx_ir.Tensor(np.empty(0, np.float32), name=value.name)
    return copy


def _tensors(model: onnx_ir.Model) -> Iterator[bytes]:
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            yield onnx_ir.to_proto(value.const_value).SerializeToString()


def _cut(message: Any, number: int) -> tuple[bytes, bytes]:
    """The fields of `message` below `number`, and those from it on; protobuf writes them in this order."""
    before, after = type(message)(), type(message)()
    before.CopyFrom(message)
    after.CopyFrom(message)
    for field in message.DESCRIPTOR.fields:
        (after if field.number < number else before).ClearField(field.name)
    return before.SerializeToString(), after.SerializeToString()


def _field(number: int, data: bytes) -> bytes:
    return _header(number, len(data)) + data


def _header(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field; the length in groups of seven bits, the lowest first."""
    groups = [number << 3 | 2]
    while length > 0x7F:
        groups.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*groups, length])
