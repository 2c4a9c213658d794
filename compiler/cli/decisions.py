"""The decision table: what became of each layer, and why."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.text import Text

from .cells import WIDE, Name, lines, plain_table, speedup
from .console import printable
from .text import number, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from ...ir import Decision, Timing

    Group = Sequence[Decision]

# More layers than this are shown in groups.
MAX_ROWS = 40


def decision_table(decisions: Sequence[Decision], width: int, full: bool = False) -> Table:
    """One row a layer; of many layers one a group of the same fate, unless `full`, which also shows whole names."""
    groups = [(d,) for d in decisions] if full or len(decisions) <= MAX_ROWS else grouped(decisions)
    timed = any(decision.timings for decision in decisions)
    return (_wide if width >= WIDE else _narrow)(groups, timed, full)


def _wide(groups: Sequence[Group], timed: bool, full: bool) -> Table:
    table = plain_table(("<", "layer"), ("<", "op"), (">", "weight"), (">", "zeros"), ("<", "choice"))
    table.columns[0].no_wrap = False
    table.columns[0].max_width = 40
    _add_timing_columns(table, timed)
    table.add_column("why", ratio=1)
    table.expand = True
    for group in groups:
        first = group[0]
        table.add_row(
            Name(common_name(group), full=full),
            _operator(group),
            _shape(first),
            _zeros(first),
            lines([_choice(first), *(Text(words, "dim") for words in _form(first))]),
            *(_timing_cells(_medians(group)) if timed else ()),
            Text(_reason(group)),
        )
    return table


def _narrow(groups: Sequence[Group], timed: bool, full: bool) -> Table:
    table = plain_table(("<", "layer"), (">", "zeros"))
    table.columns[0].no_wrap = False
    _add_timing_columns(table, timed)
    for group in groups:
        first = group[0]
        what = [_operator(group), _shape(first), *_form(first)]
        below = (Text(" ".join(filter(None, what)), "dim"), Text.assemble(_choice(first), ": ", _reason(group)))
        table.add_row(
            Name(common_name(group), below, full), _zeros(first), *(_timing_cells(_medians(group)) if timed else ())
        )
    return table


def _add_timing_columns(table: Table, timed: bool) -> None:
    for head in ("batch", "dense us", "sparse us", "speedup") if timed else ():
        table.add_column(head, justify="right", no_wrap=True)


def _timing_cells(timings: Sequence[Timing]) -> tuple[Text, ...]:
    """Batch, dense, sparse and speedup, a line a batch size; "~" before what was predicted."""
    about = ["~" if timing.predicted else "" for timing in timings]
    return (
        lines(f"{timing.batch}" for timing in timings),
        lines(f"{sign}{number(timing.dense_us)}" for sign, timing in zip(about, timings, strict=True)),
        lines(f"{sign}{number(timing.sparse_us)}" for sign, timing in zip(about, timings, strict=True)),
        lines(Text(sign) + speedup(timing.speedup) for sign, timing in zip(about, timings, strict=True)),
    )


def _operator(group: Group) -> str:
    return f"{len(group)} x {group[0].op_type}" if len(group) > 1 else group[0].op_type


def _shape(decision: Decision) -> str:
    before = f"{decision.shape[0]}x{decision.shape[1]}"
    after = decision.shape_after
    return before if after is None else f"{before} -> {after[0]}x{after[1]}"


def _zeros(decision: Decision) -> Text:
    before, after = percent(decision.zeros_before), percent(decision.zeros_after)
    return Text(before) if before == after else lines([f"{before} ->", after])


def _form(decision: Decision) -> list[str]:
    """The pattern, and what is stored and multiplied where that is not what the model has."""
    values = decision.values if decision.values != "fp32" else ""
    words = f"{values} products" if decision.inputs not in ("", "float") else values
    return [text for text in (decision.pattern, words) if text]


def _choice(decision: Decision) -> Text:
    return Text(decision.choice, "bold green" if decision.choice != "dense" else "bold")


def grouped(decisions: Sequence[Decision]) -> list[Group]:
    """Decisions that say the same of layers whose names differ in numbers only, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[Decision]] = {}
    for d in decisions:
        zeros = (percent(d.zeros_before), percent(d.zeros_after))
        batches = tuple(timing.batch for timing in d.timings)
        name, reason = re.sub(r"\d+", "#", d.layer), re.sub(r"\d[\d.,]*", "#", d.reason)
        key = (name, d.op_type, d.shape, d.shape_after, d.choice, *_form(d), reason, zeros, batches)
        groups.setdefault(key, []).append(d)
    return list(groups.values())


def common_name(group: Group) -> str:
    """The names of all as one: "layer.0/fc1", "layer.7/fc1" -> "layer.*/fc1". Numbers that are the same in all stay."""
    parts = [re.split(r"(\d+)", decision.layer) for decision in group]
    return "".join(same[0] if len(set(same)) == 1 else "*" for same in zip(*parts, strict=True))


def _reason(group: Group) -> str:
    """The reason of all, or that of the slowest where measured numbers in it differ."""
    slowest = min(group, key=lambda d: min((timing.speedup for timing in d.timings), default=0.0))
    same = len({decision.reason for decision in group}) == 1
    return printable(slowest.reason if same else f"{slowest.reason} (one of them)")


def _medians(group: Group) -> list[Timing]:
    """At each batch size the medians over the group."""
    return [
        replace(
            same[0],
            dense_us=statistics.median(timing.dense_us for timing in same),
            sparse_us=statistics.median(timing.sparse_us for timing in same),
            speedup=statistics.median(timing.speedup for timing in same),
        )
        for same in zip(*(decision.timings for decision in group), strict=True)
    ]
