"""One model on several hosts, by MPI: each host keeps a part of every weight's columns.

::

    host 0                            host 1
    gate, up: columns 0 .. n/2        gate, up: columns n/2 .. n
              └───────── all-gather ─────────┘         activations, whole on every host
    down: columns 0 .. k/2            down: columns k/2 .. k
              └───────── all-gather ─────────┘         outputs, whole on every host

Nothing is summed over hosts, and a column's bits do not depend on the other columns. So a result has the same bits for
any number of hosts.
"""

from marlin_cy.distributed.group import Group
from marlin_cy.distributed.shard import Shard

__all__ = ["Group", "Shard"]
