"""``python -m bench mpi``: a Mixture-of-Experts layer on several hosts, beside one host, on this machine.

mpiexec starts the hosts, each on a core of its own. Rank 0 also runs the whole layer alone, in turns with the hosts
together. The bytes that a layer exchanges are gathered by MPI alone, too. Each claim is printed with its bar.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.common.machine import document_of
from bench.common.options import COMPUTE_DTYPES, add_output, add_quick, positive
from bench.common.processes import ROOT, module_command, module_environment
from bench.common.timing import Spread

__all__ = ["add_options", "judge", "run"]

SCHEMA_VERSION = 1
LEAST_SPEEDUP, MOST_EXCHANGE, MOST_MEMORY = 1.8, 1.15, 1.05
BARS = (
    ("1", "one host's time ÷ that of {hosts} hosts, {tokens} tokens", "speedup", ">=", LEAST_SPEEDUP),
    ("2", "a layer's exchanges ÷ bare all-gathers of as many bytes", "exchange", "<=", MOST_EXCHANGE),
    ("3", "most memory of a host's experts ÷ its part of all, without a tile", "memory", "<=", MOST_MEMORY),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--hosts", type=positive, default=2, metavar="N", help="default: 2; one core each")
    parser.add_argument("--tokens", type=positive, default=256, metavar="N", help="default: 256")
    parser.add_argument("--experts", type=positive, metavar="N", help="default: 128; 8 with --quick")
    parser.add_argument("--rounds", type=positive, metavar="N", help="rounds that count (default: 7; 2 with --quick)")
    parser.add_argument("--compute-dtype", choices=COMPUTE_DTYPES, default="int16")
    parser.add_argument(
        "--mpiexec", type=Path, help="default: the one beside this Python, or else the first one on PATH"
    )
    add_output(parser)
    add_quick(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and save; returns the exit code."""
    from bench.common.results import save, warn_of_load
    from bench.report.show_lines import show_table
    from marlin_cy.commands.output import console
    from marlin_cy.cpu import CpuBackend

    settings = {
        "hosts": arguments.hosts,
        "tokens": arguments.tokens,
        "experts": arguments.experts or (8 if arguments.quick else 128),
        "rounds": arguments.rounds or (2 if arguments.quick else 7),
        "compute_dtype": arguments.compute_dtype,
        "quick": arguments.quick,
    }
    screen = console()
    document = document_of("mpi", SCHEMA_VERSION, CpuBackend().new_context(num_threads=1), settings)
    warn_of_load(screen, document["machine"]["load_average"])
    document["figures"] = measure(mpiexec_of(arguments.mpiexec), settings)
    document["show"] = judge(document["figures"], settings)
    screen.print(f"{document['machine']['cpu']}: {arguments.hosts} hosts of one core", markup=False)
    screen.print(show_table(document["show"]))
    print(f"\nSaved to {save(document, arguments.output)}")
    return 0


def mpiexec_of(given: Path | None) -> Path:
    """The launcher.

    Raises
    ------
    ValueError
        There is none.
    """
    beside = Path(sys.executable).parent / "mpiexec"
    found = given or (beside if beside.exists() else shutil.which("mpiexec"))
    if found is None:
        raise ValueError("--mpiexec: found no mpiexec beside this Python or on PATH; pip install mpi4py mpich")
    return Path(found)


def measure(mpiexec: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the hosts have measured.

    Raises
    ------
    ValueError
        The hosts fail.
    """
    worker = module_command("bench.models.mpi_worker", json.dumps(dict(settings)))
    done = subprocess.run(
        [str(mpiexec), "-n", str(settings["hosts"]), *worker],
        cwd=ROOT,
        env=module_environment({"OMP_NUM_THREADS": "1"}),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"the hosts fail: exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def judge(figures: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of a document, each with its bar."""
    from bench.report.show_lines import measured_line

    return [
        measured_line(number, what.format(**settings), comparison, bar, Spread(**figures[name]))
        for number, what, name, comparison, bar in BARS
    ]
