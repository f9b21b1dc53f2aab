"""``python -m bench``: the library beside others on this machine. README.md explains."""

import argparse
import sys
from pathlib import Path

# An installed marlin_cy comes before the folder that this was started in, where it may not be built.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parents[1]:
    sys.path.append(sys.path.pop(0))

from bench import compare, cost, pictures, tables
from bench.cpu import before_after

COMMANDS = {
    "before-after": (before_after, "time two builds of this library against each other"),
    "compare": (compare, "time every peer that runs here; what is done unless another command is named"),
    "tables": (tables, "print the tables of a saved comparison"),
    "pictures": (pictures, "draw a saved comparison"),
    "cost": (cost, "predict the time of layers from what the machine can do, and measure it"),
}


def main(argv=None):
    """Run a command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in (*COMMANDS, "-h", "--help"):
        argv = ["compare", *argv]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, words) in COMMANDS.items():
        module.add_options(commands.add_parser(name, help=words, description=words))
    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command][0].run(arguments)
    except ValueError as error:
        print(f"python -m bench: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
