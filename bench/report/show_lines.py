"""Lines of measured claims, each beside its bar."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common.results import verdict
from bench.common.timing import Spread
from marlin_cy.commands.output import table

__all__ = ["measured_line", "print_claims", "show_table", "skipped_line"]


def measured_line(
    number: str, what: str, comparison: str | None, bar: float | None, measured: Spread
) -> dict[str, Any]:
    """The JSON object of a measured claim.

    Parameters
    ----------
    number : str
        Digits, and a letter for one of several lines about the same thing.
    what : str
    comparison : {">=", "<="} or None
    bar : float or None
        None: there is no bar.
    measured : Spread
        Its median is compared with the bar.
    """
    passed = None
    if bar is not None:
        passed = measured.median >= bar if comparison == ">=" else measured.median <= bar
    return _line(number, what, comparison, bar, measured._asdict(), passed, None)


def skipped_line(number: str, what: str, comparison: str | None, bar: float | None, reason: str) -> dict[str, Any]:
    """The JSON object of a claim that was not measured."""
    return _line(number, what, comparison, bar, None, None, reason)


def _line(
    number: str,
    what: str,
    comparison: str | None,
    bar: float | None,
    measured: dict[str, float] | None,
    passed: bool | None,
    skipped: str | None,
) -> dict[str, Any]:
    return {
        "line": number,
        "what": what,
        "comparison": comparison,
        "bar": bar,
        "measured": measured,
        "passed": passed,
        "skipped": skipped,
    }


def print_claims(document: Mapping[str, Any], screen: Console) -> None:
    """Print the machine and the lines of a document."""
    machine = document["machine"]
    screen.print(f"{machine['cpu']}: {machine['threads']} threads, ISA {machine['isa']}", markup=False)
    screen.print(show_table(document["show"]))


def show_table(lines: Sequence[dict[str, Any]]) -> Table:
    """The table of lines, by their numbers."""
    result = table("line", "what", ">bar", ">measured", ">p10–p90", "verdict")
    for line in sorted(lines, key=lambda line: (int(re.sub(r"\D", "", line["line"])), line["line"])):
        measured = line["measured"]
        if measured is None:
            outcome, figure, middle = f"skipped: {line['skipped']}", "—", "—"
        else:
            figure = f"{measured['median']:#.3g}"
            varies = measured["p10"] != measured["p90"]
            middle = f"{measured['p10']:#.3g}–{measured['p90']:#.3g}" if varies else "exact"
            outcome = verdict(line["passed"])
        bar = "" if line["bar"] is None else f"{'≥' if line['comparison'] == '>=' else '≤'} {line['bar']:g}"
        result.add_row(line["line"], line["what"], bar, figure, middle, outcome)
    return result
