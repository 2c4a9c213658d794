"""What a metric compares: a run's outputs with its labels, or with the dense model's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .metric import Misfit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .metric import Run

    Array = NDArray[Any]
    Floats = NDArray[np.float64]
    # By output, what was found and what was expected: [samples, numbers] each.
    Pairs = dict[str, tuple[Floats, Floats]]


def with_labels(run: Run) -> Pairs:
    """The first output of floats and the labels, which have its shape."""
    assert run.labels is not None
    name, output = first(run.outputs)
    if squeezed(output).shape != squeezed(run.labels).shape:
        raise Misfit(
            f"labels are {list(run.labels.shape)}, and the output '{name}' is {list(output.shape)}: it needs labels of "
            "the output's shape"
        )
    if run.labels.dtype.kind == "f" and not np.isfinite(run.labels).all():
        raise Misfit("labels have NaN or infinite values")
    return {name: (_flat(output), _flat(run.labels))}


def numbers(run: Run) -> Pairs:
    """As `with_labels`, where each sample has one number."""
    pairs = with_labels(run)
    for name, (found, _) in pairs.items():
        if found.shape[1] != 1:
            raise Misfit(
                f"with labels it needs an output of one number a sample; '{name}' is {list(run.outputs[name].shape)}"
            )
    return pairs


def with_dense(run: Run) -> Pairs:
    """All outputs of floats, and the dense model's."""
    assert run.dense is not None
    found, expected = _floats(run.outputs), _floats(run.dense, "the dense model's output")
    for name, dense in expected.items():
        if name not in found or found[name].shape != dense.shape:
            shape = list(found[name].shape) if name in found else "missing"
            raise Misfit(f"the output '{name}' is {shape}, and the dense model's is {list(dense.shape)}")
    return {name: (_flat(found[name]), _flat(dense)) for name, dense in expected.items()}


def first(outputs: Mapping[str, Any], what: str = "the output") -> tuple[str, Array]:
    """The first output of floats."""
    return next(iter(_floats(outputs, what).items()))


def _floats(outputs: Mapping[str, Any], what: str = "the output") -> dict[str, Array]:
    """Outputs of floats, of which there is one at least."""
    found = {n: array for n, array in outputs.items() if isinstance(array, np.ndarray) and array.dtype.kind == "f"}
    if not found:
        raise Misfit(f"it needs an output of floats, and the model has none (outputs: {', '.join(outputs)})")
    for name, array in found.items():
        if np.isnan(array).any():
            raise Misfit(f"{what} '{name}' has NaN values")
    return found


def squeezed(array: Array) -> Array:
    """[N, ...] without axes of size 1 after the first."""
    return array.reshape(array.shape[:1] + tuple(size for size in array.shape[1:] if size != 1))


def _flat(array: Array) -> Floats:
    """[samples, numbers] float64; a scalar is [1, 1]."""
    samples, *shape = array.shape or (1,)
    # Explicit, because reshape refuses -1 where there are no samples.
    return array.astype(np.float64).reshape(samples, int(np.prod(shape, dtype=np.int64)))
