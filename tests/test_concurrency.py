"""Threads, processes, and many calls in a row."""

import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from asserts import GuardedBuffer, assert_same_bits
from problems import activations, random_problem

import marlin_cy
from marlin_cy.errors import ContextInUse

DEADLINE_S = 60
TESTS = Path(__file__).parent

watches_memory = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory for a while"
)


def new_context(backend, num_threads):
    """A context, on the CPU of so many threads."""
    return backend.new_context(num_threads=num_threads) if backend.name == "cpu" else backend.new_context()


class Work:
    """A product to compute repeatedly, and its expected result."""

    def __init__(self, backend, rng, *, k=1056, n=64, m=40):
        self.backend, self.m = backend, m
        self.stack = random_problem(rng, 2, k, n, 32).stack(backend)
        self.x = backend.from_host(activations(rng, m, k))
        self.expected = self.on(new_context(backend, 1))

    def on(self, ctx):
        out = GuardedBuffer(self.backend, (self.m, self.stack.n_per_expert), np.float32)
        try:
            half = self.m // 2
            dispatches = [(1, 0, half, half), (0, half, 0, half)]
            self.stack.gemm_phase_batched(ctx, self.x, dispatches, out.buffer, self.stack.k)
        except ContextInUse:
            out.assert_untouched()
            raise
        return out.result()


def python(code):
    """The output of a new interpreter that can import from this folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=2 * DEADLINE_S, env=environment
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def in_threads(functions):
    """Run them all at once; the first exception of any is raised here."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]


def test_a_context_of_two_threads(cpu_backend, rng):
    """One of the two threads gets an exception; results are right; the context is usable afterwards."""
    work, ctx = Work(cpu_backend, rng, m=400), cpu_backend.new_context(num_threads=1, isa="generic")
    refused, end = threading.Event(), time.monotonic() + DEADLINE_S

    def use():
        while not refused.is_set() and time.monotonic() < end:
            try:
                result = work.on(ctx)
            except ContextInUse as error:
                assert "ctx: in use by another thread" in str(error)
                refused.set()
            else:
                assert_same_bits(result, work.expected)

    in_threads([use, use])
    assert refused.is_set(), "never at once"
    assert_same_bits(work.on(ctx), work.expected)


