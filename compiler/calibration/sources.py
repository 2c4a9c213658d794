"""The forms that calibration data comes in, as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir import SparsecError, UsageError
from ..runtime import load_feeds
from .function import load_function, words

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    Array = NDArray[Any]


def stacked(source: Any, session: onnxruntime.InferenceSession) -> Mapping[str, Array] | None:
    """All samples by input, of the forms that have them in one array; None of those that yield runs."""
    if not isinstance(source, str | Path):
        return None
    path = Path(source)
    before, _, after = str(source).rpartition(":")
    if path.is_dir():
        return None
    if path.suffix == ".npz":
        return load_feeds(path, "calibration data")
    if path.suffix == ".npy" and before:
        return {before: load_array(Path(after), "calibration data")}
    if path.suffix == ".npy":
        return {_only_input(session, path): load_array(path, "calibration data")}
    return None


def streamed(source: Any, session: onnxruntime.InferenceSession) -> Iterator[Any]:
    """What the other forms yield, which should be a dictionary of inputs a run."""
    if not isinstance(source, str | Path):
        yield from _from_python(source)
        return
    text = str(source)
    before, _, after = text.rpartition(":")
    if Path(text).is_dir():
        yield from _from_folder(Path(text), session)
    elif before.endswith(".py") and after.isidentifier():
        yield from _from_function(text)
    else:
        raise UsageError(
            f"calibration data '{text}': expected an .npz, a folder of .npz or .npy files, NAME:FILE.npy, or "
            "FILE.py:FUNCTION"
        )


def _from_python(source: Any) -> Iterator[Any]:
    if hasattr(source, "get_next"):  # onnxruntime.quantization.CalibrationDataReader
        while (feeds := source.get_next()) is not None:
            yield feeds
        return
    try:
        yield from iter(source)
    except TypeError as error:
        raise UsageError(
            f"calibration data: expected a path, an iterable of dictionaries or a CalibrationDataReader, got {error}"
        ) from error


def _from_function(text: str) -> Iterator[Any]:
    """What the function of "FILE.py:FUNCTION" yields."""
    function = load_function(text, "calibration data")
    try:
        yield from function()
    except Exception as error:
        name = text.rpartition(":")[2]
        raise SparsecError(f"calibration data '{text}': {name}() failed ({words(error)})") from error


def _from_folder(path: Path, session: onnxruntime.InferenceSession) -> Iterator[Mapping[str, Any]]:
    for file in sorted(path.iterdir()):
        if file.suffix == ".npz":
            yield load_feeds(file, "calibration data")
        elif file.suffix == ".npy":
            yield {_only_input(session, file): load_array(file, "calibration data")}


def load_array(path: Path, what: str) -> Array:
    """The array of an .npy file.

    Raises:
        SparsecError: the file is missing or no .npy; the message begins with `what`.
    """
    try:
        array: Array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise SparsecError(f"{what} '{path}': no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise SparsecError(f"{what} '{path}': it is no .npy file ({words(error)})") from error
    if not isinstance(array, np.ndarray):
        raise SparsecError(f"{what} '{path}': it is no .npy file but an .npz")
    return array


def _only_input(session: onnxruntime.InferenceSession, path: Path) -> str:
    names = [value.name for value in session.get_inputs()]
    if len(names) != 1:
        raise UsageError(
            f"calibration data '{path}': the model has {len(names)} inputs ({', '.join(names)}), so a .npy needs the "
            "name of its own: NAME:FILE.npy, or give an .npz with all of them"
        )
    return str(names[0])


def as_array(value: Any, what: str) -> Array:
    """`value` as an array.

    Raises:
        SparsecError: it cannot be one; the message begins with `what`.
    """
    try:
        return np.asarray(value)
    except Exception as error:  # lists of different lengths; tensors of other libraries with reasons of their own
        raise SparsecError(f"{what} cannot be made an array ({words(error)})") from error
