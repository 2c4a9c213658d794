"""Labels of samples: among the data or apart from it, one a sample."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir import SparsecError, UsageError
from .sources import as_array, load_array

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    Array = NDArray[Any]

# What they are called among the arrays of a source, unless the model has an input of this name.
LABELS = "labels"


def parted(feeds: Any, session: onnxruntime.InferenceSession) -> tuple[Any, Any]:
    """The inputs, and the labels that stand among them or None."""
    inputs = {value.name for value in session.get_inputs()}
    if not isinstance(feeds, Mapping) or LABELS not in feeds or LABELS in inputs:
        return feeds, None
    return {name: array for name, array in feeds.items() if name != LABELS}, feeds[LABELS]


def open_labels(labels: Any) -> Array:
    """Labels that stand apart from the samples: [samples, ...]."""
    if not isinstance(labels, str | Path):
        array = as_array(labels, "labels")
    elif Path(labels).suffix == ".npy":
        array = load_array(Path(labels), "labels")
    else:
        raise UsageError(f"labels '{labels}': expected an .npy file, or in Python an array; one label a sample")
    return np.atleast_1d(array)


def one_of(own: Any, apart: Array, name: str) -> Array:
    """Labels that stand apart, unless the data has its own as well."""
    if own is not None:
        raise UsageError(f"calibration data '{name}' has labels of its own, and others are given: give one of the two")
    return apart


def checked_labels(labels: Any, size: int, name: str) -> Array:
    """`labels` of a run of `size` samples, as an array [size, ...] of numbers."""
    array = as_array(labels, f"calibration data '{name}': the array of labels")
    if array.dtype.kind not in "biuf":
        raise SparsecError(f"calibration data '{name}': labels are {array.dtype}, expected integers or floats")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise SparsecError(f"calibration data '{name}': labels have NaN or infinite values; leave those samples out")
    array = np.atleast_1d(array)
    if len(array) != size:
        raise SparsecError(lengths(name, len(array), size))
    return array.astype(np.int64) if array.dtype.kind == "b" else array


def lengths(name: str, labels: int, samples: int | str) -> str:
    """What to say of so many labels for so many samples."""
    return f"calibration data '{name}': {labels} labels for {samples} samples; give one label a sample, in their order"


def all_or_none(found: list[Any], name: str) -> list[Array] | None:
    """Labels of all runs, or None where none has any."""
    labels = [array for array in found if array is not None]
    if not labels:
        return None
    if len(labels) < len(found):
        raise SparsecError(
            f"calibration data '{name}': {len(labels)} of {len(found)} runs have labels; give them to all or to none"
        )
    kinds = {(array.dtype.kind == "f", array.ndim): array for array in labels}
    if len(kinds) > 1:
        one, other, *_ = kinds.values()
        raise SparsecError(
            f"calibration data '{name}': labels are {one.dtype}{list(one.shape)} in one run and "
            f"{other.dtype}{list(other.shape)} in another"
        )
    return labels
