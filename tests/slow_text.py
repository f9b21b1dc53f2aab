"""``marlin-cy`` in a process of its own, with a pause before each token: for tests that interrupt it."""

import sys

SLOW = """
import sys, time
from marlin_cy import cli
from marlin_cy.decoder import writer

def write(self, *arguments, fast=writer.Writer.put):
    time.sleep(0.003)
    return fast(self, *arguments)

writer.Writer.put = write
sys.exit(cli.main())
"""


def slow_command(*arguments):
    """The words of a command line."""
    return [sys.executable, "-u", "-c", SLOW, *map(str, arguments)]
