"""Calls in a child of ``fork``, as ``cpu/fork.py`` documents them. ``test_concurrency.py`` tests their results."""

import os

import pytest
from test_concurrency import python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

SCRIPT = """
import faulthandler, os, sys, threading, time, warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
import numpy as np
import marlin_cy
from marlin_cy.cpu import fork
from marlin_cy.errors import ContextInUse
from forks import in_child
from problems import activations, random_problem

faulthandler.dump_traceback_later(100, exit=True)
rng = np.random.default_rng({seed})
backend = marlin_cy.get_backend("cpu")

{code}
print("done")
"""


def run(rng, code):
    assert python(SCRIPT.format(seed=int(rng.integers(1 << 30)), code=code)) == "done\n"


def test_calls_of_a_child_are_serialised(rng):
    """Calls of all threads run on one thread, one at a time; in the parent, on the threads that make them."""
    run(
        rng,
        """
def calls():
    places, running, most = [], [], []

    def call():
        running.append(None)
        most.append(len(running))
        places.append(threading.get_ident())
        time.sleep(0.02)
        running.pop()

    threads = [threading.Thread(target=fork.run, args=(call,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    callers = {thread.ident for thread in threads}
    for thread in threads:
        thread.join()
    return callers, places, max(most)

def check():
    callers, places, most = calls()
    assert len(set(places)) == 1 and not callers & set(places), (callers, places)
    assert most == 1

in_child(check)
callers, places, most = calls()
assert set(places) == callers and most > 1
""",
    )


def test_a_context_in_use_at_the_fork_stays_in_use(rng):
    """Its call never ends in the child. Another context works."""
    run(
        rng,
        """
stack = random_problem(rng, 1, 1024, 256, 32).stack(backend)
x, out = activations(rng, 3000, 1024), np.empty((3000, 256), np.float32)
busy = backend.new_context(num_threads=1, isa="generic")
small = np.empty((1, 256), np.float32)

def use(ctx):
    stack.gemm_phase_batched(ctx, x, [(0, 0, 0, 1)], small, 1024)

def in_use(ctx):
    try:
        use(ctx)
    except ContextInUse:
        return True
    return False

def check():
    for _ in range(3):
        assert in_use(busy)
        time.sleep(0.1)
    use(backend.new_context(num_threads=2))

thread = threading.Thread(target=lambda: stack.gemm_phase_batched(busy, x, [(0, 0, 0, 3000)], out, 1024))
thread.start()
while not in_use(busy):
    assert thread.is_alive(), "the long call has ended before it was seen"
in_child(check)
thread.join()
assert not in_use(busy)
""",
    )
