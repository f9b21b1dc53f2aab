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


def test_ctrl_c_in_a_child(rng):
    """The exception comes after the call has ended: it writes nothing to memory that its caller has taken back."""
    run(
        rng,
        """
import signal

def check():
    ended = []

    def call():
        for _ in range(2):
            time.sleep(0.2)
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)
        ended.append(None)

    try:
        fork.run(call)
    except KeyboardInterrupt:
        assert ended == [None]
    else:
        raise AssertionError("not interrupted")

in_child(check)
""",
    )


def test_whole_models(rng):
    """A model of the parent gives the same logits in a child, and both go on alone.

    If another thread of the parent is calling the model at the fork, the model stays in use in the child.
    """
    run(
        rng,
        """
from importlib.resources import files
from marlin_cy.decoder.load import load_model

folder = files("marlin_cy") / "data" / "tiny-qwen3-moe-gptq-int4"
tokens = rng.integers(0, 256, 40)

def load():
    return load_model(folder, context_length=64, cache_tokens=256, num_threads=2)

model = load()
expected = model.forward(tokens, sequence=model.new_sequence(), all_logits=True)
sequence = model.new_sequence()
model.forward(tokens[:20], sequence=sequence)

def check():
    fork_of_it = model.fork(sequence)
    for grown in (sequence, fork_of_it):
        np.testing.assert_array_equal(model.forward(tokens[20:], sequence=grown, all_logits=True), expected[20:])
    np.testing.assert_array_equal(load().forward(tokens, all_logits=True), expected)

in_child(check)
np.testing.assert_array_equal(model.forward(tokens[20:], sequence=sequence, all_logits=True), expected[20:])

entered, leave = threading.Event(), threading.Event()
step = model._program.step

def slow_step(batch):
    entered.set()
    assert leave.wait(60)
    return step(batch)

model._program.step = slow_step
other = model.new_sequence()
thread = threading.Thread(target=lambda: model.forward(tokens, sequence=other))
thread.start()
assert entered.wait(60)

def check_in_use():
    for use in (model.new_sequence, lambda: model.forward(tokens), lambda: model.free(sequence)):
        try:
            use()
        except ContextInUse as error:
            assert "model: in use by another thread" in str(error)
        else:
            raise AssertionError("not refused")
    np.testing.assert_array_equal(load().forward(tokens, all_logits=True), expected)

in_child(check_in_use)
leave.set()
thread.join()
assert other.length == 40
""",
    )
