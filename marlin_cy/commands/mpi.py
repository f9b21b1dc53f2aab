"""``--mpi``: a command that runs on several hosts, started by ``mpiexec``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from marlin_cy.errors import GroupError, MarlinError
from marlin_cy.extras import needs

if TYPE_CHECKING:
    from marlin_cy.distributed import Group

__all__ = ["add_mpi_options", "mpi_group"]

OWN = ("checkpoint", "command", "refuse", "threads")
"""Arguments that may differ between hosts."""

GRACE = 1.0
"""Seconds that the other hosts get to print their messages before all are ended."""


def add_mpi_options(parser: argparse.ArgumentParser) -> None:
    """Declare ``--mpi`` and ``--mpi-timeout``."""
    from marlin_cy.distributed.group import TIMEOUT

    group = parser.add_argument_group("several hosts")
    group.add_argument(
        "--mpi", action="store_true", help="share the model out over the processes that mpiexec has started"
    )
    group.add_argument(
        "--mpi-timeout",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help=f"seconds to wait for another host before the command fails; default: {TIMEOUT:g}",
    )


@contextmanager
def mpi_group(arguments: argparse.Namespace) -> Iterator[Group | None]:
    """The hosts of the command, or None without ``--mpi``. Within the context, only rank 0 prints to stdout.

    If a host fails, it prints its message, and all hosts end.

    Raises
    ------
    BackendUnavailable
        mpi4py is not installed.
    MarlinError
        An invalid ``--mpi-timeout``.
    GroupError
        The hosts have other arguments than each other.
    """
    if not arguments.mpi:
        yield None
        return
    with needs("mpi4py and an MPI library", "mpi"):
        from mpi4py import MPI

    from marlin_cy.distributed.group import Group, checksum

    try:
        group = Group(MPI.COMM_WORLD, timeout=arguments.mpi_timeout)
    except ValueError as error:
        raise MarlinError(f"--mpi-{error}") from error
    if group.rank:
        sys.stdout.flush()
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    try:
        given = {name: value for name, value in sorted(vars(arguments).items()) if name not in OWN}
        names = ["--" + name.replace("_", "-") for name in given]
        group.agree("the command line", dict(zip(names, map(checksum, given.values()), strict=True)))
        yield group
    except (MarlinError, OSError) as error:
        print(f"marlin-cy: error: rank {group.rank}: {error}", file=sys.stderr, flush=True)
        _end_all(MPI, wait=isinstance(error, GroupError))
        raise
    except BaseException:
        import traceback

        traceback.print_exc()
        _end_all(MPI, wait=False)
        raise


def _end_all(mpi: object, *, wait: bool) -> None:
    """End all processes of the command. A process that has lost another one would wait for it when it exits."""
    sys.stderr.flush()
    if wait:
        time.sleep(GRACE)
    mpi.COMM_WORLD.Abort(1)  # type: ignore[attr-defined]
