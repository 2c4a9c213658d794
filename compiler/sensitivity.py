"""How much each layer minds being pruned, and what that would bring: the table that budgets are spent by."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir import UsageError
from .budget import Fitting
from .context import Progress, Silent, make_context
from .frontend import read
from .plan import make_plan
from .probe import probe

if TYPE_CHECKING:
    import onnx

    from .config import CompileConfig


@dataclass(frozen=True, slots=True)
class OptionSummary:
    """One layer pruned in one way, all others dense.

    Attributes:
        pattern: as text.
        zeros: share of zeros reached.
        layer_error: relative error of the layer's outputs (root of the mean square).
        error: the same of the model's outputs.
        speedups: of the layer alone, one a batch size; empty where it has no sparse operator.
    """

    pattern: str
    zeros: float
    layer_error: float
    error: float
    speedups: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """A layer and its options, the least sparse first.

    Attributes:
        shape: (out, in).
        obstacle: why it can have no sparse operator, or "".
    """

    name: str
    op_type: str
    shape: tuple[int, int]
    obstacle: str
    options: tuple[OptionSummary, ...]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The table.

    Attributes:
        model: file name.
        batch: batch sizes of the speedups.
        samples: what the weights were fitted to.
        source: where the data comes from.
        layers: in the order of the graph.
        notes: what a user should know of the data.
    """

    model: str
    batch: tuple[int, ...]
    samples: int
    source: str
    layers: tuple[LayerSensitivity, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)


def sensitivity(
    model: str | Path | bytes | onnx.ModelProto, config: CompileConfig, progress: Progress | None = None
) -> Sensitivity:
    """Solve every layer at several sparsities, alone, and measure errors and times; nothing is written.

    Args:
        model: a path, the bytes of a file, or a `ModelProto`.
        config: with `calib`; patterns, batch sizes, method as for `compile`.
        progress: is told what happens.

    Raises:
        SparsecError: the model or the data cannot be read, or do not fit.
        UsageError: there is no data, or no layer that could be pruned.
    """
    if config.calib is None:
        raise UsageError("sensitivity needs calibration data: add --calib DATA")
    if config.structured:
        raise UsageError("sensitivity prunes one layer at a time, and channels belong to several: leave structured out")
    with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
        context = make_context(config, Path(folder), progress or Silent())
        program = read(model)
        # Every layer that has weights enough counts; at which sparsity it was planned does not.
        planned = config.model_copy(update={"sparsity": 0.99, "prune_all": True})
        plan = make_plan(program, planned, context.target)
        workload = probe(program, config, context.folder, context.machine)
        timed = bool(workload.feeds) and (context.machine is not None or bool(context.target.cuda))
        fitting = Fitting(program, plan, workload, context, timed)
        if not fitting.layers:
            raise UsageError("no layer of the model could be pruned: 'sparsec inspect' says why")
        return Sensitivity(
            model=program.source.name if program.source else "",
            batch=workload.batches,
            samples=fitting.calibration.samples,
            source=fitting.calibration.source,
            layers=tuple(
                LayerSensitivity(
                    name,
                    layer.op_type,
                    (layer.out_features, layer.in_features),
                    layer.obstacle,
                    tuple(
                        OptionSummary(
                            option.pattern,
                            option.zeros,
                            option.layer_error**0.5,
                            option.error**0.5,
                            tuple(timing.speedup for timing in option.timings),
                        )
                        for option in fitting.options[name]
                    ),
                )
                for name, layer in fitting.layers.items()
            ),
            notes=fitting.notes,
        )
