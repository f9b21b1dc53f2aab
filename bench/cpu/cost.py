"""``python -m bench cost``: predicts the time of layers, measures it, and prints both. COST_MODEL.md explains more."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.common.machine import describe, restrict_to, spread_over_cores
from bench.common.options import COMPUTE_DTYPES, add_model, add_quick, names, positive, values
from bench.common.results import counted
from bench.common.shapes import MODELS, TINY, ModelShape

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_options", "markdown", "run"]

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
QUICK_TOKENS = (1, 16)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--threads", type=values(positive), metavar="A,B", help="default: 1, 2, 4 ... and all CPUs")
    add_model(parser)
    parser.add_argument("--tokens", type=values(positive), default=TOKENS, metavar="A,B")
    parser.add_argument("--compute-dtypes", type=names(COMPUTE_DTYPES), default=COMPUTE_DTYPES, metavar="A,B")
    parser.add_argument("--isa", help="instruction set (default: the best one here)")
    parser.add_argument("--repeats", type=positive, default=7, metavar="N", help="rounds (default: 7)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="save the figures as JSON")
    parser.add_argument("--markdown", action="store_true", help="also print the tables of COST_MODEL.md")
    add_quick(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, predict and print; returns the exit code."""
    if arguments.threads:
        restrict_to(spread_over_cores(max(arguments.threads)))
    # These load OpenMP runtimes, which must see the CPUs that were chosen.
    from bench.cpu.cost_measure import CostMeasurement
    from marlin_cy.commands.output import console
    from marlin_cy.cpu import CpuBackend

    backend = CpuBackend()
    widest = backend.new_context(isa=arguments.isa)
    model = TINY if arguments.quick else MODELS[arguments.model]
    tokens = QUICK_TOKENS if arguments.quick else arguments.tokens
    threads = arguments.threads or sorted({*(2**i for i in range(widest.num_threads.bit_length())), widest.num_threads})
    measurement = CostMeasurement(backend, widest.isa, model, tokens, arguments.repeats, arguments.quick)
    screen = console()
    document: dict[str, Any] = {
        "mode": "cost",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe(widest, None),
        "model": asdict(model),
        "runs": [],
    }
    for count in threads:
        for dtype in arguments.compute_dtypes:
            one = measurement.measure(count, dtype)
            document["runs"].append(one)
            _print(screen, model, one)
    if arguments.markdown:
        print(markdown(document))
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return 0


def markdown(document: dict[str, Any]) -> str:
    """The tables of COST_MODEL.md: parameters, then predicted and measured times, one column per run."""
    model, runs = document["model"], document["runs"]
    machines = [one["parameters"] for one in runs]
    heads = [f"{counted(one['threads'], 'thread')}, {one['compute_dtype']}" for one in machines]
    rows = [
        ("`read`, GB/s", [f"{one['read'] / 1e9:.1f}" for one in machines]),
        ("`start`, µs", [f"{one['start'] * 1e6:.1f}" for one in machines]),
        *(
            (
                f"`kernel`, GFLOP/s, {counted(count, 'row')}",
                [f"{2 * count / one['kernel'][count] / 1e9:.0f}" for one in machines],
            )
            for count in machines[0]["kernel"]
        ),
        *(
            (f"`overlap`, {counted(count, 'row')}", [f"{one['overlap'][count]:.1f}" for one in machines])
            for count in machines[0]["overlap"]
        ),
        ("`prepare`, ns per value", [f"{one['prepare'] * 1e9:.2f}" for one in machines]),
        ("`finish`, ns per value", [f"{one['finish'] * 1e9:.2f}" for one in machines]),
        (
            "rows from which arithmetic takes longer than reading",
            [str(one["arithmetic_from_rows"]["gate_up"]) for one in runs],
        ),
    ]
    lines = [["", *heads], ["---"] * (1 + len(heads)), *([name, *cells] for name, cells in rows), []]
    lines += [["tokens", "experts hit", "rows per expert", *heads], ["---"] * (3 + len(heads))]
    for layers in zip(*(one["layers"] for one in runs), strict=True):
        tokens, hit = layers[0]["tokens"], layers[0]["experts_hit"]
        cells = [
            f"{1e3 * one['predicted']['total']:.3g} / {1e3 * one['measured']:.3g} = "
            f"{one['predicted']['total'] / one['measured']:.2f}"
            for one in layers
        ]
        lines.append([str(tokens), f"{hit:.1f}", f"{tokens * model['top_k'] / hit:.1f}", *cells])
    return "\n".join(f"| {' | '.join(cells)} |" if cells else "" for cells in lines)


def _print(screen: Console, model: ModelShape, one: dict[str, Any]) -> None:
    """The tables of one run."""
    from marlin_cy.commands.output import table

    machine = one["parameters"]
    speeds = ", ".join(f"{rows}: {2 * rows / seconds / 1e9:.0f}" for rows, seconds in machine["kernel"].items())
    overlaps = ", ".join(f"{rows}: {order:.1f}" for rows, order in machine["overlap"].items())
    screen.print(
        f"\n[bold]{counted(machine['threads'], 'thread')}, {machine['compute_dtype']}[/bold]: "
        f"read {machine['read'] / 1e9:.1f} GB/s, start {machine['start'] * 1e6:.1f} µs, "
        f"prepare {machine['prepare'] * 1e9:.3f} ns per value, finish {machine['finish'] * 1e9:.3f} ns per value\n"
        f"GFLOP/s of a block by rows: {speeds}\n"
        f"Overlap of reading and arithmetic by rows: {overlaps}\n"
        "Arithmetic takes longer than reading from "
        + ", ".join(f"{rows} rows per expert on ({name})" for name, rows in one["arithmetic_from_rows"].items())
    )
    terms = ("start", "gate_up", "down", "prepare", "finish", "total")
    result = table(
        ">tokens",
        ">experts\nhit",
        ">rows per\nexpert",
        *(f">{name}\nµs" for name in terms),
        ">measured\nµs",
        ">p10–p90",
        ">total ÷\nmeasured",
    )
    for row in one["layers"]:
        predicted, measured, middle = row["predicted"], row["measured"], row["spread"]
        result.add_row(
            str(row["tokens"]),
            f"{row['experts_hit']:.1f}",
            f"{row['tokens'] * model.top_k / row['experts_hit']:.1f}",
            *(f"{predicted[name] * 1e6:.0f}" for name in terms),
            f"{measured * 1e6:.0f}",
            f"{middle['p10'] * 1e6:.0f}–{middle['p90'] * 1e6:.0f}",
            f"{predicted['total'] / measured:.2f}",
        )
    screen.print(result)