def test_every_method_refuses_a_context_in_use(cpu_backend, rng):
    work, ctx = Work(cpu_backend, rng, m=400), cpu_backend.new_context(num_threads=1, isa="generic")
    gate_up, down = random_problem(rng, 2, 32, 64, 32), random_problem(rng, 2, 32, 32, 32)
    layer = marlin_cy.MoeLayer(gate_up.stack(cpu_backend), down.stack(cpu_backend), top_k=1)
    x, logits, out = np.ones((2, 32), np.float32), np.ones((2, 2), np.float32), np.ones((2, 32), np.float32)
    ids = np.zeros(1, np.int32)
    calls = [
        lambda: down.stack(cpu_backend).gemm_phase_vllm(ctx, x, ids, ids, 1, out, 1, 1, 1),
        lambda: layer.down.make_expert_linear(0, 32).forward(ctx, x, out, 2),
        lambda: layer.down.zero_workspace(ctx),
        lambda: layer(ctx, x, logits),
        lambda: layer.route(ctx, logits),
        lambda: work.on(ctx),
    ]
    done = threading.Event()

    def occupy():
        while not done.is_set():
            try:
                work.on(ctx)
            except ContextInUse:
                time.sleep(0.001)  # let the other one finish

    def probe():
        try:
            for call in calls:
                end = time.monotonic() + DEADLINE_S / len(calls)
                while time.monotonic() < end:
                    try:
                        call()
                    except ContextInUse:
                        break
                else:
                    raise AssertionError("never refused")
        finally:
            done.set()

    in_threads([occupy, probe])
    assert_same_bits(work.on(ctx), work.expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_many_threads_with_contexts_of_their_own(device_backend, rng, num_threads):
    work = Work(device_backend, rng)

    def use():
        ctx = new_context(device_backend, num_threads)
        for _ in range(10):
            assert_same_bits(work.on(ctx), work.expected)

    in_threads([use] * 6)


def test_a_context_moves_between_threads(device_backend, rng):
    work, ctx = Work(device_backend, rng), new_context(device_backend, 2)
    for _ in range(5):
        in_threads([lambda: assert_same_bits(work.on(ctx), work.expected)])
    assert_same_bits(work.on(ctx), work.expected)


FORK = """
import faulthandler, multiprocessing, os, sys, threading, time, warnings
faulthandler.dump_traceback_later({deadline}, exit=True)
warnings.filterwarnings("ignore", "This process .* is multi-threaded")
import numpy as np
import marlin_cy
from asserts import assert_same_bits
from forks import in_child
from problems import random_problem, activations
from test_concurrency import Work

rng = np.random.default_rng({seed})
backend = marlin_cy.get_backend("cpu")
work = Work(backend, rng)
ctx = backend.new_context(num_threads=3)
gate_up, down = random_problem(rng, 4, 64, 128, 32), random_problem(rng, 4, 64, 64, 32)
layer = marlin_cy.MoeLayer(gate_up.stack(backend), down.stack(backend), top_k=2)
x, logits = activations(rng, 30, 64), rng.standard_normal((30, 4)).astype(np.float32)
expected = layer(ctx, x, logits)

def check(ctx=ctx):
    assert_same_bits(work.on(ctx), work.expected)
    assert_same_bits(layer(ctx, x, logits), expected)

def check_all(_=None):
    check()
    for num_threads in (1, 2, 3, 7):
        check(backend.new_context(num_threads=num_threads))
    return True

check_all()
{code}
check_all()
print("done")
"""


@pytest.mark.sampled(3)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize(
    "code",
    [
        pytest.param("in_child(check_all)", id="fork"),
        pytest.param("in_child(lambda: in_child(check_all) or check_all())", id="fork in a fork"),
        pytest.param("in_child(check_all); in_child(check_all)", id="twice"),
        pytest.param("in_child(lambda: check_all() or in_child(check_all))", id="fork after use in a fork"),
        pytest.param(
            """
with multiprocessing.get_context("fork").Pool(3) as pool:
    assert all(pool.map(check_all, range(6), chunksize=1))
    pool.close()
    pool.join()
""",
            id="pool",
        ),
        pytest.param(
            """
process = multiprocessing.get_context("fork").Process(target=check_all)
process.start()
process.join()
assert process.exitcode == 0, process.exitcode
""",
            id="process",
        ),
        pytest.param(
            """
def in_threads():
    results = []
    use = lambda n: results.append(check(backend.new_context(num_threads=n)))
    threads = [threading.Thread(target=use, args=(n,)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3

in_child(in_threads)
""",
            id="threads of a fork",
        ),
        pytest.param(
            """
stop = threading.Event()
own = backend.new_context(num_threads=2)

def use():
    while not stop.is_set():
        work.on(own)

thread = threading.Thread(target=use)
thread.start()
for _ in range(5):
    in_child(check_all)
stop.set()
thread.join()
""",
            id="while another thread computes",
        ),
        pytest.param(
            """
def wrong():
    for _ in range(3):
        try:
            work.stack.gemm_phase_batched(ctx, work.x, [(9, 0, 0, 1)], np.zeros((1, 64), np.float32), work.stack.k)
        except IndexError as error:
            assert "expert_idx 9" in str(error)
        else:
            raise AssertionError("accepted")
    check_all()

in_child(wrong)
""",
            id="refused in a fork",
        ),
    ],
)
@pytest.mark.sampled(2)
def test_fork(rng, code):
    """After the parent has used OpenMP. A hang ends with a traceback of all threads."""
    script = FORK.format(code=code, seed=int(rng.integers(1 << 30)), deadline=DEADLINE_S)
    assert python(script) == "done\n"


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("variable", "value"), [("OMP_THREAD_LIMIT", "1"), ("OMP_THREAD_LIMIT", "2"), ("OMP_DYNAMIC", "true")]
)
def test_fewer_threads_than_asked_for(rng, monkeypatch, variable, value):
    """Threads wait for each other; one that does the work of several must not wait for itself."""
    monkeypatch.setenv(variable, value)
    code = f"""
import faulthandler
import numpy as np
from asserts import assert_same_bits
from marlin_cy import get_backend
from test_concurrency import Work
faulthandler.dump_traceback_later({DEADLINE_S}, exit=True)
backend = get_backend("cpu")
for rows in (2, 40):
    work = Work(backend, np.random.default_rng({int(rng.integers(1 << 30))}), m=rows)
    for num_threads in (1, 2, 7, 16):
        assert_same_bits(work.on(backend.new_context(num_threads=num_threads)), work.expected)
print("done")
"""
    assert python(code) == "done\n"


