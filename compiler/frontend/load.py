"""From a file, bytes or a `ModelProto` to an `onnx_ir.Model` that is whole: readable, acyclic, every value produced.

Nothing that can stand in a file may end in a Python traceback. What sparsec cannot carry through is refused here, in
words, rather than lost on the way.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx
import onnx_ir

from ...ir import SparsecError
from .external import check_external_data
from .formats import not_onnx
from .structure import check_structure
from .tensors import let_go_of_message
from .versions import check_versions

if TYPE_CHECKING:
    from collections.abc import Iterator

Source: TypeAlias = str | Path | bytes | onnx.ModelProto

EXPORT_AGAIN = "Export or download the model again."


def load(source: Source) -> tuple[onnx_ir.Model, Path | None]:
    """The model, and the file it came from (None for bytes and for a `ModelProto`).

    External data is mapped into memory when it is read, not copied. Of a `ModelProto` the tensors are shared, not
    copied, so it must not be changed while the model is in use.

    Raises:
        SparsecError: the source is missing, damaged, or not a model that can be compiled.
    """
    path = Path(source) if isinstance(source, (str, Path)) else None
    with naming(source):
        if isinstance(source, onnx.ModelProto):
            model = _to_model(source)
        else:
            model = _to_model(_parse(source if isinstance(source, bytes) else _bytes(Path(source))))
            let_go_of_message(model)
        check_structure(model)
        check_external_data(model, path)
    return model, path


@contextmanager
def naming(source: Source) -> Iterator[None]:
    """Put the file in front of the message of a `SparsecError` from inside."""
    if isinstance(source, (str, Path)):
        name = str(source)
    else:
        name = "the model given as bytes" if isinstance(source, bytes) else "the ModelProto"
    try:
        yield
    except SparsecError as error:
        # Names come from the file: a line break or a terminal's escape code in one must not reach the screen.
        message = "".join(char if char.isprintable() else repr(char)[1:-1] for char in f"{name}: {error}")
        raise type(error)(message) from None


def _bytes(path: Path) -> bytes:
    """The contents of the file at `path`."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SparsecError("there is no such file. Check the path.") from None
    except IsADirectoryError:
        inside = sorted(child.name for child in path.glob("*.onnx"))[:3]
        found = f"it holds {', '.join(inside)}" if inside else "it holds no .onnx file"
        raise SparsecError(f"this is a folder, not an ONNX file; {found}. Give the file itself.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SparsecError(f"the file cannot be read ({reason}). Check the path and its permissions.") from None


def _parse(data: bytes) -> onnx.ModelProto:
    """Bytes to a message, or the words for what they are instead."""
    if not data:
        raise SparsecError(f"the file is empty. {EXPORT_AGAIN}")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception:  # protobuf's DecodeError, which has no typed module to import it from
        guess = not_onnx(data)
        if guess:
            raise SparsecError(guess) from None
        raise SparsecError(
            f"this is not an ONNX model, or one that was cut off or damaged: its {len(data):,} bytes do not parse. "
            f"{EXPORT_AGAIN}"
        ) from None
    if not proto.HasField("ir_version") or not proto.HasField("graph"):
        missing = "graph" if proto.HasField("ir_version") else "IR version"
        raise SparsecError(not_onnx(data) or f"this is not an ONNX model: it has no {missing}. {EXPORT_AGAIN}")
    return proto


def _refuse_what_would_be_lost(proto: onnx.ModelProto) -> None:
    """onnx_ir drops these in silence; no exporter in use writes them."""
    if len(proto.training_info):
        raise SparsecError(
            "the model holds training information, which sparsec cannot carry through. Export it for inference."
        )
    for graph in _graphs(proto):
        if len(graph.sparse_initializer):
            name = graph.sparse_initializer[0].values.name
            raise SparsecError(
                f"graph '{graph.name}': the sparse initialiser '{name}' cannot be carried through. Store it as a "
                "dense initialiser, zeros included; sparsec finds the zeros."
            )


def _check_text(proto: onnx.ModelProto) -> None:
    """Refuse names that are no text: protobuf reads them without a word, as bytes, and will not write them."""
    pending: list[Any] = [proto]
    while pending:
        message = pending.pop()
        if isinstance(message, onnx.TensorProto):
            texts = [message.name, message.doc_string]  # not its fields: listing them would copy the data
        else:
            texts = []
            for field, value in message.ListFields():
                values = value if field.is_repeated else (value,)
                if field.type == field.TYPE_MESSAGE:
                    pending.extend(values)
                elif field.type == field.TYPE_STRING:
                    texts.extend(values)
        for text in texts:
            if not isinstance(text, str):
                raise SparsecError(f"the name {text!r} is not valid UTF-8; the file is damaged. {EXPORT_AGAIN}")


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every subgraph, those in functions too."""
    pending: list[onnx.GraphProto | onnx.FunctionProto] = [proto.graph, *proto.functions]
    while pending:
        graph = pending.pop()
        if isinstance(graph, onnx.GraphProto):
            yield graph
        for node in graph.node:
            for attribute in node.attribute:
                pending.extend(attribute.graphs)
                if attribute.HasField("g"):
                    pending.append(attribute.g)


def _to_model(proto: onnx.ModelProto) -> onnx_ir.Model:
    """The message as a graph of nodes and values."""
    _check_text(proto)
    check_versions(proto)
    _refuse_what_would_be_lost(proto)
    # onnx_ir logs what is wrong with a model; `check_structure` says it in an error, once.
    logging.getLogger("onnx_ir").addHandler(logging.NullHandler())
    try:
        model: onnx_ir.Model = onnx_ir.from_proto(proto)
    except Exception as error:
        # Whatever a damaged file provokes: of the chain of errors the innermost says what and the outermost where.
        cause: BaseException = error
        while deeper := cause.__cause__ or cause.__context__:
            cause = deeper
        words = (str(cause).strip() or type(cause).__name__).splitlines()[0].split(". ")[0][:300].rstrip(".")
        raise SparsecError(f"the model is not valid ONNX: {words}. {EXPORT_AGAIN}") from None
    # onnx_ir would add a value_info for each initialiser that has none; without a type and a shape it does not.
    described = {info.name for graph in _graphs(proto) for info in graph.value_info}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if not value.is_graph_input() and value.name not in described:
                value.type = value.shape = None
    return model
