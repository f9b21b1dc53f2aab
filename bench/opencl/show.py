"""``python -m bench opencl show``: options, and the JSON document around the measured claims."""

from __future__ import annotations

import argparse

from bench.common.options import add_output, add_quick, names, positive, values
from bench.common.results import save
from bench.opencl.sweep import add_device

__all__ = ["PARTS", "add_options", "run"]

PARTS = ("1", "2", "3", "layer", "host", "compile")  # rows of the table of products, and the measurements around it


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_device(parser)
    parser.add_argument("--only", type=names(PARTS), default=PARTS, metavar="A,B", help=f"default: {','.join(PARTS)}")
    parser.add_argument("--tokens", type=values(positive), metavar="A,B", help="tokens of products and of the layer")
    parser.add_argument("--launches", type=positive, metavar="N", help="launches of a case (default: 24)")
    parser.add_argument("--block-size", type=positive, metavar="N", help="of the routing (default: the tier's choice)")
    add_output(parser)
    add_quick(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and save; returns the exit code."""
    from bench.opencl.calls import open_tiers
    from bench.opencl.claims import Settings, run_show
    from bench.opencl.machine import document_of
    from marlin_cy.commands.output import console

    backends = open_tiers(arguments.tiers, arguments.device)
    screen = console()
    document = document_of("opencl-show", backends, screen)
    settings = Settings(
        backends=backends,
        parts=arguments.only,
        tokens=arguments.tokens,
        launches=arguments.launches,
        block_size=arguments.block_size,
        quick=arguments.quick,
    )
    document |= run_show(settings, screen)
    print(f"\nSaved to {save(document, arguments.output)}")
    return 0
