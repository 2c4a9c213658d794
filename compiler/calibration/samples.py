"""Calibration data in the forms that people have, as dictionaries of inputs for one run each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir import SparsecError, UsageError
from ..runtime import load_feeds, numpy_dtype

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    Feeds = dict[str, NDArray[Any]]

# Samples a run where the model's batch is dynamic.
BATCH = 8


class Samples:
    """Inputs of a model, a batch a run.

    Attributes:
        name: where they come from, for messages.
        runs: one dictionary of inputs a run, all checked against the model.
    """

    def __init__(self, name: str, runs: list[Feeds]) -> None:
        self.name, self.runs = name, runs

    @property
    def count(self) -> int:
        """Samples: the sum of the batch sizes."""
        return sum(_batch(feeds) for feeds in self.runs)

    def split(self, share: float) -> tuple[Samples, Samples]:
        """The first runs to calibrate with, and the last `share` of them, at least one, to judge with.

        A single run serves for both, as there is nothing to hold back.
        """
        if len(self.runs) == 1:
            return self, self
        held = max(1, round(share * len(self.runs)))
        return Samples(self.name, self.runs[:-held]), Samples(self.name, self.runs[-held:])


def open_samples(source: Any, session: onnxruntime.InferenceSession, limit: int) -> Samples:
    """At most `limit` samples for the model of `session`.

    Args:
        source: an .npz whose keys are input names and whose arrays are stacked samples; a folder of .npz files (a run
            each) or, for a model of one input, .npy files; "NAME:FILE.npy" with stacked samples of the input NAME;
            "FILE.py:FUNCTION" that yields dictionaries of inputs; or in Python an iterable of such dictionaries or an
            ONNX Runtime `CalibrationDataReader`.
        session: of the model.
        limit: samples, not runs; the last run may go beyond it.

    Raises:
        SparsecError: the data cannot be read, is empty, or does not fit the model's inputs.
        UsageError: `source` names no form of data.
    """
    name = str(source) if isinstance(source, str | Path) else type(source).__name__
    runs: list[Feeds] = []
    taken = 0
    for feeds in _runs(source, session):
        if taken >= limit:
            break
        runs.append(_checked(feeds, session, name))
        taken += _batch(runs[-1])
    if not runs:
        raise SparsecError(f"calibration data '{name}' is empty: give at least one sample of the model's inputs")
    return Samples(name, runs)


def _batch(feeds: Mapping[str, NDArray[Any]]) -> int:
    return max((array.shape[0] for array in feeds.values() if array.ndim), default=1)


def _runs(source: Any, session: onnxruntime.InferenceSession) -> Iterator[Mapping[str, Any]]:
    """Dictionaries of inputs, as they come."""
    if not isinstance(source, str | Path):
        yield from _from_python(source)
        return
    text = str(source)
    path = Path(text)
    before, _, after = text.rpartition(":")
    if path.is_dir():
        yield from _from_folder(path, session)
    elif path.suffix == ".npz":
        yield from _sliced(load_feeds(path), session)
    elif before.endswith(".py") and after.isidentifier():
        yield from _from_function(Path(before), after)
    elif path.suffix == ".npy" and before:
        yield from _sliced({before: _load_array(Path(after))}, session)
    elif path.suffix == ".npy":
        yield from _sliced({_only_input(session, path): _load_array(path)}, session)
    else:
        raise UsageError(
            f"calibration data '{text}': expected an .npz, a folder of .npz or .npy files, NAME:FILE.npy, or "
            "FILE.py:FUNCTION"
        )


def _from_python(source: Any) -> Iterator[Mapping[str, Any]]:
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


def _from_function(path: Path, name: str) -> Iterator[Mapping[str, Any]]:
    """What the function `name` of the file `path` yields."""
    spec = importlib.util.spec_from_file_location("sparsec_calibration_data", path)
    try:
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except AttributeError:
        raise SparsecError(f"calibration data '{path}:{name}': the file has no '{name}'") from None
    except Exception as error:
        raise SparsecError(f"calibration data '{path}:{name}': the file cannot be run ({_words(error)})") from error
    try:
        yield from function()
    except Exception as error:
        raise SparsecError(f"calibration data '{path}:{name}': {name}() failed ({_words(error)})") from error


def _from_folder(path: Path, session: onnxruntime.InferenceSession) -> Iterator[Mapping[str, Any]]:
    for file in sorted(path.iterdir()):
        if file.suffix == ".npz":
            yield load_feeds(file)
        elif file.suffix == ".npy":
            yield {_only_input(session, file): _load_array(file)}


def _load_array(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
        return array
    except FileNotFoundError:
        raise SparsecError(f"calibration data '{path}': no such file") from None
    except (OSError, ValueError) as error:
        raise SparsecError(f"calibration data '{path}': it is no .npy file ({_words(error)})") from error


def _only_input(session: onnxruntime.InferenceSession, path: Path) -> str:
    names = [value.name for value in session.get_inputs()]
    if len(names) != 1:
        raise UsageError(
            f"calibration data '{path}': the model has {len(names)} inputs ({', '.join(names)}), so a .npy needs the "
            "name of its own: NAME:FILE.npy, or give an .npz with all of them"
        )
    return str(names[0])


def _sliced(arrays: Mapping[str, NDArray[Any]], session: onnxruntime.InferenceSession) -> Iterator[Mapping[str, Any]]:
    """Stacked samples, a few a run: as many as the model's batch, or `BATCH` where that is dynamic."""
    shapes = {value.name: value.shape for value in session.get_inputs()}
    if set(arrays) != set(shapes):
        yield arrays  # to be refused
        return
    stacked = {name for name, array in arrays.items() if array.ndim and shapes.get(name)}
    counts = {name: len(arrays[name]) for name in stacked}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        raise SparsecError(f"calibration data: inputs have different numbers of samples ({found})")
    fixed = [shapes[name][0] for name in stacked if isinstance(shapes[name][0], int)]
    size = fixed[0] if fixed else BATCH
    total = min(counts.values(), default=0)
    for start in range(0, total - size + 1 if fixed else total, size):
        yield {name: array[start : start + size] if name in stacked else array for name, array in arrays.items()}


def _checked(feeds: Mapping[str, Any], session: onnxruntime.InferenceSession, name: str) -> Feeds:
    """`feeds` as arrays of the model's dtypes."""
    expected = {value.name: value for value in session.get_inputs()}
    if not isinstance(feeds, Mapping) or set(feeds) != set(expected):
        found = sorted(feeds) if isinstance(feeds, Mapping) else type(feeds).__name__
        raise SparsecError(f"calibration data '{name}' has the inputs {found}, the model expects {sorted(expected)}")
    checked: Feeds = {}
    for key, value in expected.items():
        array = np.asarray(feeds[key])
        dtype = numpy_dtype(value.type)
        if dtype is not None and array.dtype != dtype:
            if not np.can_cast(array.dtype, dtype, "same_kind"):
                raise SparsecError(
                    f"calibration data '{name}': input '{key}' is {array.dtype}, the model expects {dtype}"
                )
            array = array.astype(dtype)
        shape = list(value.shape)
        fits = len(shape) == array.ndim and all(
            not isinstance(want, int) or want == have for want, have in zip(shape, array.shape, strict=True)
        )
        if not fits:
            raise SparsecError(
                f"calibration data '{name}': input '{key}' is {list(array.shape)}, the model expects {shape}"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise SparsecError(f"calibration data '{name}': input '{key}' has NaN or infinite values")
        checked[key] = array
    return checked


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
