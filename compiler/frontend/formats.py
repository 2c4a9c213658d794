"""What a file that is not ONNX is, in words, from its first bytes."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable

_Test = Callable[[bytes], bool]


def _starts(*prefixes: bytes) -> _Test:
    return lambda data: data.startswith(prefixes)


def _at(offset: int, magic: bytes) -> _Test:
    return lambda data: data[offset : offset + len(magic)] == magic


def _is_text(data: bytes) -> bool:
    try:
        head = getincrementaldecoder("utf-8")().decode(data[:512])  # incremental: a cut character is no error
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in head)


FORMATS: tuple[tuple[_Test, str], ...] = (
    (_starts(b"version https://git-lfs"), "this is a Git LFS pointer, not the model. Run 'git lfs pull' beside it."),
    (
        _starts(b"PK\x03\x04"),
        "this is a zip archive, not ONNX. Unpack it; a PyTorch file (.pt, .pth) must be exported by torch.onnx.export.",
    ),
    (
        _starts(b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "this is a Python pickle, not ONNX. A PyTorch file must be exported by torch.onnx.export.",
    ),
    (_starts(b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), "this file is compressed. Unpack it first."),
    (_starts(b"\x89HDF"), "this is an HDF5 file, not ONNX. A Keras model must be exported with tf2onnx."),
    (_starts(b"GGUF"), "this is a GGUF file, not ONNX. Export the model to ONNX from its original framework."),
    (_at(8, b'{"'), "this is a safetensors file: weights without a graph. Export the model to ONNX."),
    (_at(4, b"TFL3"), "this is a TensorFlow Lite file, not ONNX. Convert it with tf2onnx."),
    (_at(4, b"ORTM"), "this is an ONNX Runtime (.ort) file. Give the ONNX model that it was made from."),
    (
        lambda data: data.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")),
        "this is a web page, not ONNX; the download went wrong. Fetch the file itself.",
    ),
    (_is_text, "this is a text file, not ONNX. Give the binary .onnx file."),
)


def not_onnx(data: bytes) -> str:
    """A sentence for what `data` is, or "" where it could be ONNX."""
    return next((words for test, words in FORMATS if test(data)), "")
