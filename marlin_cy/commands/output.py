"""What the commands print with: tables, JSON, progress."""

import json
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["LoadProgress", "console", "gigabytes", "mark", "print_json", "table"]

# A pipe has no width, and a table cut to a guess is of no use to whoever reads it.
PIPE_WIDTH = 200
PROGRESS_AFTER_SECONDS = 1.0


def console(stream=None):
    """A console on a stream, stdout when left out: in colour on a terminal unless NO_COLOR is set."""
    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def table(*columns):
    """An empty table; a column whose name begins with ``>`` is a number's, flush right."""
    result = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        result.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return result


def print_json(document):
    """Print a document of JSON's own types; NaN is not among them and raises ValueError."""
    print(json.dumps(document, indent=2, allow_nan=False))


def mark(good):
    """A yes or a no, in colour, for a table's cell."""
    return "[green]yes[/green]" if good else "[red]no[/red]"


def gigabytes(bytes_per_second):
    """``"30.5 GB/s"``, with 10^9 bytes a GB; three digits."""
    return f"{bytes_per_second / 1e9:#.3g} GB/s"


class LoadProgress:
    """A progress bar on stderr for what takes more than a second; none where stderr is no terminal.

    A context manager; what it gives is called as ``progress(done, total, description)``, for one
    part of the work after the other.

    Parameters
    ----------
    verb : str
        What is being done.

    Attributes
    ----------
    parts : int
        How many parts there are.
    finished : int
        How many of them are done.
    """

    def __init__(self, verb="loading"):
        self.parts = 1
        self.finished = 0
        self._console = console(sys.stderr)
        # Drawn only when called: a thread that redraws would take time from what is measured between loads.
        self._bar = Progress(
            TextColumn(f"{verb} {{task.description}}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            auto_refresh=False,
        )
        self._task = None
        self._started = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        # A bar that never started would still end its line.
        if self._task is not None:
            self._bar.stop()

    def __call__(self, done, total, description):
        if self._task is None:
            if not self._console.is_terminal or time.monotonic() - self._started < PROGRESS_AFTER_SECONDS:
                return
            self._bar.start()
            self._task = self._bar.add_task(description, total=self.parts)
        self._bar.update(self._task, completed=self.finished + done / total, description=description, refresh=True)
