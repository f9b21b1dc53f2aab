"""Another thread writes to arrays of indices while calls use them.

A call takes a copy and checks the copy. So it either computes the result for valid values or is refused.
"""

import sys
import threading
import time

import numpy as np
import pytest
from asserts import GuardedArray, assert_same_bits
from problems import activations, random_problem

import marlin_cy

WRONG = 1 << 22
"""An id so large that memory there is another's."""


@pytest.fixture(params=[0.5, pytest.param(2, marks=pytest.mark.sweep)])
def seconds(request):
    """How long calls are repeated: for hundreds of them."""
    return request.param


@pytest.fixture
def changing():
    """``changing(array, position)``: until the test ends, a thread makes ``array[position]`` wrong and right again."""
    stop, threads = threading.Event(), []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def start(array, *position):
        right = array.copy()
        wrong = array.copy()
        wrong[position] = WRONG

        def change():
            while not stop.is_set():
                np.copyto(array, wrong)
                np.copyto(array, right)

        threads.append(threading.Thread(target=change))
        threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)


def repeat(call, expected, seconds):
    """Each call computes the expected result or is refused. There are at least two calls, on a machine of any load."""
    end, calls = time.monotonic() + seconds, 0
    while calls < 2 or time.monotonic() < end:
        calls += 1
        try:
            result = call()
        except (IndexError, ValueError):
            continue
        assert_same_bits(result, expected)


def products(backend, rng):
    stack, ctx = random_problem(rng, 2, 32, 8, 32).stack(backend), backend.new_context(num_threads=1)
    return stack, ctx, activations(rng, 5000, 32)


def test_dispatches(cpu_backend, rng, changing, seconds):
    stack, ctx, x = products(cpu_backend, rng)
    dispatches = np.array([(row % 2, row, row, 1) for row in range(len(x))], np.int64)

    def call():
        out = GuardedArray((len(x), 8), np.float32)
        stack.gemm_phase_batched(ctx, x, dispatches, out.array, 32)
        out.assert_guards()
        return out.array

    expected = call()
    changing(dispatches, len(x) // 2, 2)
    repeat(call, expected, seconds)


@pytest.mark.parametrize("changed", ["sorted_token_ids", "expert_ids"])
def test_vllm(cpu_backend, rng, changing, changed, seconds):
    """An id of -1 is refused; one that is too large would be padding."""
    stack, ctx, x = products(cpu_backend, rng)
    ids = np.ascontiguousarray(rng.permutation(len(x)), np.int32)
    experts = np.zeros(len(x) // 4, np.int32)

    def call():
        out = GuardedArray((len(x), 8), np.float32)
        stack.gemm_phase_vllm(ctx, x, ids, experts, len(x), out.array, len(x), 4, 1)
        out.assert_guards()
        return out.array

    expected = call()
    if changed == "expert_ids":
        changing(experts, len(experts) // 2)
        repeat(call, expected, seconds)
    else:
        twice = ids.copy()
        twice[len(ids) // 2] = ids[0]
        stop = threading.Event()

        def change():
            right = ids.copy()
            while not stop.is_set():
                np.copyto(ids, twice)
                np.copyto(ids, right)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            repeat(call, expected, seconds)
        finally:
            stop.set()
            thread.join()


def test_layer(cpu_backend, rng, changing, seconds):
    gate_up = random_problem(rng, 2, 32, 64, 32).stack(cpu_backend)
    layer = marlin_cy.MoeLayer(gate_up, random_problem(rng, 2, 32, 32, 32).stack(cpu_backend), top_k=2)
    ctx, x = cpu_backend.new_context(num_threads=1), activations(rng, 3000, 32)
    ids = np.ascontiguousarray(rng.integers(0, 2, (len(x), 2)), np.int32)
    weights = rng.random(ids.shape).astype(np.float32)

    def call():
        out = GuardedArray((len(x), 32), np.float32)
        layer.forward_routed(ctx, x, ids, weights, out=out.array)
        out.assert_guards()
        return out.array

    expected = call()
    changing(ids, len(x) // 2, 0)
    repeat(call, expected, seconds)


def test_align(rng, changing, seconds):
    """Of many ids, so that a check of all of them ends long after it has read the one that changes."""
    ids = rng.integers(0, 4, (500_000, 2))

    def call():
        return np.concatenate(marlin_cy.moe_align_block_size(ids, 16, 4))

    expected = call()
    changing(ids, 250_000, 1)
    repeat(call, expected, seconds)


def test_expert_map(rng, changing, seconds):
    """An entry that is checked but changed before it is used would name an expert that does not exist."""
    ids = rng.integers(0, 4, (2000, 2))
    expert_map = np.array([1, 0, -1, 2], np.int64)

    def call():
        return np.concatenate(marlin_cy.moe_align_block_size(ids, 16, 4, expert_map))

    expected = call()
    right = expert_map.copy()
    stop = threading.Event()

    def change():
        while not stop.is_set():
            expert_map[0] = -5
            expert_map[0] = right[0]

    thread = threading.Thread(target=change)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        repeat(call, expected, seconds)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
