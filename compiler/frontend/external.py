"""External data: every file of it is there, inside the model's folder, and long enough, before anything is read."""

from __future__ import annotations

from pathlib import Path

import onnx_ir

from ...ir import SparsecError
from .tensors import external_tensors

__all__ = ["check_external_data", "external_tensors"]

_COMPLETE = "Put the model's data files beside it, complete, as they were exported."


class _LinkedTensor(onnx_ir.ExternalTensor):
    """External data reached through a link that `_resolve` found to stay inside the allowed folders.

    onnx_ir refuses every hard link, and a symbolic link that leaves the folder, also where model and data are links
    into one folder, as in the Hugging Face cache. ONNX Runtime reads both.
    """

    __slots__ = ()

    def _check_path_containment(self) -> None:
        return


def check_external_data(model: onnx_ir.Model, path: Path | None) -> None:
    """Point external tensors at the folder of `path`, having checked each file and range.

    Raises:
        SparsecError: a file is missing, lies outside the folder, or ends before the data does.
    """
    for tensor, replace in external_tensors(model):
        if path is None:
            raise SparsecError(
                f"initialiser '{tensor.name}' lies in the external file '{tensor.location}', and a model without a "
                "path has no folder to look in. Give the path of the model's file."
            )
        folder = path.absolute().parent
        file = _resolve(tensor, folder, path.resolve().parent)
        _check_range(tensor, file)
        linked = file != folder / tensor.location or file.stat().st_nlink > 1
        replace(_in_folder(tensor, folder, _LinkedTensor if linked else onnx_ir.ExternalTensor))


def _in_folder(
    tensor: onnx_ir.ExternalTensor, folder: Path, kind: type[onnx_ir.ExternalTensor]
) -> onnx_ir.ExternalTensor:
    return kind(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props) or None,
        base_dir=folder,
    )


def _resolve(tensor: onnx_ir.ExternalTensor, folder: Path, real_folder: Path) -> Path:
    """The file that holds `tensor`, all links followed."""
    where = f"external data of initialiser '{tensor.name}': '{tensor.location}'"
    location = Path(tensor.location)
    if not location.name:
        raise SparsecError(f"{where} names no file. {_COMPLETE}")
    try:
        file = (folder / location).resolve()
        inside = not location.is_absolute() and ".." not in location.parts
        if not inside or not any(root in file.parents for root in (folder.resolve(), real_folder)):
            raise SparsecError(
                f"{where} leads out of the model's folder. If you trust the model, put the data beside it and save "
                "it again with onnx.save_model."
            )
        if file.is_symlink():  # before Python 3.13 resolve() says so
            raise OSError("a loop of links")
        if not file.is_file():
            raise SparsecError(f"{where} is missing from {folder}. {_COMPLETE}")
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a name too long, a null character
        raise SparsecError(f"{where} cannot be read ({error}). {_COMPLETE}") from None
    return file


def _check_range(tensor: onnx_ir.ExternalTensor, file: Path) -> None:
    """The tensor's bytes are all inside `file`, and as many as its shape needs."""
    where = f"external data of initialiser '{tensor.name}' in {file.name}"
    try:
        offset, needed, size = tensor.offset or 0, tensor.nbytes, file.stat().st_size
    except (TypeError, ValueError, OSError) as error:  # a type without a size
        raise SparsecError(f"{where} cannot be read ({error}). {_COMPLETE}") from None
    if tensor.length is not None and tensor.length != needed:
        raise SparsecError(
            f"{where}: {tensor.length:,} bytes are named, but shape {tensor.shape} of {tensor.dtype} needs {needed:,}. "
            f"{_COMPLETE}"
        )
    if offset < 0 or needed < 0 or offset + needed > size:
        raise SparsecError(
            f"{where}: bytes {offset:,} to {offset + needed:,} are expected, the file has only {size:,}. {_COMPLETE}"
        )
