"""ONNX Runtime sessions, inputs for them, and the timing of one against another."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir import SparsecError, Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import onnxruntime
    from numpy.typing import NDArray

    Array = NDArray[Any]

# After a run the threads of an ONNX Runtime session spin for tens of milliseconds in the hope of more work, on the very
# cores that the other session of a comparison is about to use: without a rest before each turn, MiniLM's dense side
# took 31 to 61 ms and its sparse side 12 to 34, with one 28 to 32 and 11 to 13. All in seconds.
_REST = 0.04
_WARM_UP = 0.003
_BLOCK = 0.012


def open_session(
    source: str | Path | bytes, threads: int, library: Path | None = None, cuda: Mapping[str, str] | None = None
) -> onnxruntime.InferenceSession:
    """A session with all of ONNX Runtime's optimisations on: a CPU's or, with options of the CUDA provider, a GPU's.

    Raises:
        SparsecError: ONNX Runtime refuses the model; its own words are in the message.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    model = str(source) if isinstance(source, Path) else source
    providers: list[Any] = [] if cuda is None else [("CUDAExecutionProvider", dict(cuda))]
    try:
        return onnxruntime.InferenceSession(model, options, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise SparsecError(f"ONNX Runtime {onnxruntime.__version__} cannot load the model: {_words(error)}") from error


def run_session(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, Array], names: Sequence[str] | None = None
) -> list[Any]:
    """The outputs of one run: those named, or all.

    Raises:
        SparsecError: ONNX Runtime cannot run the model on these inputs.
    """
    try:
        return list(session.run(names, dict(feeds)))
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feeds.items())
        raise SparsecError(f"ONNX Runtime cannot run the model on inputs {shapes}: {_words(error)}") from error


def _words(error: Exception) -> str:
    """The one line of an exception that a user can act on."""
    return " ".join(str(error).split())[:600]


