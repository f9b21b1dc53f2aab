"""The command line, ``marlin-cy``: arguments, exit codes, messages.

Exit codes: 0, success; 1, failure (a message on stderr says why); 2, invalid arguments; 130, interrupted;
141, the reader of the output has closed it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from marlin_cy import __version__
from marlin_cy.errors import MarlinError

__all__ = ["main"]


class Command(Protocol):
    """The contents of a command's module."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
        """Declare the arguments, which may depend on the command line ``argv``."""

    def execute(self, arguments: argparse.Namespace) -> int:
        """Run the command; returns the exit code. ``arguments.refuse(message)`` ends it with a usage error."""


COMMANDS = ("run", "generate", "chat", "serve", "perplexity", "bench", "inspect", "pack", "doctor", "tune")
"""The names of the commands, which are those of their modules."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the program's name; by default those of the process.

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    SystemExit
        Raised by argparse for ``--help``, ``--version`` and invalid arguments.
    """
    argv = sys.argv[1:] if argv is None else argv
    # On a terminal whose encoding lacks a character, print a question mark instead of a traceback.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        arguments, unknown = _parser(argv).parse_known_args(argv)
        if unknown:
            from marlin_cy.commands.options import refuse_unknown

            refuse_unknown(arguments, unknown)
        code = _command(arguments.command).execute(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout again when it exits: send that to the null device.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("marlin-cy: interrupted", file=sys.stderr)
        return 130
    except (MarlinError, OSError) as error:
        print(f"marlin-cy: error: {error}", file=sys.stderr)
        return 1
    return code


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marlin-cy", description="Mixture-of-Experts layers straight from 4-bit weights."
    )
    parser.add_argument("--version", action="version", version=f"marlin-cy {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # The help and the options of commands that are not named take time to import.
    named = [name for name in COMMANDS if name in argv]
    for name in COMMANDS:
        if named and name not in named:
            commands.add_parser(name)
            continue
        module = _command(name)
        assert module.__doc__ is not None
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__.split("\n\n")[0])
        command.set_defaults(refuse=command.error)
        if named:
            module.add_arguments(command, argv)
    return parser


def _command(name: str) -> Command:
    command: Command = import_module(f"marlin_cy.commands.{name}")
    return command
