"""``python quick_command.py ARGUMENTS``: ``marlin-cy``, which does not measure memory, but reports 10 GB/s."""

import sys

from marlin_cy import cli
from marlin_cy.cpu.measure import _bandwidth

if __name__ == "__main__":
    _bandwidth.read_bandwidth = lambda num_threads: 10e9
    sys.exit(cli.main())
