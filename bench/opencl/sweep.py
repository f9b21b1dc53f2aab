"""``python -m bench opencl products``, ``layers`` and ``sweep``: options, and the JSON document around the rows."""

from __future__ import annotations

import argparse

from bench.common.options import add_output, add_quick, add_sweep, positive, values
from bench.common.results import save
from bench.common.shapes import MODELS, TINY

__all__ = ["add_device", "add_options", "run"]

QUICK_ROWS = (1, 16)
LAUNCHES, QUICK_LAUNCHES = 24, 2


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the three commands."""
    add_device(parser)
    add_sweep(parser)
    parser.add_argument("--repeats", type=positive, metavar="N", help="launches of a case (default: 24)")
    add_output(parser)
    add_quick(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--tiers`` and ``--device``, which ``show`` has, too."""
    parser.add_argument(
        "--tiers", type=values(str), default=("best", "portable"), metavar="A,B", help="default: best,portable"
    )
    parser.add_argument("--device", metavar="DEVICE", help="an index, or part of the device's name (default: the best)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and save; returns the exit code."""
    from bench.opencl.calls import open_tiers
    from bench.opencl.machine import document_of
    from bench.opencl.sweep_cases import Settings, run_sweep
    from marlin_cy.commands.output import console

    backends = open_tiers(arguments.tiers, arguments.device)
    screen = console()
    document = document_of("opencl-sweep", backends, screen)
    settings = Settings(
        kinds=arguments.kinds,
        backends=backends,
        models=(TINY,) if arguments.quick else tuple(MODELS[name] for name in arguments.models),
        rows=QUICK_ROWS if arguments.quick else arguments.rows,
        tokens=QUICK_ROWS if arguments.quick else arguments.tokens,
        memory_bytes=int(arguments.memory * 1e9) if arguments.memory else None,
        repeats=arguments.repeats or (QUICK_LAUNCHES if arguments.quick else LAUNCHES),
        quick=arguments.quick,
    )
    document |= run_sweep(settings, screen)
    print(f"\nSaved to {save(document, arguments.output)}")
    return 0
