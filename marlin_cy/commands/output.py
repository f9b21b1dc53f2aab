"""The output of the commands: tables, JSON, progress."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["LoadProgress", "console", "gigabytes", "mark", "print_json", "table"]

# A pipe has no width. This one is wide enough that tables are not cut.
PIPE_WIDTH = 200
PROGRESS_AFTER_SECONDS = 1.0


def console(stream: TextIO | None = None) -> Console:
    """A console on a stream, stdout by default. It uses colours on a terminal, unless NO_COLOR is set."""
    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def table(*columns: str) -> Table:
    """An empty table. A column whose name begins with ``>`` is aligned to the right."""
    result = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        result.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return result


def print_json(document: object) -> None:
    """Print a document of types that JSON has. A NaN raises a ValueError."""
    print(json.dumps(document, indent=2, allow_nan=False))


def mark(good: bool) -> str:
    """A coloured "yes" or "no" for a table's cell."""
    return "[green]yes[/green]" if good else "[red]no[/red]"


def gigabytes(bytes_per_second: float) -> str:
    """``"30.5 GB/s"``: three digits; a GB is 10^9 bytes."""
    return f"{bytes_per_second / 1e9:#.3g} GB/s"


class LoadProgress:
    """A progress bar on stderr, shown after a second of work, and only where stderr is a terminal.

    The context manager gives itself. Call it as ``progress(done, total, description)`` for each part of the work.

    Parameters
    ----------
    verb : str
        Shown before the description.

    Attributes
    ----------
    parts : int
        Number of parts of the work.
    finished : int
        Number of parts that are complete.
    """

    def __init__(self, verb: str = "loading") -> None:
        self.parts = 1
        self.finished = 0
        self._console = console(sys.stderr)
        # No thread redraws the bar: it would take time from the measurements between loads.
        self._bar = Progress(
            TextColumn(f"{verb} {{task.description}}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            auto_refresh=False,
        )
        self._task: TaskID | None = None
        self._started = time.monotonic()

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A bar that was not started would still print a line break.
        if self._task is not None:
            self._bar.stop()

    def __call__(self, done: float, total: int, description: str) -> None:
        if self._task is None:
            if not self._console.is_terminal or time.monotonic() - self._started < PROGRESS_AFTER_SECONDS:
                return
            self._bar.start()
            self._task = self._bar.add_task(description, total=self.parts)
        self._bar.update(self._task, completed=self.finished + done / total, description=description, refresh=True)
