"""Everything sparsec found, chose and measured, as one record: `report.json` is this, the CLI's tables are views."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..ir import Decision, Timing


@dataclass(frozen=True, slots=True)
class SurveyPoint:
    """What pruning a dense model would bring: the whole model at one sparsity, weights masked by block norm.

    Accuracy is not measured here. `speedups` are medians of dense time / sparse time, one a batch size.
    """

    sparsity: float
    pattern: str
    layers: int
    speedups: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Verification:
    """The artifact against the dense model with the same weights, on the same inputs.

    Attributes:
        error: largest absolute difference of any output, relative to the largest absolute value of that output.
        outputs: number of outputs compared.
        inputs: "random, seed 0" or the file they came from.
    """

    error: float
    outputs: int
    inputs: str


@dataclass(frozen=True, slots=True)
class Fidelity:
    """The artifact against the dense model as it came, on samples that were held back from calibration.

    Attributes:
        errors: by output, the root of the mean squared difference as a share of that of the dense output.
        samples: held back.
        calibrated: samples that the weights were fitted to.
        source: where both come from.
        held_back: False where all the data was one run, so that these samples are those the weights were fitted to.
    """

    errors: dict[str, float]
    samples: int
    calibrated: int
    source: str
    held_back: bool

    @property
    def worst(self) -> float:
        """The largest of `errors`."""
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True, slots=True)
class Quality:
    """The artifact's metric, on the samples of `Fidelity`.

    Attributes:
        metric: its name.
        higher_is_better: otherwise lower is.
        against: "labels", or "the dense model's outputs".
        dense, value: of the dense model, and of the artifact.
        limit: the drop that was allowed, as it was said, or "".
    """

    metric: str
    higher_is_better: bool
    against: str
    dense: float
    value: float
    limit: str


@dataclass(frozen=True, slots=True)
class Healing:
    """What training did to the pruned weights.

    Attributes:
        steps, seconds: that it took, those of earlier runs that it went on from included.
        samples: trained with.
        before, after: the metric of `Quality` on its samples, by the weights before and the best of those after.
        kept: whether the latter are the artifact's; they are where they are better.
        note: why training ended before its time, or "".
        resumed_steps, resumed_seconds: of these, what an earlier run took, from whose state this one went on.
    """

    steps: int
    seconds: float
    samples: int
    before: float | None
    after: float | None
    kept: bool
    note: str
    resumed_steps: int = 0
    resumed_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class DenseInt8:
    """The whole model as ONNX Runtime's static quantisation makes it: what needs no pruning.

    Attributes:
        speedups: over the model as it came, one a batch size.
        metric: of `Quality`, on the same samples; None without calibration data.
        failure: why there are no numbers, or "".
    """

    speedups: tuple[float, ...]
    metric: float | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """What another budget would have bought, layers pruned as measured but not yet fitted to each other.

    Attributes:
        speedups: of the whole model, one a batch size; estimated: the sum of what the layers gain by themselves.
        zeros: share of zeros among the weights that may be pruned.
        metric: of `Quality`, measured on the same samples; None where the outputs have none (NaN).
        nbytes: estimated size of the model.
        layers: how many are sparse.
        chosen: whether the artifact was made from it; its own numbers, after fitting, are the report's.
        healed: the metric after training, for points on which time was spent.
    """

    speedups: tuple[float, ...]
    zeros: float
    metric: float | None
    nbytes: int
    layers: int
    chosen: bool = False
    healed: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """The whole record.

    Attributes:
        model: file name, or "" for a model from memory.
        target, threads, batch: what was compiled and measured for.
        decisions: one a layer, in the order of the graph.
        timings: the whole model, dense against the artifact, one a batch size; empty where nothing could be measured.
        survey: only for the plain command on a model with dense layers.
        verification: None where the model could not be run.
        fidelity, quality: None without calibration data.
        healing: None unless the weights were trained.
        frontier: the fastest last; only with a budget of speed or accuracy.
        dense_int8: None unless `dense_baseline` asks for it.
        reordered: which share of the saliency (weights squared times inputs squared) the blocks keep before and after
            channels were reordered; None where they were not.
        removed: with the pattern "structured" the share of the weights that is gone, of the layers that can get
            smaller; None with others.
        zeros: the share of zeros of all weights in the layers that may be pruned, those that stayed dense included;
            None where there are none.
        asked: the share of zeros, or of weights to leave out, that was asked for; None where it was not, or where some
            layers had a share of their own.
        missed: which target was not reached and what stood in the way, or "".
        notes: what a user should know and no table shows: a warning a sentence.
        bytes_before, bytes_after: sizes of the models, external data included.
        seconds: time the compilation took.
    """

    model: str
    target: str
    threads: int
    batch: tuple[int, ...]
    decisions: tuple[Decision, ...]
    timings: tuple[Timing, ...] = ()
    survey: tuple[SurveyPoint, ...] = ()
    verification: Verification | None = None
    fidelity: Fidelity | None = None
    quality: Quality | None = None
    healing: Healing | None = None
    frontier: tuple[FrontierPoint, ...] = ()
    dense_int8: DenseInt8 | None = None
    removed: float | None = None
    zeros: float | None = None
    asked: float | None = None
    missed: str = ""
    reordered: tuple[float, float] | None = None
    notes: tuple[str, ...] = field(default=())
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0

    @property
    def sparse_layers(self) -> int:
        """Layers that run as sparse operators."""
        return sum(decision.choice == "sparse" for decision in self.decisions)

    @property
    def smaller_layers(self) -> int:
        """Layers from which channels were left out."""
        return sum(decision.shape_after is not None for decision in self.decisions)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Indented JSON, keys in a fixed order."""
        return json.dumps(self.to_dict(), indent=2) + "\n"
