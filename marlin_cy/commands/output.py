"""The output of the commands: tables, JSON, progress.

rich is imported where it is used: a model's first token should not wait for the package that draws tables.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table

__all__ = [
    "LoadProgress",
    "console",
    "escape",
    "gigabytes",
    "mark",
    "megabytes",
    "note",
    "print_json",
    "rate",
    "runs",
    "table",
]

# A pipe has no width. This one is wide enough that tables are not cut.
PIPE_WIDTH = 200
PROGRESS_AFTER_SECONDS = 1.0


def console(stream: TextIO | None = None) -> Console:
    """A console on a stream, stdout by default. It uses colours on a terminal, unless NO_COLOR is set."""
    from rich.console import Console

    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def table(*columns: str) -> Table:
    """An empty table. A column whose name begins with ``>`` is aligned to the right."""
    from rich.table import Table

    result = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        result.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return result


def escape(text: str) -> str:
    """A text for a console, in which brackets are no markup."""
    from rich.markup import escape as escape_markup

    return escape_markup(text)


def note(text: str) -> None:
    """Print a line for the user on stderr."""
    print(f"marlin-cy: {text}", file=sys.stderr)


def print_json(document: object) -> None:
    """Print a document of types that JSON has. A NaN raises a ValueError."""
    print(json.dumps(document, indent=2, allow_nan=False))


def mark(good: bool) -> str:
    """A coloured "yes" or "no" for a table's cell."""
    return "[green]yes[/green]" if good else "[red]no[/red]"


def gigabytes(bytes_per_second: float) -> str:
    """``"30.5 GB/s"``: three digits; a GB is 10^9 bytes."""
    return f"{bytes_per_second / 1e9:#.3g} GB/s"


def rate(per_second: float) -> str:
    """A number of tokens a second: ``"1,234"`` or ``"12.3"``."""
    return f"{per_second:,.0f}" if per_second >= 999.5 else f"{per_second:#.3g}"


def megabytes(count: int) -> str:
    """``"1,234.5 MB"``; a MB is 10^6 bytes."""
    return f"{count / 1e6:,.1f} MB"


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
        self._verb = verb
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._hidden = False
        self._started = time.monotonic()

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: float, total: int, description: str) -> None:
        if self._bar is None and not self._show():
            return
        assert self._bar is not None
        if self._task is None:
            self._task = self._bar.add_task(description, total=self.parts)
        self._bar.update(self._task, completed=self.finished + done / total, description=description, refresh=True)

    def _show(self) -> bool:
        """Draw the bar if it is time; whether it is drawn."""
        if self._hidden or time.monotonic() - self._started < PROGRESS_AFTER_SECONDS:
            return False
        screen = console(sys.stderr)
        if not screen.is_terminal:
            self._hidden = True
            return False
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        # No thread redraws the bar: it would take time from the measurements between loads.
        self._bar = Progress(
            TextColumn(f"{self._verb} {{task.description}}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=screen,
            transient=True,
            auto_refresh=False,
        )
        self._bar.start()
        return True


def runs(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, with ranges: ``"0, 3-7"``."""
    parts: list[str] = []
    begin: int | None = None
    for position, number in enumerate(numbers):
        if begin is None:
            begin = number
        if position + 1 == len(numbers) or numbers[position + 1] != number + 1:
            parts.append(f"{begin}" if begin == number else f"{begin}-{number}")
            begin = None
    return ", ".join(parts)
