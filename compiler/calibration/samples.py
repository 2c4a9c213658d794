"""Calibration data in the forms that people have, as dictionaries of inputs for one run each, and their labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir import SparsecError
from ..runtime import numpy_dtype
from .labels import LABELS, all_or_none, checked_labels, lengths, one_of, open_labels, parted
from .sources import as_array, stacked, streamed

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Feeds = dict[str, Array]

# Samples a run where the model's batch is dynamic.
BATCH = 8


class Samples:
    """Inputs of a model, a batch a run.

    Attributes:
        name: where they come from, for messages.
        runs: one dictionary of inputs a run, all checked against the model.
        labels: one array a run, a label for each of its samples along the first axis; None without labels.
        axes: by input, the axis along which its samples are stacked; empty where the batch is fixed or cannot be told.
        source_count: how many samples there were to take these from; None where only reading all would tell.
    """

    def __init__(
        self,
        name: str,
        runs: list[Feeds],
        labels: list[Array] | None = None,
        axes: Mapping[str, int] | None = None,
        source_count: int | None = None,
    ) -> None:
        self.name, self.runs, self.labels, self.axes = name, runs, labels, dict(axes or {})
        self.source_count = source_count

    @property
    def count(self) -> int:
        """Samples: the sum of the batch sizes."""
        return sum(_batch(feeds, self.axes) for feeds in self.runs)

    def some(self, count: int) -> Samples:
        """At most about `count` samples, in whole runs, evenly."""
        most = max(1, count * len(self.runs) // max(self.count, 1))
        if most >= len(self.runs):
            return self
        places = evenly(len(self.runs), most)
        labels = None if self.labels is None else [self.labels[i] for i in places]
        return Samples(self.name, [self.runs[i] for i in places], labels, self.axes, self.source_count)

    def split(self, share: float) -> tuple[Samples, Samples]:
        """The first samples to calibrate with, and the last `share` of them, at least one, to judge with.

        Where the batch is dynamic a run is cut if the part begins inside it; otherwise whole runs are held back. A
        single run that cannot be cut serves for both, as there is nothing to hold back.
        """
        rest = min(max(1, round(share * self.count)), self.count - 1)
        first = len(self.runs)
        while first and rest >= _batch(self.runs[first - 1], self.axes):
            first -= 1
            rest -= _batch(self.runs[first], self.axes)
        if rest > 0 and self._can_cut(first - 1):
            return self._cut(first - 1, rest)._at(first)
        if len(self.runs) == 1:
            return self, self
        if rest > 0:
            first = len(self.runs) - min(max(1, round(share * len(self.runs))), len(self.runs) - 1)
        return self._at(first)

    def _at(self, number: int) -> tuple[Samples, Samples]:
        """The runs before `number`, and the others."""
        before, after = slice(number), slice(number, None)
        one, other = (
            Samples(
                self.name,
                self.runs[part],
                None if self.labels is None else self.labels[part],
                self.axes,
                self.source_count,
            )
            for part in (before, after)
        )
        return one, other

    def _can_cut(self, number: int) -> bool:
        """Whether what is stacked in a run has the same number of samples, and nothing else in it could be samples."""
        feeds = self.runs[number]
        sizes = {feeds[name].shape[axis] for name, axis in self.axes.items()}
        others = [array for name, array in feeds.items() if name not in self.axes]
        return len(sizes) == 1 and not any(sizes & set(array.shape) for array in others)

    def _cut(self, number: int, rest: int) -> Samples:
        """The same samples, with the last `rest` of run `number` as a run of their own."""
        at = _batch(self.runs[number], self.axes) - rest
        feeds = self.runs[number]
        halves: list[Feeds] = [{}, {}]
        for name, array in feeds.items():
            axis = self.axes.get(name)
            halves[0][name], halves[1][name] = (array, array) if axis is None else np.split(array, [at], axis)
        runs = [*self.runs[:number], *halves, *self.runs[number + 1 :]]
        labels = self.labels
        if labels is not None:
            labels = [*labels[:number], labels[number][:at], labels[number][at:], *labels[number + 1 :]]
        return Samples(self.name, runs, labels, self.axes, self.source_count)


def open_samples(source: Any, session: onnxruntime.InferenceSession, limit: int, labels: Any = None) -> Samples:
    """At most `limit` samples for the model of `session`.

    Args:
        source: an .npz whose keys are input names and whose arrays are stacked samples; a folder of .npz files (a run
            each) or, for a model of one input, .npy files; "NAME:FILE.npy" with stacked samples of the input NAME;
            "FILE.py:FUNCTION" that yields dictionaries of inputs; or in Python an iterable of such dictionaries or an
            ONNX Runtime `CalibrationDataReader`. An .npz or dictionary may have the samples' labels as one array more,
            `labels`, where that is no input of the model.
        session: of the model.
        limit: samples, not runs; the last run may go beyond it.
        labels: of the samples, in their order, where they stand apart: an .npy file or an array.

    Raises:
        SparsecError: the data cannot be read, is empty, or does not fit the model's inputs; or labels are not one a
            sample, or no finite numbers.
        UsageError: `source` names no form of data, or labels are given twice.
    """
    name = str(source) if isinstance(source, str | Path) else type(source).__name__
    axes = _batch_axes(session)
    apart = None if labels is None else open_labels(labels)
    runs: list[Feeds] = []
    found: list[Any] = []
    taken, ended = 0, True
    arrays = stacked(source, session)
    for feeds, own in _parted_runs(source, session) if arrays is None else _sliced(arrays, apart, session, name):
        if taken >= limit:
            ended = False
            break
        runs.append(_checked(feeds, session, name))
        size = _batch(runs[-1], axes)
        if not size:
            raise _empty(name)
        taken += size
        if arrays is None and apart is not None:
            if len(apart) < taken:
                raise SparsecError(lengths(name, len(apart), f"at least {taken}"))
            own = one_of(own, apart[taken - size : taken], name)
        found.append(None if own is None else checked_labels(own, size, name))
    if not runs:
        raise _empty(name)
    if arrays is None and apart is not None and ended and len(apart) != taken:
        raise SparsecError(lengths(name, len(apart), taken))
    known = taken if ended else None if arrays is None else _stacked_count(arrays, session)
    return Samples(name, runs, all_or_none(found, name), axes, known)


def _empty(name: str) -> SparsecError:
    return SparsecError(f"calibration data '{name}' is empty: give at least one sample of the model's inputs")


def _stacked_count(arrays: Mapping[str, Array], session: onnxruntime.InferenceSession) -> int:
    """Samples of arrays that `_sliced` cuts, all of them: one of the inputs has them along its first axis."""
    stacked = (arrays[value.name] for value in session.get_inputs() if value.shape and arrays[value.name].ndim)
    return min((len(array) for array in stacked), default=0)


def _batch(feeds: Mapping[str, Array], axes: Mapping[str, int]) -> int:
    """Samples of one run."""
    if axes:
        return max(int(feeds[name].shape[axis]) for name, axis in axes.items())
    return max((array.shape[0] for array in feeds.values() if array.ndim), default=1)


def _batch_axes(session: onnxruntime.InferenceSession) -> dict[str, int]:
    """By input, the axis that has the dynamic first dimension: [batch, ...], and a state of [layers, batch, hidden].

    Empty where no first dimension is dynamic, or several are that have different names: one of them may be a sequence.
    So may the only one where an output has another dynamic dimension of the inputs instead: [time, batch, features] in,
    [batch, classes] out.
    """
    shapes = {value.name: list(value.shape) for value in session.get_inputs()}
    batches = {shape[0] for shape in shapes.values() if shape and not isinstance(shape[0], int)}
    if len(batches) != 1:
        return {}
    batch = batches.pop()
    others = {size for shape in shapes.values() for size in shape if isinstance(size, str)} - {batch}
    if any(batch not in value.shape and others & set(value.shape) for value in session.get_outputs()):
        return {}
    if batch is None:
        return {name: 0 for name, shape in shapes.items() if shape and shape[0] is None}
    return {name: shape.index(batch) for name, shape in shapes.items() if batch in shape}


def _parted_runs(source: Any, session: onnxruntime.InferenceSession) -> Iterator[tuple[Any, Any]]:
    """The inputs of a run and its labels or None, as they come."""
    for feeds in streamed(source, session):
        yield parted(feeds, session)


def _sliced(
    arrays: Mapping[str, Array], apart: Array | None, session: onnxruntime.InferenceSession, source: str
) -> Iterator[tuple[Any, Any]]:
    """Stacked samples, a few a run: as many as the model's batch, or `BATCH` where that is dynamic."""
    arrays, labels = parted(arrays, session)
    if apart is not None:
        labels = one_of(labels, apart, source)
    labels = None if labels is None else np.atleast_1d(labels)
    shapes = {value.name: value.shape for value in session.get_inputs()}
    if set(arrays) != set(shapes):
        yield arrays, None  # to be refused
        return
    batched = {name for name, array in arrays.items() if array.ndim and shapes.get(name)}
    counts = {name: len(arrays[name]) for name in batched}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        raise SparsecError(f"calibration data '{source}': inputs have different numbers of samples ({found})")
    total = min(counts.values(), default=0)
    if labels is not None and total and len(labels) != total:
        raise SparsecError(lengths(source, len(labels), total))
    fixed = [shapes[name][0] for name in batched if isinstance(shapes[name][0], int)]
    size = fixed[0] if fixed else BATCH
    if fixed and 0 < total < size:
        raise SparsecError(
            f"calibration data '{source}' has {total} samples, and the model takes {size} at once: give at least {size}"
        )
    for start in range(0, total - size + 1 if fixed else total, size):
        part = slice(start, start + size)
        feeds = {name: array[part] if name in batched else array for name, array in arrays.items()}
        yield feeds, None if labels is None else labels[part]


def _checked(feeds: Any, session: onnxruntime.InferenceSession, name: str) -> Feeds:
    """`feeds` as arrays of the model's dtypes."""
    expected = {value.name: value for value in session.get_inputs()}
    if not isinstance(feeds, Mapping) or set(feeds) != set(expected):
        found = sorted(map(str, feeds)) if isinstance(feeds, Mapping) else type(feeds).__name__
        hint = ""
        if isinstance(feeds, Mapping) and set(feeds) > set(expected) and LABELS not in expected:
            hint = f"; an array of labels is called '{LABELS}'"
        raise SparsecError(
            f"calibration data '{name}' has the inputs {found}, the model expects {sorted(expected)}{hint}"
        )
    checked: Feeds = {}
    for key, value in expected.items():
        array = as_array(feeds[key], f"calibration data '{name}': input '{key}'")
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


def spread(runs: Sequence[Feeds], count: int) -> list[Feeds]:
    """At most `count` of the runs, but at least one, evenly."""
    return [runs[i] for i in evenly(len(runs), count)]


def evenly(length: int, count: int) -> list[int]:
    """At most `count` places of `length`, but at least one, from the first to the last."""
    return [round(place) for place in np.linspace(0, length - 1, min(max(1, count), length))]
