"""Which pattern layers get under a budget when nobody names one: the finest that this machine runs nearly as fast."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ...ir import parse_pattern
from ...passes.prune import prune_by_norm
from ..config import INTEGER_PATTERN, PAIR_PATTERN, PATTERN
from ..formats import Form, form_of, kinds_of
from .cache import stored_pattern
from .options import Kept, Option
from .times import time_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...ir import Layer, Program
    from ..context import Context
    from ..plan import Plan
    from ..probe import Workload
    from .options import Options

# From the finest on: the narrower a group, the more of the accuracy it keeps at the same share of zeros (ResNet-20 at
# 70 %, repaired: 65.4 in groups of 16, 68.2 of 8, 78.7 of single weights), and the more often an index is read.
GROUPS = ("group:2", "group:4", "group:8", PATTERN)
# The same where products are of integers, four inputs at a time.
FOURS = ("block:4x4", "block:8x4", INTEGER_PATTERN)
# And of bfloat16, two at a time.
PAIRS = ("block:4x2", "block:8x2", PAIR_PATTERN)
# How much longer than with the fastest the layers may take: what a step of a tenth in zeros is worth around 60 %.
SLACK = 1.25
# The share of zeros at which they are compared.
ZEROS = 0.7


def with_pattern(program: Program, plan: Plan, workload: Workload, context: Context) -> Context:
    """The context with a pattern: without a budget, on GPUs and where nothing can be measured the default one."""
    layers = [pruned.layer for pruned in plan.pruned.values()]
    config = context.config
    measured = config.budgeted and context.machine is not None and not context.target.cuda and bool(workload.feeds)
    pattern = stored_pattern(config.solutions) if config.pick is not None else None
    if pattern is None and not layers:
        pattern = config.patterns[0]
    if pattern is None:
        kinds = kinds_of(layers[0], config)
        of_each = [form_of(layers[0], config.model_copy(update={"values": str(kind)})) for kind in kinds]
        if measured:
            found = [_fastest(program, layers, form, workload, context) for form in of_each]
        else:
            found = [form.pattern for form in of_each]
        pattern = ",".join(dict.fromkeys(found))
    return dataclasses.replace(context, config=config.model_copy(update={"pattern": pattern}))


def _fastest(program: Program, layers: Sequence[Layer], default: Form, workload: Workload, context: Context) -> str:
    choices = {INTEGER_PATTERN: FOURS, PAIR_PATTERN: PAIRS}.get(default.pattern, GROUPS)
    # Of layers of the same shape one tells of all.
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        if not layer.obstacle:
            groups.setdefault((layer.weight.shape, layer.epilogue), []).append(layer)
    first = [members[0] for members in groups.values()]
    if not first:
        return choices[-1]
    taken, values = {}, str(default.values)
    for text in choices:
        pattern = parse_pattern(text)
        options: Options = {
            layer.name: (Option(text, values, ZEROS, Kept.of(prune_by_norm(layer.weight, pattern, ZEROS)), ZEROS, 0.0),)
            for layer in first
        }
        timed = time_options(program, first, options, workload, context)
        # A dense layer takes as long as it has weights, nearly.
        taken[text] = sum(
            len(members) * members[0].weight.size / timing.speedup
            for members in groups.values()
            for timing in timed[members[0].name][0].timings
        )
    return next(text for text in choices if taken[text] <= SLACK * min(taken.values()))