class Runner:
    """One session with its inputs bound once; calling it runs the model and leaves the outputs where they are."""

    def __init__(self, session: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> None:
        import onnxruntime

        run_session(session, feeds)
        self._session = session
        self._binding = session.io_binding()
        self._plain: dict[str, Array] | None = None
        if any(array.dtype.kind in "OUS" for array in feeds.values()):
            self._plain = dict(feeds)  # strings cannot be bound
            return
        for name, array in feeds.items():
            self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for output in session.get_outputs():
            self._binding.bind_output(output.name)
        try:
            for _ in range(2):  # the second writes where the first has left its outputs
                self()
        except Exception:  # an output has another shape than the model declares, which `run` forgives
            self._plain = dict(feeds)

    def __call__(self) -> None:
        if self._plain is None:
            self._session.run_with_iobinding(self._binding)
        else:
            self._session.run(None, self._plain)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Dense against sparse. Times in microseconds; `speedup` is the median of dense/sparse, `spread` its quartiles."""

    dense_us: float
    sparse_us: float
    speedup: float
    spread: tuple[float, float]

    def timing(self, batch: int, rows: int) -> Timing:
        """As a decision keeps it."""
        return Timing(batch, rows, self.dense_us, self.sparse_us, self.speedup, self.spread)


def compare(dense: Callable[[], None], sparse: Callable[[], None], pairs: int = 7) -> Comparison:
    """Time both sides in turn, `pairs` times each, a turn being 12 ms of runs, or one run where that is longer."""
    times: list[tuple[float, float]] = []
    for turn in range(pairs):
        # Every other pair starts with the other side, so that a drift of the machine favours neither.
        if turn % 2:
            second = _time_block(sparse)
            times.append((_time_block(dense), second))
        else:
            first = _time_block(dense)
            times.append((first, _time_block(sparse)))
    ratios = sorted(d / s for d, s in times)
    quartile = len(ratios) // 4
    return Comparison(
        dense_us=statistics.median(d for d, _ in times) * 1e6,
        sparse_us=statistics.median(s for _, s in times) * 1e6,
        speedup=statistics.median(ratios),
        spread=(ratios[quartile], ratios[-1 - quartile]),
    )


def _time_block(run: Callable[[], None]) -> float:
    """The lower quartile of a run's time over one block, in seconds: what other programs add is not ours."""
    time.sleep(_REST)
    clock = time.perf_counter
    start = clock()
    run()
    while clock() - start < _WARM_UP:
        run()
    samples: list[float] = []
    start = clock()
    while not samples or clock() - start < _BLOCK:
        before = clock()
        run()
        samples.append(clock() - before)
    return sorted(samples)[len(samples) // 4]


# What ONNX Runtime calls the element types of inputs.
_DTYPES: dict[str, Any] = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "string": np.object_,
}


def numpy_dtype(kind: str) -> np.dtype[Any] | None:
    """What ONNX Runtime calls "tensor(float)" and the like; None for what numpy does not have."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return np.dtype(_DTYPES[name]) if kind.startswith("tensor(") and name in _DTYPES else None


def random_feeds(
    session: onnxruntime.InferenceSession,
    batch: int | None,
    dims: Mapping[str, int],
    seed: int,
    limits: Mapping[str, int] | None = None,
    other: int = 128,
) -> dict[str, Array]:
    """Seeded random inputs of the shapes that the session declares.

    A dynamic first dimension is the batch, and so are those with its name, and the first dynamic dimension of an input
    whose own first is fixed where other inputs have a batch: a recurrent state is [layers, batch, hidden]. Other
    dynamic dimensions take their size from `dims`, else `other`.
    Floats are standard normal; integers are below `limits[name]` (the rows of a table that they index), else 0 or 1;
    masks are all ones.

    Raises:
        SparsecError: an input's type cannot be made up (a sequence, an optional).
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    batch_names = {
        value.shape[0] for value in session.get_inputs() if value.shape and not isinstance(value.shape[0], int)
    }
    for value in session.get_inputs():
        dtype = numpy_dtype(value.type)
        if dtype is None:
            raise SparsecError(
                f"input '{value.name}' is a {value.type}, for which sparsec cannot make up data: give inputs (--inputs)"
            )
        shape = _sizes(value.shape, batch, batch_names, dims, other)
        feeds[value.name] = _random(rng, shape, dtype, (limits or {}).get(value.name, 2), "mask" in value.name.lower())
    return feeds


def _sizes(
    shape: Sequence[int | str | None],
    batch: int | None,
    batch_names: Collection[str | None],
    dims: Mapping[str, int],
    other: int,
) -> list[int]:
    """Sizes for a declared shape; `batch_names` are the dynamic first dimensions of all inputs."""
    dynamic = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    sizes = []
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            sizes.append(size)
        elif size is not None and size in dims:
            sizes.append(dims[size])
        elif axis == 0 or (size is not None and size in batch_names):
            sizes.append(batch or 1)
        else:
            sizes.append((batch or 1) if batch_names and axis == dynamic[0] else other)
    return sizes


def _random(rng: np.random.Generator, shape: list[int], dtype: np.dtype[Any], limit: int, mask: bool) -> Array:
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind == "b" or mask:
        return np.ones(shape, dtype=dtype)
    if dtype.kind == "O":
        return np.full(shape, "a", dtype=dtype)
    return rng.integers(0, max(1, min(limit, int(np.iinfo(dtype).max))), shape).astype(dtype)


def load_feeds(path: Path, what: str = "inputs") -> dict[str, Array]:
    """Inputs by name from an .npz file.

    Raises:
        SparsecError: the file is missing or no .npz; the message begins with `what`.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except FileNotFoundError as error:
        raise SparsecError(f"{what} '{path}': no such file") from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise SparsecError(
            f"{what} '{path}': expected an .npz whose keys are the names of the model's inputs ({error})"
        ) from error
