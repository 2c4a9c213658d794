"""Dense against sparse, whole models, in turn in one process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..ir import Timing
    from .context import Progress
    from .pair import Pair


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What was measured, and how.

    Attributes:
        artifact, model: paths.
        machine: "CPU" or "GPU 0".
        threads: of each session on a CPU.
        inputs: "random, seed 0" or the file they came from.
        pairs: runs of each side, alternately.
        timings: one a batch size.
    """

    artifact: str
    model: str
    machine: str
    threads: int
    inputs: str
    pairs: int
    timings: tuple[Timing, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)


def bench(pair: Pair, pairs: int = 15, progress: Progress | None = None) -> Benchmark:
    """Time both sides of `pair` alternately, `pairs` times each, at every batch size.

    Raises:
        SparsecError: ONNX Runtime cannot run one of them.
    """
    workload = pair.workload
    if progress is not None:
        progress.start("timing dense against sparse", len(workload.batches))
    timings = []
    for batch, feeds in workload.feeds.items():
        measured = pair.machine.compare(pair.dense, pair.sparse, feeds, pairs)
        timings.append(measured.timing(batch, batch))
        if progress is not None:
            progress.advance(f"batch {batch}")
    return Benchmark(
        artifact=str(pair.artifact),
        model=str(pair.model),
        machine=str(pair.machine),
        threads=pair.threads,
        inputs=workload.inputs,
        pairs=pairs,
        timings=tuple(timings),
    )
