"""The tables of ``python -m bench decoder``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common.results import counted
from bench.report.show_lines import show_table
from marlin_cy.commands.output import table

__all__ = ["print_decoder"]


def print_decoder(document: Mapping[str, Any], screen: Console) -> None:
    """Print the runs of a document, and the claims with their bars."""
    machine, model = document["machine"], document["model"]
    screen.print(
        f"{machine['cpu']}: {machine['threads']} threads, ISA {machine['isa']}; {counted(model['layers'], 'layer')}",
        markup=False,
    )
    for name, version in document["sides"].items():
        if version is not None:
            screen.print(f"{name} {version}", markup=False)
    if document["cases"]:
        screen.print(_runs(document["cases"]))
    screen.print(show_table(document["show"]))
    if "read, GB/s" in document["figures"]:
        screen.print(f"Read bandwidth: {document['figures']['read, GB/s']['median']:.1f} GB/s")


def _runs(cases: list[Mapping[str, Any]]) -> Table:
    result = table(
        "run", "side", ">tokens/s", ">p10–p90", ">µs a layer\nand step", ">× int16", ">× int8", "not measured, because"
    )
    for case in cases:
        what = f"{case['part']} of {case['tokens']} at {case['depth']}"
        if case["sequences"] > 1:
            what += f", {case['sequences']} sequences"
        for name, rate in case["tokens_per_second"].items():
            if name == "llama.cpp" and "llama_options" in case:  # it repeats one of those with options
                continue
            ratios = [case["ratio"].get(dtype, {}).get(name) for dtype in ("int16", "int8")]
            result.add_row(
                what,
                name,
                f"{rate['median']:#.4g}",
                f"{rate['p10']:#.4g}–{rate['p90']:#.4g}",
                f"{case['us_a_layer'][name]['median']:.1f}",
                *("" if ratio is None else f"{ratio['median']:.2f}" for ratio in ratios),
                "",
            )
            what = ""
        for name, reason in case["skipped"].items():
            result.add_row("", name, "—", "—", "—", "", "", reason)
    return result