def small_calls(backend, rng):
    """Small calls of everything, right and wrong, by name."""
    ctx, device = new_context(backend, 1), backend.from_host
    gate_up, down = random_problem(rng, 2, 32, 64, 32).stack(backend), random_problem(rng, 2, 32, 32, 32)
    stack = down.stack(backend)
    layer = marlin_cy.MoeLayer(gate_up, stack, top_k=1)
    linear = stack.make_expert_linear(8, 16, np.ones(16, np.float32))
    x, out, narrow = (device(np.ones((2, width), np.float32)) for width in (32, 32, 16))
    logits, few = (device(np.ones((rows, 2), np.float32)) for rows in (2, 1))
    ids, weights = np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32)
    routing = [device(part) for part in marlin_cy.moe_align_block_size(ids, 2, 2)]
    wrong = device(np.zeros(1, np.int32))
    tensors = down.tensors()
    right, too_far, overlapping = ([(0, 0, 0, 1), (1, 1, 1, 1)], [(0, 0, 0, 1), (1, 1, 1, 2)], [(0, 0, 0, 1)] * 2)

    def refused(function, *args):
        try:
            function(*args)
        except (TypeError, ValueError, IndexError):
            return
        raise AssertionError("accepted")

    calls = {
        "batched": lambda: stack.gemm_phase_batched(ctx, x, right, out, 32),
        "batched, refused": lambda: refused(stack.gemm_phase_batched, ctx, x, too_far, out, 32),
        "batched, overlapping": lambda: refused(stack.gemm_phase_batched, ctx, x, overlapping, out, 32),
        "vllm": lambda: stack.gemm_phase_vllm(ctx, x, *routing, out, 2, 2, 1),
        "vllm, refused": lambda: refused(stack.gemm_phase_vllm, ctx, x, routing[0], wrong, 8, out, 2, 2, 1),
        "linear": lambda: linear.forward(ctx, x, narrow, 2),
        "linear, refused": lambda: refused(linear.forward, ctx, x, narrow.T, 2),
        "view": lambda: stack.make_expert_linear(8, 16, np.ones(16, np.float32)),
        "layer": lambda: layer(ctx, x, logits),
        "layer, refused": lambda: refused(layer, ctx, x, few),
        "routed": lambda: layer.forward_routed(ctx, x, ids, weights),
        "route": lambda: layer.route(ctx, logits),
        "align": lambda: marlin_cy.moe_align_block_size(ids, 2, 2),
        "context": lambda: stack.gemm_phase_batched(new_context(backend, 1), x, right, out, 32),
        "load": lambda: backend.load_gptq_stacked(*tensors, **down.sizes()),
        "load, refused": lambda: refused(lambda: backend.load_gptq_stacked(*tensors, 5, **down.sizes())),
    }
    if backend.name == "cpu":  # a device's arrays are not looked into
        again = routing[0] * 0, *routing[1:]
        calls["vllm, repeated"] = lambda: refused(stack.gemm_phase_vllm, ctx, x, *again, out, 2, 2, 1)
        return calls
    return {name: finished(ctx, function) for name, function in calls.items()}


def finished(ctx, function):
    """A call that ends when the device has: commands that wait take memory, and the host may enqueue them faster."""

    def call():
        function()
        ctx.finish()

    return call


def of_all(backend, rng):
    """One of these after another."""
    turn = itertools.cycle(small_calls(backend, rng).values())
    return lambda: next(turn)()


def of_one(name):
    return lambda backend, rng: small_calls(backend, rng)[name]


def of_stores(backend, rng):
    """A stack of 2 MiB, all of it written."""
    return lambda: backend.new_stack_builder(1, 2048, 2048, group_size=128)._store.data.fill(1)


def of_leaks(backend, rng):
    kept = []
    return lambda: kept.append(np.ones(100))


def left_behind(calls, warm_up, source, name="cpu", **options):
    """``(blocks, bytes)``: how many of Python's blocks, and of the process's pages, calls leave behind.

    To be measured in a process of its own, whose heap holds no holes that would hide a leak.
    """
    function = source(marlin_cy.get_backend(name, **options), np.random.default_rng(0))

    def repeat(times):
        for _ in range(times):
            function()
        gc.collect()
        return sys.getallocatedblocks(), psutil.Process().memory_info().rss

    before = repeat(warm_up)
    return tuple(after - start for start, after in zip(before, repeat(calls), strict=True))


def measured(source, calls, warm_up, backend="'cpu'"):
    code = f"import test_concurrency as t; print(*t.left_behind({calls}, {warm_up}, t.{source}, {backend}))"
    return map(int, python(code).split())


WATCHED = ["of_all", *(f"of_one({name!r})" for name in ("batched", "vllm", "layer", "batched, refused", "context"))]


@pytest.mark.sampled(1)
@watches_memory
@pytest.mark.parametrize("source", WATCHED)
def test_ten_thousand_calls_leave_nothing(source):
    blocks, resident = measured(source, calls=10_000, warm_up=2000)
    assert blocks < 200
    assert resident < 1 << 20


@pytest.mark.sweep
@watches_memory
@pytest.mark.parametrize(("source", "calls"), [*((source, 1000) for source in WATCHED), ("of_one('load')", 500)])
def test_calls_of_a_device_leave_nothing(device_alone, source, calls):
    from marlin_cy.opencl.device import list_devices

    number = list_devices().index(device_alone.device)
    backend = f"'opencl', device={number}, tier={device_alone.tier.name!r}"
    blocks, resident = measured(source, calls, 500, backend)
    assert blocks < calls / 2
    assert resident < 1 << 20


@watches_memory
def test_the_watch_sees_a_leak():
    blocks, resident = measured("of_leaks", calls=10_000, warm_up=2000)
    assert blocks > 9000
    assert resident > 4 << 20


@watches_memory
def test_a_store_is_freed():
    _, resident = measured("of_stores", calls=40, warm_up=5)
    assert resident < 4 << 20


def test_a_context_keeps_what_it_needs_and_no_more(cpu_backend, rng):
    ctx, work = cpu_backend.new_context(num_threads=2), Work(cpu_backend, rng)
    work.on(ctx)
    held = ctx.workspace.nbytes
    for _ in range(10):
        work.on(ctx)
    assert ctx.workspace.nbytes == held > 0
