"""The command line, ``marlin-cy``: arguments, exit codes, messages.

Exit codes: 0, all is well; 1, it failed (a message on stderr says why); 2, the arguments are wrong;
130, interrupted; 141, whoever read the output has gone.
"""

import argparse
import os
import sys

from marlin_cy import __version__
from marlin_cy.commands import doctor, generate, inspect, pack, perplexity, run, tune
from marlin_cy.errors import MarlinError

__all__ = ["main"]

# Each module has HELP (a line), add_arguments(parser) and execute(arguments) -> exit code.
COMMANDS = {
    "run": run,
    "generate": generate,
    "perplexity": perplexity,
    "inspect": inspect,
    "pack": pack,
    "doctor": doctor,
    "tune": tune,
}


def main(argv=None):
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the program's name; those of the process when left out.

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    SystemExit
        By argparse, for ``--help``, ``--version`` and wrong arguments.
    """
    arguments = _parser().parse_args(argv)
    # A terminal that cannot show an arrow gets a question mark, not a traceback.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = COMMANDS[arguments.command].execute(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("marlin-cy: interrupted", file=sys.stderr)
        return 130
    except (MarlinError, OSError) as error:
        print(f"marlin-cy: error: {error}", file=sys.stderr)
        return 1
    return code


def _parser():
    parser = argparse.ArgumentParser(
        prog="marlin-cy", description="Mixture-of-Experts layers straight from 4-bit GPTQ weights."
    )
    parser.add_argument("--version", action="version", version=f"marlin-cy {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.__doc__.split("\n\n")[0]))
    return parser
