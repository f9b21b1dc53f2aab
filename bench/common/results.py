"""Saving results, and functions that all tables of results share."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["counted", "save", "verdict", "warn_of_load"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
BUSY_LOAD = 0.5  # a load average above this, before anything is measured, comes from other processes


def save(document: dict[str, Any], output: Path | None) -> Path:
    """Write a JSON document to ``output``, or to a new file in ``bench/results/``; returns the path."""
    path = output or RESULTS / f"{document['mode']}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def verdict(passed: bool | None) -> str:
    """The table cell of a bar: met, missed, or empty if there is no bar."""
    return {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}[passed]


def warn_of_load(screen: Console, load_average: float) -> None:
    """Print a warning if other processes use this machine."""
    if load_average > BUSY_LOAD:
        screen.print(
            f"[yellow]Load average {load_average:.1f} at the start: other processes use this machine.[/yellow]"
        )


def counted(count: int, noun: str) -> str:
    """``"1 row"``, ``"4 rows"``."""
    return f"{count} {noun}{'s' * (count != 1)}"
