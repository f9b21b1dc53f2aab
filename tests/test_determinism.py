"""The bits of a row's result do not depend on other rows, its place, the number of threads or the ISA."""

import numpy as np
import pytest
from asserts import GuardedArray, assert_same_bits
from conftest import ISAS
from problems import CPU_KINDS, DTYPES, G_IDX_MODES, TWO_LEVEL_KINDS, activations, random_problem

import marlin_cy

THREADS = [1, 2, 3, 7]
RUNNABLE = [name for name, isa in ISAS.items() if isa["available"]]
KINDS = CPU_KINDS | TWO_LEVEL_KINDS
CASES = len(KINDS)


def context(backend, rng, compute_dtype):
    """Any number of threads and any instruction set."""
    return backend.new_context(
        num_threads=int(rng.choice(THREADS)), isa=str(rng.choice(RUNNABLE)), compute_dtype=compute_dtype
    )


def alone(stack, ctx, x, expert, dtype):
    """Each row of ``x`` in a call of its own."""
    out = GuardedArray((len(x), stack.n_per_expert), dtype)
    for row in range(len(x)):
        stack.gemm_phase_batched(ctx, x[row : row + 1].copy(), [(expert, 0, row, 1)], out.array, stack.k)
    out.assert_guards()
    return out.array


def by_batched(stack, ctx, rng, x, expert, dtype):
    """In one batch with other rows, at any place, for this and for other experts, in several dispatches."""
    m, others = len(x), int(rng.integers(0, 40))
    place = rng.permutation(m + others)
    batch = activations(rng, m + others, stack.k, x.dtype)
    batch[place[:m]] = x
    cuts = np.unique(np.concatenate([[0, m + others], rng.integers(0, m + others + 1, 3)]))
    dispatches, base = [], m + others
    for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
        dispatches.append((expert, begin, begin, end - begin))
        dispatches.append((int(rng.integers(stack.num_experts)), begin, base, end - begin))
        base += end - begin
    out = GuardedArray((base, stack.n_per_expert), dtype)
    dispatches = [dispatches[i] for i in rng.permutation(len(dispatches))]
    stack.gemm_phase_batched(ctx, batch, np.array(dispatches, np.int64), out.array, stack.k)
    out.assert_guards()
    return out.array[place[:m]]


def by_vllm(stack, ctx, rng, x, expert, dtype):
    top_k, block_size = int(rng.integers(1, 4)), int(rng.choice([1, 3, 16, 64]))
    ids = rng.integers(0, stack.num_experts, (len(x), top_k))
    choice = rng.integers(0, top_k, len(x))
    ids[np.arange(len(x)), choice] = expert
    out = GuardedArray((len(x) * top_k, stack.n_per_expert), dtype)
    routing = marlin_cy.moe_align_block_size(ids, block_size, stack.num_experts)
    stack.gemm_phase_vllm(ctx, x, *routing, out.array, len(x), block_size, top_k)
    out.assert_guards()
    return out.array.reshape(len(x), top_k, -1)[np.arange(len(x)), choice]


