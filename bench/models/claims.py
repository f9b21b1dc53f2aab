"""What a command does around the measurement of its claims."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.common.machine import document_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run_claims"]

Document = dict[str, Any]


def run_claims(
    mode: str,
    schema: int,
    arguments: argparse.Namespace,
    timing: dict[str, Any],
    measure: Callable[[Path, int], Document],
    judge: Callable[[Document], list[dict[str, Any]]],
    show: Callable[[Document, Console], None] | None = None,
) -> int:
    """Measure, print and save; returns the exit code.

    It loads OpenMP runtimes, so the CPUs must have been chosen.

    Parameters
    ----------
    mode : str
        The command's name.
    schema : int
        The version of the document's form.
    arguments : argparse.Namespace
        ``threads`` and ``output``.
    timing : dict
        How carefully to measure.
    measure : callable
        ``measure(temporary folder, threads)``: the measured part of the document.
    judge : callable
        The lines of a document.
    show : callable, optional
        Prints a document; by default :func:`~bench.report.show_lines.print_claims`.
    """
    from bench.common.results import save, warn_of_load
    from bench.report.show_lines import print_claims
    from marlin_cy.commands.output import console
    from marlin_cy.cpu import CpuBackend

    context = CpuBackend().new_context(num_threads=arguments.threads)
    screen = console()
    document = document_of(mode, schema, context, timing)
    warn_of_load(screen, document["machine"]["load_average"])
    with tempfile.TemporaryDirectory() as temporary:
        document |= measure(Path(temporary), context.num_threads)
    document["show"] = judge(document)
    (show or print_claims)(document, screen)
    print(f"\nSaved to {save(document, arguments.output)}")
    return 0
