"""How long each option takes, dense against sparse, as the decision about a layer measures it."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING

from ...codegen.ort.library import build_library
from ...codegen.problem import Problem
from ...ir import Grid
from ..decide import Bench, compare_layer, predicted_timings
from ..formats import pack
from ..kernels import distinct_kernels, make_kernels, sparse_op
from ..plan import Candidate

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from ...ir import Layer, Program, Timing
    from ..context import Context
    from ..probe import Workload
    from .options import Options

# What kernels that serve all densities are made for.
ANY_DENSITY = 0.5


def time_options(
    program: Program, layers: Sequence[Layer], options: Options, workload: Workload, context: Context
) -> Options:
    """The options with `timings` and the packed size. Of those that pose the same problem one is timed for all."""
    candidates: dict[Hashable, Candidate] = {}
    keys: dict[tuple[str, int], Hashable] = {}
    sizes: dict[tuple[str, int], int] = {}
    for layer in layers:
        # Without a sparse operator there is nothing to time.
        for i, option in enumerate(options[layer.name] if not layer.obstacle else ()):
            matrix, x = pack(layer, option.kept.matrix, option.form, context.config)
            shapes = tuple(workload.shapes[batch][layer.name] for batch in workload.batches)
            operators = tuple(node.op_type for node in layer.nodes)
            form = (operators, layer.coded, layer.transpose_x, layer.transpose_y)
            key = (Problem.of(matrix, layer.epilogue, x), shapes, *form)
            keys[layer.name, i], sizes[layer.name, i] = key, matrix.nbytes
            # A grid's numbers do not change the time.
            grid = Grid(1.0, 0) if x == "static" else None
            candidates.setdefault(key, Candidate(layer, matrix, pruned=True, x=x, x_grid=grid))
    timings = _time(program, candidates, workload, context)
    timed = dict(options)
    for name in dict.fromkeys(name for name, _ in keys):
        found = _comparable([timings[keys[name, i]] for i in range(len(options[name]))])
        timed[name] = tuple(
            dataclasses.replace(option, timings=own, nbytes=sizes[name, i])
            for i, (option, own) in enumerate(zip(options[name], found, strict=True))
        )
    return timed


def _comparable(timings: Sequence[tuple[Timing, ...]]) -> list[tuple[Timing, ...]]:
    """The same with one dense time for all options of a layer, at each batch size their median.

    What else the machine does slows both sides of a comparison, so that ratios hold better than times: one layer of
    MiniLM took 1.4 to 2.9 ms dense while its options were measured one after the other, and by differences 70 % zeros
    seemed to bring more than 95 %. A busy machine still moves ratios: this layer's 1.7x was 1.3x when it was quiet.
    """
    dense = [statistics.median(timing.dense_us for timing in one_batch) for one_batch in zip(*timings, strict=True)]
    return [
        tuple(
            dataclasses.replace(timing, dense_us=own, sparse_us=own / timing.speedup)
            for timing, own in zip(option, dense, strict=True)
        )
        for option in timings
    ]


def _time(
    program: Program, candidates: dict[Hashable, Candidate], workload: Workload, context: Context
) -> dict[Hashable, tuple[Timing, ...]]:
    named = {str(number): candidate for number, candidate in enumerate(candidates.values())}
    if context.target.cuda:
        tuned = make_kernels(named, workload, context)
    else:
        # A CPU's first guess of a schedule is the same at any density; only chosen options are worth a search and code
        # of their own.
        guessing = dataclasses.replace(context, tuner=dataclasses.replace(context.tuner, effort="off", general=False))
        tuned = make_kernels(named, workload, guessing, density=ANY_DENSITY)
    if context.machine is None:
        found = {name: predicted_timings(tuned[name], candidate, workload) for name, candidate in named.items()}
        return dict(zip(candidates, found.values(), strict=True))
    library = context.folder / "options.so"
    build_library(distinct_kernels(tuned.values()), library, context.target.cpu.requires)
    threads, database = context.config.thread_count, context.tuner.database
    baseline = context.config.dense_baseline
    bench = Bench(library, context.folder, context.machine, threads, context.target, database, baseline)
    context.progress.start("measuring options", len(named))
    timings = {}
    for key, (name, candidate) in zip(candidates, named.items(), strict=True):
        timings[key] = compare_layer(program, candidate, sparse_op(candidate, tuned[name], context), workload, bench)
        context.progress.advance(str(candidate.matrix.pattern))
    return timings
