"""Benchmarks of marlin_cy. README.md in this folder explains them."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

# `python -m bench` puts the current folder first on the path, and marlin_cy may not be built there. An installed
# marlin_cy must win.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parents[1]:
    sys.path.append(sys.path.pop(0))

from bench.commands import COMMANDS  # noqa: E402  (after the path is in order)

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    name, rest = split_command(list(sys.argv[1:] if argv is None else argv))
    if name is None:
        _help().parse_args(rest)  # prints the help, or the error about an unknown command
        return 2
    command = COMMANDS[name]
    module: ModuleType = importlib.import_module(command.module)
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=_sentence(command.help))
    module.add_options(parser)
    parser.set_defaults(**command.implied)
    arguments = parser.parse_args(rest)
    try:
        return int(module.run(arguments))
    except ValueError as error:
        print(f"python -m bench {name}: error: {error}", file=sys.stderr)
        return 2


def split_command(argv: list[str]) -> tuple[str | None, list[str]]:
    """The command's name and the arguments after it; ``compare`` if the first argument is an option, or missing."""
    for words in (2, 1):
        if (name := " ".join(argv[:words])) in COMMANDS and len(argv) >= words:
            return name, argv[words:]
    if argv and (argv[0] in ("-h", "--help") or not argv[0].startswith("-")):
        return None, argv
    return "compare", argv


def _help() -> argparse.ArgumentParser:
    """A parser that knows the names of the commands and nothing else."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        usage="python -m bench [COMMAND] [OPTIONS]",
        description="Benchmarks of marlin_cy. `python -m bench COMMAND -h` lists a command's options.",
        epilog="\n".join(["commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _sentence(words: str) -> str:
    """``words`` with a capital letter and a full stop."""
    return f"{words[0].upper()}{words[1:]}."


if __name__ == "__main__":
    sys.exit(main())
