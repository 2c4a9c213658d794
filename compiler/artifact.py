"""The folder that a compilation leaves: written whole or not at all, loaded by one call."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir import SparsecError

if TYPE_CHECKING:
    import onnxruntime

MODEL = "model.onnx"
DATA = "model.onnx.data"
LIBRARY = "libsparsec_ops.so"
REPORT = "report.json"
MANIFEST = "manifest.json"
# Solved weights, for another budget or point of the frontier; nothing needs it, and it may be deleted.
SOLUTIONS = "cache"


def check_output(out: Path, force: bool) -> None:
    """Make sure, before any work, that `out` can be written.

    Raises:
        SparsecError: `out` exists and sparsec did not make it, or its folder cannot be written to.
    """
    if out.exists() and not force and not _is_ours(out):
        raise SparsecError(
            f"'{out}' exists and was not made by sparsec, so it is not replaced: choose another name, or say --force"
        )
    parent = out.absolute().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise SparsecError(f"'{out}' cannot be written: no permission to write to '{existing}'")


def _is_ours(out: Path) -> bool:
    """An empty folder, or one with a manifest of sparsec and nothing that sparsec does not write."""
    if not out.is_dir():
        return False
    names = {entry.name for entry in out.iterdir()}
    if not names:
        return True
    return names <= {MODEL, DATA, LIBRARY, REPORT, MANIFEST, SOLUTIONS} and "sparsec" in _manifest_or_empty(out)


def _manifest_or_empty(out: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def read_manifest(out: str | Path) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises:
        SparsecError: the folder is no artifact of sparsec.
    """
    manifest = _manifest_or_empty(Path(out))
    if "sparsec" not in manifest:
        raise SparsecError(
            f"'{out}' is not a folder that sparsec made: expected {MODEL}, {LIBRARY} and {MANIFEST} in it"
        )
    return manifest


def load(out: str | Path, session_options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
    """An `onnxruntime.InferenceSession` on the artifact in `out`, with its operator library registered.

    It runs on the GPU if the artifact was made for GPUs and one is here, else on the CPU.

    Raises:
        SparsecError: the folder is no artifact, or ONNX Runtime refuses it.
    """
    import onnxruntime

    from .machine import Cuda, machine_of

    folder = Path(out)
    on_gpu = isinstance(machine_of(read_manifest(folder), threads=0), Cuda)
    providers = [*(["CUDAExecutionProvider"] if on_gpu else []), "CPUExecutionProvider"]
    options = session_options or onnxruntime.SessionOptions()
    try:
        options.register_custom_ops_library(str(folder / LIBRARY))
        return onnxruntime.InferenceSession(str(folder / MODEL), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise SparsecError(f"'{out}' cannot be loaded: {' '.join(str(error).split())[:600]}") from error


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the artifact's model, data and library."""
    hashes = {}
    for name in (MODEL, DATA, LIBRARY):
        path = folder / name
        if path.exists():
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            hashes[name] = digest.hexdigest()
    return hashes


def publish(folder: Path, out: Path, force: bool) -> None:
    """Copy the finished `folder` to `out`, replacing an artifact that is there: all of it, or nothing changes.

    Raises:
        SparsecError: see `check_output`; or the disk is full.
    """
    check_output(out, force)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            fresh, old = Path(scratch) / "new", Path(scratch) / "old"
            shutil.copytree(folder, fresh)
            if out.exists():
                out.rename(old)
            try:
                fresh.rename(out)
            except BaseException:  # an interruption too: what was there is put back
                if old.exists():
                    old.rename(out)
                raise
    except OSError as error:
        full = " (the disk is full)" if error.errno == errno.ENOSPC else ""
        raise SparsecError(f"'{out}' cannot be written: {error.strerror or error}{full}") from error
