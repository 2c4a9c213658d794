"""A model as bytes or as files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir

from ...ir import SparsecError
from ..frontend.tensors import external_tensors, held_tensors
from .stream import write_model

if TYPE_CHECKING:
    import os

DATA_SUFFIX = ".data"
# A protobuf message ends at 2 GiB; the rest is room for nodes and names.
INLINE_LIMIT = 2**31 - 2**26
# A session reads larger models from a file, so that serialising makes no second and third copy of the weights.
SESSION_LIMIT = 2**28
# Tensors below this stay in the model's file: it then opens, with its shapes and scalars, without the data.
_EXTERNAL_FROM_BYTES = 1024
# Pages, so that a runtime that maps the file finds tensors aligned.
_ALIGNMENT = 4096

SessionSource = bytes | str


def save(model: onnx_ir.Model, path: str | os.PathLike[str]) -> None:
    """Write `model` to `path`; equal models give equal bytes.

    Weights go to `<path>.data` where the model came with external data or is too large for one file.

    Raises:
        SparsecError: the folder cannot be written to, or the disk is full.
    """
    outside = any(True for _ in external_tensors(model)) or _nbytes(model) > INLINE_LIMIT
    _write(model, Path(path), external=outside)


def session_source(model: onnx_ir.Model, folder: str | os.PathLike[str]) -> SessionSource:
    """What `onnxruntime.InferenceSession` opens: bytes, or for large models the path of a file written to `folder`.

    Raises:
        SparsecError: the folder cannot be written to, or the disk is full.
    """
    if _nbytes(model) <= SESSION_LIMIT and not any(True for _ in external_tensors(model)):
        data: bytes = onnx_ir.to_proto(model).SerializeToString()
        return data
    # A folder of its own: a session that is still open has its data mapped from the file that it was opened from.
    path = Path(tempfile.mkdtemp(dir=folder)) / "model.onnx"
    _write(model, path, external=True)
    return str(path)


def _write(model: onnx_ir.Model, path: Path, *, external: bool) -> None:
    try:
        if not external:
            with path.open("wb") as file:
                write_model(model, file)
            return
        onnx_ir.save(
            _with_small_tensors_inside(model),
            path,
            format="protobuf",
            external_data=path.name + DATA_SUFFIX,
            size_threshold_bytes=_EXTERNAL_FROM_BYTES,
            alignment=_ALIGNMENT,
            align_threshold=_EXTERNAL_FROM_BYTES,
        )
    except OSError as error:
        reason = error.strerror or str(error)
        raise SparsecError(f"{path} cannot be written ({reason}). Check its folder and the space there.") from None


def _with_small_tensors_inside(model: onnx_ir.Model) -> onnx_ir.Model:
    """`model`, or a copy in which small tensors and those of attributes lie in the model's file.

    onnx_ir moves initialisers only, and closes the file of a small tensor that it takes inside, which fails where a
    layer's weight is a view of that file.
    """
    initializers = {id(value.const_value) for graph in model.graphs() for value in graph.initializers.values()}

    def stays(tensor: onnx_ir.ExternalTensor) -> bool:
        return id(tensor) in initializers and tensor.nbytes > _EXTERNAL_FROM_BYTES

    if all(stays(tensor) for tensor, _ in external_tensors(model)):
        return model
    copy = model.clone()
    for tensor, put in external_tensors(copy):
        if not stays(tensor):
            put(onnx_ir.Tensor(tensor.numpy().copy(), name=tensor.name))
    return copy


def _nbytes(model: onnx_ir.Model) -> int:
    """The bytes of all tensors, as they would be written."""
    total = 0
    for tensor, _ in held_tensors(model):
        if isinstance(tensor, onnx_ir.TensorProtoTensor):
            total += tensor.raw.ByteSize()  # as numbers in fields a tensor can be larger than its data
        elif tensor.dtype != onnx_ir.DataType.STRING:
            total += tensor.nbytes
    return total
