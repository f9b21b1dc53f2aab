"""``python -m bench show``: options, and the JSON document around the measured claims."""

from __future__ import annotations

import argparse

from bench.common.options import add_cpus, restrict_cpus
from bench.common.results import save
from bench.cpu.sweep import add_timing, document_of, timing_of

__all__ = ["add_options", "run"]

ROUNDS = 11


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_cpus(parser)
    parser.add_argument("--isa", help="instruction set (default: the best one here)")
    add_timing(parser, ROUNDS)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and save; returns the exit code."""
    restrict_cpus(arguments)
    # These load OpenMP runtimes, which must see the CPUs that were chosen.
    from bench.cpu.claims import Settings, run_show
    from bench.peers.torch_calls import TorchPeers
    from marlin_cy.commands.output import console
    from marlin_cy.cpu import CpuBackend

    backend = CpuBackend()
    context = backend.new_context(num_threads=arguments.threads, isa=arguments.isa)
    peers = TorchPeers(context.num_threads, wanted=not arguments.no_torch)
    screen = console()
    timing = timing_of(arguments, ROUNDS)
    document = document_of("show", context, peers, timing, screen)
    document |= run_show(backend, peers, Settings(isa=context.isa, threads=context.num_threads, **timing), screen)
    print(f"\nSaved to {save(document, arguments.output)}")
    return 0
