"""The memory that calls reuse: how it is divided, when it grows, and that refused calls leave it alone."""

import numpy as np
import pytest
from asserts import assert_same_bits
from problems import activations, random_problem

import marlin_cy
from marlin_cy.cpu._arena import carved
from marlin_cy.cpu._gemm import counters_after

CACHE_LINE = 64


@pytest.mark.parametrize("count", [1, 2, 10, 100])
def test_arrays_lie_apart(cpu_backend, rng, count):
    """Arrays begin at cache lines, do not overlap, and end within the bytes that were measured."""
    workspace = cpu_backend.new_context(num_threads=1).workspace
    sizes = rng.choice([0, 1, 7, 63, 64, 65, 1000, 4096], count).astype(np.int64)
    addresses = np.empty(count, np.int64)
    measured = carved(workspace, sizes, addresses)
    assert workspace.nbytes == measured
    assert not np.any(addresses % CACHE_LINE)
    assert np.all(addresses[:-1] + sizes[:-1] <= addresses[1:])
    assert addresses[-1] + sizes[-1] <= addresses[0] + measured


def test_the_measured_size_is_the_sum(cpu_backend):
    """No byte more than each array's cache lines."""
    sizes = np.array([1, 64, 65, 0, 128], np.int64)
    workspace = cpu_backend.new_context(num_threads=1).workspace
    assert carved(workspace, sizes, np.empty(5, np.int64)) == 64 + 64 + 128 + 0 + 128


def test_memory_is_kept(cpu_backend, rng):
    """A workspace grows for larger calls only. A smaller call in between uses the same memory."""
    stack, ctx = random_problem(rng, 3, 2080, 64, 32).stack(cpu_backend), cpu_backend.new_context(num_threads=3)
    x, held, results = activations(rng, 200, 2080), [], []
    for m in (1, 200, 1, 200):
        out = np.empty((m, 64), np.float32)
        stack.gemm_phase_batched(ctx, x, [(1, 0, 0, m)], out, 2080)
        held.append(ctx.workspace.nbytes)
        results.append(out)
    assert held[0] < held[1] == held[2] == held[3]
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[3])


def refused_calls(backend, rng):
    """Calls that are refused for their last reason: everything that is checked before is right."""
    gate_up, down = random_problem(rng, 3, 64, 64, 32).stack(backend), random_problem(rng, 3, 32, 64, 32).stack(backend)
    layer = marlin_cy.MoeLayer(gate_up, down, top_k=2)
    x, out, wide = activations(rng, 10, 64), np.zeros((20, 64), np.float32), np.zeros((10, 64), np.float32)
    ids, experts = np.arange(16, dtype=np.int32), np.zeros(4, np.int32)
    repeated, reaching = ids.copy(), experts.copy()
    repeated[15], reaching[3] = 2, 3
    logits, weights = np.zeros((10, 3), np.float32), np.ones((10, 2), np.float32)
    return {
        "overlap": lambda c: gate_up.gemm_phase_batched(c, x, [(0, 0, 0, 9), (1, 0, 8, 9)], out, 64),
        "expert": lambda c: gate_up.gemm_phase_batched(c, x, [(0, 0, 0, 9), (3, 0, 9, 9)], out, 64),
        "rows": lambda c: gate_up.gemm_phase_batched(c, x, [(0, 0, 0, 9), (1, 2, 9, 9)], out, 64),
        "id": lambda c: gate_up.gemm_phase_vllm(c, x, ids - 1, experts, 16, out, 10, 4, 2),
        "id again": lambda c: gate_up.gemm_phase_vllm(c, x, repeated, experts, 16, out, 10, 4, 2),
        "block": lambda c: gate_up.gemm_phase_vllm(c, x, ids, reaching, 16, out, 10, 4, 2),
        "past": lambda c: gate_up.gemm_phase_vllm(c, x, ids, experts, 20, out, 10, 4, 2),
        "m": lambda c: gate_up.make_expert_linear(0, 64).forward(c, x, out, 11),
        "topk_ids": lambda c: layer.forward_routed(c, x, np.full((10, 2), 3), weights),
        "topk_weights": lambda c: layer.forward_routed(c, x, np.zeros((10, 2), int), weights[:9]),
        "out": lambda c: layer(c, x, logits, out=wide[:9]),
        "logits": lambda c: layer(c, x, logits[:9]),
        "route": lambda c: layer.route(c, logits.astype(np.float64)),
    }


@pytest.mark.parametrize("name", refused_calls(marlin_cy.get_backend("cpu"), np.random.default_rng(0)))
def test_a_refused_call_changes_nothing(cpu_backend, rng, name):
    """Neither the size of the workspace nor the use of the context."""
    ctx, call = cpu_backend.new_context(num_threads=2), refused_calls(cpu_backend, rng)[name]
    for _ in range(2):
        with pytest.raises((IndexError, ValueError, TypeError)):
            call(ctx)
        assert ctx.workspace.nbytes == 0


@pytest.mark.parametrize("items", [0, 1, 7, 100])
@pytest.mark.parametrize("num_threads", [1, 2, 64])
def test_used_up_counters_are_only_read(num_threads, items):
    """Threads that look for work one after another do not add to the counter of a finished share.

    An addition takes the counter's cache line from all other threads: one for each pair of threads, in each product.
    """
    counters = counters_after(num_threads, items)
    assert np.array_equal(counters[:, 0], counters[:, 1])
    assert counters[-1, 1] == items
