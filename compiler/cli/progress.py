"""What the library reports while it works, as a bar on standard error."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from .console import errors, printable
from .text import shorten

if TYPE_CHECKING:
    from types import TracebackType

# Shorter work shows nothing.
_PATIENCE = 1.0
_BAR = 20


class Bars:
    """The library's `Progress` on a terminal: one line, that goes when the work is done.

    Nothing is drawn between the library's reports: a thread that redraws would compete with what is being timed.

    Args:
        quiet: draw nothing.
        verbose: leave a line with the seconds of each stage, on a terminal or not.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self._console = errors()
        self._verbose = verbose and not quiet
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=_BAR, pulse_style="bar.back"),
            TextColumn("{task.fields[steps]}"),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._stage, self._begun = "", 0.0
        self._task: TaskID | None = None
        self._lock = threading.Lock()
        self._shown = self._over = False
        self._timer = threading.Timer(_PATIENCE, self._show)
        self._timer.daemon = True
        self._drawing = self._console.is_terminal and not self._console.is_dumb_terminal and not quiet

    def __enter__(self) -> Bars:
        if self._drawing:
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._over = True
        self._timer.cancel()
        if self._shown:
            self._bars.stop()
        if kind is None:
            self._end_stage()

    def start(self, stage: str, total: int | None) -> None:
        """A new stage of `total` steps, or of an unknown number."""
        self._end_stage()
        self._stage, self._begun = stage, time.perf_counter()
        self._task = self._bars.add_task(printable(stage), total=total, steps=_steps(0, total), detail="")
        self._draw()

    def advance(self, detail: str = "") -> None:
        """One step of the stage is done; `detail` says what comes or came."""
        if self._task is None:
            return
        task = self._bars.tasks[0]
        steps = _steps(int(task.completed) + 1, None if task.total is None else int(task.total))
        # One line, whatever it says.
        room = self._console.width - len(self._stage) - _BAR - len(steps) - 4
        self._bars.update(self._task, advance=1, steps=steps, detail=shorten(printable(detail), max(room, 4)))
        self._draw()

    def _end_stage(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
            if self._verbose:
                self._console.print(f"{time.perf_counter() - self._begun:6.1f} s  {printable(self._stage)}")

    def _draw(self) -> None:
        if self._shown:
            self._bars.refresh()

    def _show(self) -> None:
        with self._lock:
            if not self._over:
                self._bars.start()
                self._shown = True


def _steps(done: int, total: int | None) -> str:
    return "" if total is None else f"{done}/{total}"
