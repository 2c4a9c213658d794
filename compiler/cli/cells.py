"""Pieces that the tables share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .console import printable
from .text import factor, fold

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console, ConsoleOptions, RenderResult

# From this width on a table gives reasons a column of their own; below it they stand under the layer's name.
WIDE = 130
# Dense time / sparse time that is no difference, give or take.
_NOISE = (0.97, 1.03)
_INDENT = 2


@dataclass(frozen=True, slots=True)
class Name:
    """A layer's name, on at most two lines of whatever width its column gets, and words below it.

    Attributes:
        full: never leave anything out, however many lines that takes.
    """

    name: str
    below: tuple[Text, ...] = ()
    full: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        name, width = printable(self.name), max(options.max_width, 8)
        most = -(-len(name) // width) + 1 if self.full else 2
        yield from (Text(line) for line in fold(name, width, most))
        yield from (Padding(text, (0, 0, 0, _INDENT)) for text in self.below)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(len(printable(self.name)), *(text.cell_len + _INDENT for text in self.below), 16)
        return Measurement(16, longest)


def plain_table(*columns: tuple[str, str]) -> Table:
    """A table with a line under its head. Columns are ("<" or ">", head); none of these may wrap or be cut."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for side, head in columns:
        table.add_column(head, justify="right" if side == ">" else "left", no_wrap=True)
    return table


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values without lines; long values wrap in their own column."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, "dim"), Text(printable(value)))
    return table


def lines(texts: Iterable[Text | str]) -> Text:
    """One cell of several lines."""
    return Text("\n").join(text if isinstance(text, Text) else Text(text) for text in texts)


def speedup(value: float) -> Text:
    """Green where it is one, red where it is the opposite, plain within the noise."""
    style = "red" if value < _NOISE[0] else "green" if value > _NOISE[1] else ""
    return Text(factor(value), style=style)
