"""How far an artifact's outputs are from the dense model's, on the same inputs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .runtime import run_session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .context import Progress
    from .pair import Pair


@dataclass(frozen=True, slots=True)
class OutputError:
    """The largest differences of one output over all inputs that were tried.

    Attributes:
        absolute: largest absolute difference; for text and truth values the share of elements that differ.
        relative: the same as a share of the dense output's largest absolute value.
        mismatch: what differs beyond values, such as "shape [1, 10] against [1, 12]", or "". Errors are infinite then.
    """

    name: str
    absolute: float
    relative: float
    mismatch: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The artifact against the dense model.

    Attributes:
        artifact, model: paths.
        inputs: "random, seed 0" or the file they came from.
        batch: batch sizes that were run.
        outputs: one an output.
        pruned: names of the layers in which sparsec set weights to zero; a difference is then expected.
        kernel_error: the relative error against the dense model with the *same* weights, measured when the artifact
            was made; None where it was not.
    """

    artifact: str
    model: str
    inputs: str
    batch: tuple[int, ...]
    outputs: tuple[OutputError, ...]
    pruned: tuple[str, ...]
    kernel_error: float | None

    @property
    def error(self) -> float:
        """The largest relative error of any output."""
        return max((output.relative for output in self.outputs), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**dataclasses.asdict(self), "error": self.error}


def verify(pair: Pair, progress: Progress | None = None) -> Verdict:
    """Run both sides of `pair` on every input and compare all outputs.

    Raises:
        SparsecError: ONNX Runtime cannot run one of them.
    """
    workload = pair.workload
    names = [output.name for output in pair.dense.get_outputs()]
    worst = {name: OutputError(name, 0.0, 0.0) for name in names}
    if progress is not None:
        progress.start("comparing outputs", len(workload.batches))
    for batch, feeds in workload.feeds.items():
        results = zip(names, run_session(pair.dense, feeds), run_session(pair.sparse, feeds), strict=True)
        for name, expected, found in results:
            worst[name] = max(worst[name], difference(name, expected, found), key=lambda error: error.relative)
        if progress is not None:
            progress.advance(f"batch {batch}")
    recorded = pair.report.get("verification") or {}
    return Verdict(
        artifact=str(pair.artifact),
        model=str(pair.model),
        inputs=workload.inputs,
        batch=workload.batches,
        outputs=tuple(worst.values()),
        pruned=tuple(layer["layer"] for layer in pair.report.get("decisions", ()) if layer.get("pruned")),
        kernel_error=recorded.get("error"),
    )


def difference(name: str, expected: Any, found: Any) -> OutputError:
    """The errors of one output. NaN equals NaN, and infinity itself; sequences and maps are equal or not."""
    if not isinstance(expected, np.ndarray) or not isinstance(found, np.ndarray):
        return OutputError(name, *((0.0, 0.0) if expected == found else (np.inf, np.inf, "values differ")))
    for what, ours, theirs in (("shape", found.shape, expected.shape), ("type", found.dtype, expected.dtype)):
        if ours != theirs:
            ours, theirs = (list(ours), list(theirs)) if what == "shape" else (ours, theirs)
            return OutputError(name, np.inf, np.inf, f"{what} {ours} against {theirs}")
    if expected.size == 0:
        return OutputError(name, 0.0, 0.0)
    if expected.dtype.kind not in "fciu":
        share = float((expected != found).mean())
        return OutputError(name, share, share)
    absolute = _largest_difference(expected, found)
    finite = np.abs(expected[np.isfinite(expected)])
    largest = float(finite.max()) if finite.size else 0.0
    return OutputError(name, absolute, absolute / largest if largest else (np.inf if absolute else 0.0))


def _largest_difference(expected: NDArray[Any], found: NDArray[Any]) -> float:
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    a, b = expected.astype(wide), found.astype(wide)
    with np.errstate(invalid="ignore"):
        apart = np.abs(a - b)
    apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
    apart[np.isnan(apart)] = np.inf
    return float(apart.max())