def by_view(stack, ctx, rng, x, expert, dtype):
    """In two views that meet anywhere."""
    n = stack.n_per_expert
    cut = 8 * int(rng.integers(0, n // 8 + 1))
    parts = []
    for begin, end in ((0, cut), (cut, n)):
        if end > begin:
            out = GuardedArray((len(x), end - begin), dtype)
            stack.make_expert_linear(expert * n + begin, end - begin).forward(ctx, x, out.array, len(x))
            out.assert_guards()
            parts.append(out.array)
    return np.concatenate(parts, axis=1)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("case", range(CASES))
def test_products(cpu_backend, rng, compute_dtype, case):
    k, n, m = 32 * int(rng.integers(1, 100)), 8 * int(rng.integers(1, 16)), int(rng.integers(1, 60))
    group_size, g_idx = int(rng.choice([32, 64, 128, -1])), rng.choice(G_IDX_MODES)
    kind = list(KINDS)[case % len(KINDS)]
    if kind in TWO_LEVEL_KINDS:
        k, group_size, g_idx = 256 * -(-k // 256), max(group_size, 32), "none"
    print(f"k {k}, n {n}, m {m}, group_size {group_size}, g_idx {g_idx}, {kind}")
    stack = random_problem(rng, 3, k, n, group_size, g_idx=g_idx, **KINDS[kind]).stack(cpu_backend)
    dtype_in, dtype = (DTYPES[name] for name in rng.choice(list(DTYPES), 2))
    x = activations(rng, m, k, dtype_in)
    if case % 3 == 0:
        x[m // 2, k // 2] = np.nan
    expert = int(rng.integers(3))
    first = cpu_backend.new_context(num_threads=1, isa="generic", compute_dtype=compute_dtype)
    expected = alone(stack, first, x, expert, dtype)
    for way in (by_batched, by_vllm, by_view, by_batched):
        ctx = context(cpu_backend, rng, compute_dtype)
        print(way.__name__, ctx)
        assert_same_bits(way(stack, ctx, rng, x, expert, dtype), expected)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("k", [1024, 1056, 2048, 4128])
def test_split_of_k(cpu_backend, rng, compute_dtype, k, num_threads):
    """One row of few columns: with many threads each chunk of K is an item of its own."""
    stack = random_problem(rng, 1, k, 24, 32, g_idx="unequal").stack(cpu_backend)
    x = activations(rng, 2, k)
    results = []
    for threads in (1, num_threads):
        ctx = cpu_backend.new_context(num_threads=threads, compute_dtype=compute_dtype)
        for _ in range(2):  # the second time the slots hold the first's sums
            out = GuardedArray((2, 24), np.float32)
            stack.gemm_phase_batched(ctx, x, [(0, 0, 0, 2)], out.array, k)
            out.assert_guards()
            results.append(out.array)
    for result in results[1:]:
        assert_same_bits(result, results[0])


def random_layer(backend, rng, *, experts=6, hidden=96, inner=64, g_idx="none", top_k=2):
    gate_up = random_problem(rng, experts, hidden, 2 * inner, 32, g_idx=g_idx).stack(backend)
    down = random_problem(rng, experts, inner, hidden, 32, g_idx=g_idx).stack(backend)
    return marlin_cy.MoeLayer(gate_up, down, top_k=top_k)


@pytest.mark.parametrize("g_idx", G_IDX_MODES)
def test_layer(cpu_backend, rng, compute_dtype, g_idx):
    """A token's output does not depend on the others, its place, the threads or the instruction set."""
    layer = random_layer(cpu_backend, rng, g_idx=g_idx, top_k=3)
    x, logits = activations(rng, 40, 96), rng.standard_normal((40, 6)).astype(np.float32)
    x[7, 3] = np.nan
    first = cpu_backend.new_context(num_threads=1, isa="generic", compute_dtype=compute_dtype)
    expected = np.concatenate([layer(first, x[i, None], logits[i, None]) for i in range(40)])
    assert np.isnan(expected[7]).all()
    assert not np.isnan(np.delete(expected, 7, axis=0)).any()
    for isa in RUNNABLE:
        for num_threads in THREADS:
            ctx = cpu_backend.new_context(num_threads=num_threads, isa=isa, compute_dtype=compute_dtype)
            chosen = rng.permutation(40)[: int(rng.integers(1, 41))]
            assert_same_bits(layer(ctx, x[chosen], logits[chosen]), expected[chosen])


def test_layer_wide_enough_for_split_of_k(cpu_backend, rng):
    layer = random_layer(cpu_backend, rng, experts=2, hidden=2080, inner=1056, top_k=1)
    x, logits = activations(rng, 2, 2080), rng.standard_normal((2, 2)).astype(np.float32)
    results = [layer(cpu_backend.new_context(num_threads=threads), x, logits) for threads in (1, 2, 7, 40)]
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_routing(cpu_backend, rng):
    layer = random_layer(cpu_backend, rng, experts=17, top_k=5)
    logits = rng.standard_normal((50, 17)).astype(np.float32)
    ids, weights = layer.route(cpu_backend.new_context(num_threads=1, isa="generic"), logits)
    for isa in RUNNABLE:
        for num_threads in THREADS:
            ctx = cpu_backend.new_context(num_threads=num_threads, isa=isa)
            order = rng.permutation(50)
            for actual, expected in zip(layer.route(ctx, logits[order]), (ids, weights), strict=True):
                assert_same_bits(actual, expected[order])
