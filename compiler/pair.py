"""An artifact and the dense model that it is held against, open side by side, with the same inputs for both."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir import SparsecError
from .artifact import LIBRARY, MODEL, REPORT, read_manifest
from .frontend import read
from .machine import machine_of
from .probe import probe

if TYPE_CHECKING:
    import onnxruntime

    from .config import CompileConfig
    from .context import Progress
    from .machine import Machine
    from .probe import Workload


@dataclass(frozen=True)
class Pair:
    """Both sessions and what they run on.

    Attributes:
        artifact, model: the folder and the dense model's file.
        report: the artifact's `report.json`.
        machine: where both run: a GPU for an artifact that was made for one, where there is one.
        threads: of each session on a CPU.
        workload: inputs by batch size.
    """

    artifact: Path
    model: Path
    dense: onnxruntime.InferenceSession
    sparse: onnxruntime.InferenceSession
    report: dict[str, Any]
    machine: Machine
    threads: int
    workload: Workload


def open_pair(artifact: str | Path, model: str | Path, config: CompileConfig, progress: Progress | None = None) -> Pair:
    """Open both. Of `config` count batch, dims, threads, seed and inputs; what it leaves open is as in the report.

    Raises:
        SparsecError: either cannot be opened or run, or they are not two forms of one model.
        UsageError: batch sizes or inputs do not fit the model.
    """
    artifact, model = Path(artifact), Path(model)
    made_for = read_manifest(artifact).get("config", {})
    report = _read_report(artifact / REPORT)
    threads = config.threads or int(report.get("threads", 0)) or config.thread_count
    batch = config.batch if config.batch or config.inputs else tuple(report.get("batch", ()))
    dims = {**made_for.get("dims", {}), **config.dims}
    config = config.model_copy(update={"threads": threads, "batch": batch, "dims": dims})
    if progress is not None:
        progress.start("opening both models", None)
    program = read(model)
    machine = machine_of(read_manifest(artifact), threads)
    with tempfile.TemporaryDirectory() as folder:
        workload = probe(program, config, Path(folder), machine)
    if workload.failure:
        raise SparsecError(f"{model}: {workload.failure}")
    dense = machine.open(model)
    sparse = machine.open(artifact / MODEL, artifact / LIBRARY)
    _check_same_interface(dense, sparse, artifact, model)
    return Pair(artifact, model, dense, sparse, report, machine, threads, workload)


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SparsecError(f"{path}: the report is missing from the artifact; compile the model again") from None
    except ValueError as error:
        raise SparsecError(f"{path}: the report is damaged ({error}); compile the model again") from None
    if not isinstance(report, dict):
        raise SparsecError(f"{path}: the report is damaged (expected an object); compile the model again")
    return report


def _check_same_interface(
    dense: onnxruntime.InferenceSession, sparse: onnxruntime.InferenceSession, artifact: Path, model: Path
) -> None:
    for kind, ours, theirs in (
        ("inputs", sparse.get_inputs(), dense.get_inputs()),
        ("outputs", sparse.get_outputs(), dense.get_outputs()),
    ):
        found, expected = [value.name for value in ours], [value.name for value in theirs]
        if found != expected:
            raise SparsecError(
                f"{artifact} has the {kind} {', '.join(found)}, {model} has {', '.join(expected)}: give the model that "
                "the artifact was made from"
            )
