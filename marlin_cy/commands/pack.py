"""Write a checkpoint as a packed folder. Opening that folder maps its 4-bit weights and does not pack them again.

The object that ``--json`` prints has the keys ``version``, ``source``, ``packed`` (paths), ``source_bytes``,
``packed_bytes``, ``stacks``, ``files``, ``seconds``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from marlin_cy import __version__, open_checkpoint
from marlin_cy.checkpoints.packed_writer import write_packed
from marlin_cy.commands.output import LoadProgress, gigabytes, print_json

__all__ = ["HELP", "add_arguments", "execute"]

HELP = "write a checkpoint's packed weights to a folder that opens without packing"


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Declare the command's arguments."""
    parser.add_argument("checkpoint", type=Path, metavar="IN", help="a checkpoint's folder, or a GGUF file")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; must not exist, or be empty")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    begin = time.perf_counter()
    with LoadProgress("packing") as progress, open_checkpoint(arguments.checkpoint) as checkpoint:
        written = write_packed(checkpoint, arguments.out, progress)
    seconds = time.perf_counter() - begin
    if arguments.json:
        print_json(
            {
                "version": __version__,
                "source": str(arguments.checkpoint),
                "packed": str(arguments.out),
                "source_bytes": written["source_bytes"],
                "packed_bytes": written["bytes"],
                "stacks": written["stacks"],
                "files": written["files"],
                "seconds": seconds,
            }
        )
    else:
        print(
            f"{arguments.out}: {written['bytes'] / 1e6:.1f} MB in {written['files']} files, "
            f"{written['stacks']} packed stacks, from {written['source_bytes'] / 1e6:.1f} MB, "
            f"in {seconds:.1f} s ({gigabytes(written['bytes'] / seconds)})"
        )
    return 0
