"""``python -m bench products``, ``layers`` and ``sweep``: options, and the JSON document around the measured rows."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from bench.common.machine import available_memory, describe, siblings_among
from bench.common.options import (
    COMPUTE_DTYPES,
    add_cpus,
    add_output,
    add_quick,
    add_sweep,
    names,
    positive,
    restrict_cpus,
    values,
)
from bench.common.results import save, warn_of_load
from bench.common.shapes import MODELS, TINY

if TYPE_CHECKING:
    from rich.console import Console

    from bench.peers.torch_calls import TorchPeers
    from marlin_cy.cpu import CpuContext

__all__ = ["SCHEMA_VERSION", "add_options", "add_timing", "document_of", "run", "timing_of"]

SCHEMA_VERSION = 1
QUICK_ROWS = (1, 16)
SWEEP_ROUNDS, QUICK_ROUNDS = 9, 2


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the three commands."""
    add_cpus(parser)
    parser.add_argument("--isa", type=values(str), default=(), metavar="A,B", help="default: the best one here")
    add_sweep(parser)
    parser.add_argument("--compute-dtypes", type=names(COMPUTE_DTYPES), default=COMPUTE_DTYPES, metavar="A,B")
    add_timing(parser, SWEEP_ROUNDS)


def add_timing(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the options about peers, timing and output, which ``show`` has, too."""
    parser.add_argument("--no-torch", action="store_true", help="do not measure PyTorch")
    parser.add_argument("--repeats", type=positive, metavar="N", help=f"rounds (default: {rounds})")
    parser.add_argument(
        "--min-ms", type=float, default=25.0, metavar="MS", help="least length of a block (default: 25)"
    )
    parser.add_argument("--pause-ms", type=float, default=10.0, metavar="MS", help="sleep before a block (default: 10)")
    add_output(parser)
    add_quick(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and save; returns the exit code."""
    restrict_cpus(arguments)
    # These load OpenMP runtimes, which must see the CPUs that were chosen.
    from bench.cpu.sweep_cases import Settings, run_sweep
    from bench.peers.torch_calls import TorchPeers
    from marlin_cy.commands.output import console
    from marlin_cy.cpu import CpuBackend

    backend = CpuBackend()
    contexts = [backend.new_context(num_threads=arguments.threads, isa=isa) for isa in arguments.isa or [None]]
    threads = contexts[0].num_threads
    peers = TorchPeers(threads, wanted=not arguments.no_torch)
    screen = console()
    timing = timing_of(arguments, SWEEP_ROUNDS)
    document = document_of("sweep", contexts[0], peers, timing, screen)
    settings = Settings(
        kinds=arguments.kinds,
        models=(TINY,) if arguments.quick else tuple(MODELS[name] for name in arguments.models),
        rows=QUICK_ROWS if arguments.quick else arguments.rows,
        tokens=QUICK_ROWS if arguments.quick else arguments.tokens,
        compute_dtypes=arguments.compute_dtypes,
        isas=tuple(context.isa for context in contexts),
        memory_bytes=int(arguments.memory * 1e9 if arguments.memory else available_memory() // 2),
        **timing,
    )
    document["results"] = run_sweep(backend, threads, peers, settings, screen)
    print(f"\nSaved to {save(document, arguments.output)}")
    return 0


def timing_of(arguments: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """The JSON object ``timing``: how carefully to measure."""
    return {
        "repeats": arguments.repeats or (QUICK_ROUNDS if arguments.quick else rounds),
        "min_seconds": 1e-3 if arguments.quick else arguments.min_ms * 1e-3,
        "pause_seconds": 1e-3 if arguments.quick else arguments.pause_ms * 1e-3,
        "quick": arguments.quick,
    }


def document_of(
    mode: str, context: CpuContext, peers: TorchPeers, timing: dict[str, Any], screen: Console
) -> dict[str, Any]:
    """The JSON document without results; prints a description of the machine."""
    machine = describe(context, peers.report())
    _print_machine(screen, machine)
    return {
        "schema": SCHEMA_VERSION,
        "mode": mode,
        "command": sys.argv[1:],
        "machine": machine,
        "timing": timing,
    }


def _print_machine(screen: Console, machine: dict[str, Any]) -> None:
    torch = machine["torch"]
    peers = f"torch {torch['version']} ({torch['cpu_capability']})" if torch["version"] else "no torch"
    screen.print(
        f"{machine['cpu']}: CPUs {','.join(map(str, machine['cpus']))}, threads {machine['threads']}, "
        f"ISA {machine['isa']}, {peers}"
    )
    for name, value in machine["environment"].items():
        screen.print(f"{name}={value}")
    for peer, reason in torch["missing"].items():
        screen.print(f"{peer}: {reason}")
    warn_of_load(screen, machine["load_average"])
    if siblings_among(machine["cpus"]):
        screen.print("[yellow]Some of these CPUs share a core; --cpus chooses others.[/yellow]")
