"""Products of every code type and scale record on the CPU, by every ISA, against the reference: equal bits."""

import numpy as np
import pytest
from asserts import assert_same_bits
from problems import CPU_KINDS, G_IDX_MODES, TWO_LEVEL_KINDS, activations, random_problem

import marlin_cy
from marlin_cy import reference

ROWS = (1, 2, 5, 6, 7, 12, 13, 33)
NEW_KINDS = {kind: options for kind, options in CPU_KINDS.items() if kind not in ("uint4-float16", "e2m1-float16")}


@pytest.fixture
def check(cpu_backend, rng, on_every_isa, compute_dtype):
    """``check(problem)``: by every ISA, the product has the reference's bits."""
    return lambda problem: check_products(problem.stack(cpu_backend), on_every_isa, compute_dtype, problem, rng)


def check_products(stack, on_every_isa, compute_dtype, problem, rng):
    """Every number of rows, each by another expert; some rows hold large values, zeros and a NaN."""
    x = activations(rng, max(ROWS), problem.k)
    x[3] = 0
    x[4, ::7] *= 1e4
    x[6, 5] = np.nan
    dispatches, at = [], 0
    for number, m in enumerate(ROWS):
        dispatches.append((number % problem.num_experts, 0, at, m))
        at += m
    expected = [problem.reference(expert, x, compute_dtype) for expert in range(problem.num_experts)]
    for ctx in on_every_isa(compute_dtype=compute_dtype, num_threads=2):
        out = np.full((at, problem.n), 7, np.float32)
        stack.gemm_phase_batched(ctx, x, dispatches, out, problem.k)
        for expert, _, begin, m in dispatches:
            assert_same_bits(out[begin : begin + m], expected[expert][:m])


@pytest.mark.sampled(40)
@pytest.mark.parametrize("g_idx", G_IDX_MODES)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(("k", "n"), [(32, 8), (352, 40), (1184, 24)])
@pytest.mark.parametrize("kind", NEW_KINDS)
def test_one_level(check, rng, kind, k, n, group_size, g_idx):
    check(random_problem(rng, 3, k, n, group_size, g_idx=g_idx, **NEW_KINDS[kind]))


@pytest.mark.sampled(30)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("k", "n"), [(256, 24), (768, 8), (2304, 40)])
@pytest.mark.parametrize("kind", TWO_LEVEL_KINDS)
def test_two_levels(check, rng, kind, k, n, group_size):
    check(random_problem(rng, 3, k, n, group_size, **TWO_LEVEL_KINDS[kind]))


@pytest.mark.parametrize("scales", ["float16", "float32_min", "two_level", "two_level_min"])
def test_groups_of_16(check, rng, scales):
    check(random_problem(rng, 3, 1280, 40, 16, codes="uint8", scales=scales))


@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize(
    ("scales", "group_size"), [("float16", 32), ("float32_min", 64), ("two_level", 16), ("two_level_min", 32)]
)
def test_codes_of_six_bits(check, rng, scales, group_size, beyond):
    """Codes of 8 bits that use only six, as those of Q5_K and Q6_K do; or all but one code in some groups of a tile."""
    problem = random_problem(rng, 3, 512, 40, group_size, codes="uint8", scales=scales)
    lowest = 96 if scales == "two_level" else 0
    problem.q[:] = lowest + problem.q % 64
    if beyond:
        problem.q[:, 40, 3] = lowest + 64
        problem.q[:, 511, 31] = 255
        problem.q[:, 300, [0, 16]] = (lowest - 1) % 256
    check(problem)


@pytest.mark.parametrize("kind", ["uint8-two_level", "uint4-two_level_min", "uint8-float32", "uint4-float32_min"])
def test_split_k(cpu_backend, isa, rng, kind):
    """One row and few columns: each chunk of K is an item of its own."""
    options = (CPU_KINDS | TWO_LEVEL_KINDS)[kind]
    problem = random_problem(rng, 1, 5120, 16, 32, **options)
    x, out = activations(rng, 1, 5120), np.empty((1, 16), np.float32)
    ctx = cpu_backend.new_context(isa=isa, num_threads=3)
    problem.stack(cpu_backend).gemm_phase_batched(ctx, x, [(0, 0, 0, 1)], out, 5120)
    assert_same_bits(out, problem.reference(0, x))


@pytest.mark.parametrize(("zero", "value"), [(0, 255), (256, 0), (128, 255), (0, 0), (0, 63), (16, 63)])
def test_largest_sums(cpu_backend, isa, compute_dtype, zero, value):
    """The largest group, activations and differences from the zero point."""
    problem = random_problem(np.random.default_rng(0), 1, 128, 16, 128, codes="uint8")
    problem.zero[:], problem.q[:], problem.scale[:] = zero, value, 1
    x = np.ones((7, 128), np.float32)
    x[1] = -1
    out = np.empty((7, 16), np.float32)
    ctx = cpu_backend.new_context(isa=isa, compute_dtype=compute_dtype)
    problem.stack(cpu_backend).gemm_phase_batched(ctx, x, [(0, 0, 0, 7)], out, 128)
    assert_same_bits(out, problem.reference(0, x, compute_dtype))
    np.testing.assert_allclose(out[0], 128 * (value - zero), rtol=1e-6)


@pytest.mark.parametrize("kind", ["uint8-float16", "uint4-float32_min", "uint4-two_level_min", "uint8-two_level"])
def test_view(cpu_backend, isa, rng, kind):
    """Of some columns, across experts."""
    problem = random_problem(rng, 2, 512, 40, 32, **(CPU_KINDS | TWO_LEVEL_KINDS)[kind])
    view = problem.stack(cpu_backend).make_expert_linear(24, 32, np.arange(32.0))
    x, out = activations(rng, 9, 512), np.empty((9, 32), np.float32)
    view.forward(cpu_backend.new_context(isa=isa), x, out, 9)
    columns = np.concatenate([problem.reference(expert, x) for expert in range(2)], axis=1)[:, 24:56]
    assert_same_bits(out, columns + np.arange(32, dtype=np.float32))


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_layer_of_different_widths(cpu_backend, isa, compute_dtype, rng, tokens):
    """gate_up has 4 bits and two levels, down has 8 bits, the shared expert other records: against dense weights."""
    gate_up = random_problem(rng, 6, 256, 512, 32, codes="uint4", scales="two_level_min")
    down = random_problem(rng, 6, 256, 256, 16, codes="uint8", scales="two_level")
    shared = [random_problem(rng, 1, 256, n, 64, codes="uint8", scales="float32") for n in (128, 256)]
    shared[1] = random_problem(rng, 1, 64, 256, 32, codes="uint4", scales="float32")
    for problem, size in ((gate_up, 3e-3), (down, 3e-3)):  # so that activations stay near 1
        problem.block_scale[:] = size * np.sign(problem.block_scale)
    gate_up.block_minimum[:] = 3e-4
    layer = marlin_cy.MoeLayer(
        gate_up.stack(cpu_backend),
        down.stack(cpu_backend),
        top_k=2,
        shared_expert=marlin_cy.SharedExpert(*(problem.stack(cpu_backend) for problem in shared)),
    )
    x = rng.standard_normal((tokens, 256)).astype(np.float32)
    ids = np.argsort(rng.random((tokens, 6)), axis=1)[:, :2].astype(np.int32)
    weights = rng.random((tokens, 2)).astype(np.float32)
    results = [
        layer.forward_routed(
            cpu_backend.new_context(isa=name, compute_dtype=compute_dtype, num_threads=threads), x, ids, weights
        )
        for name, threads in ((isa, 2), ("generic", 1))
    ]
    assert_same_bits(*results)
    dense = [[problem.dense(e) for e in range(problem.num_experts)] for problem in (gate_up, down, *shared)]
    expected = reference.moe_layer(
        x, *dense[:2], ids, weights, shared=reference.shared_expert(x.astype(np.float64), dense[2][0], dense[3][0])
    )
    bound = {"int16": 3e-4, "int8": 6e-2}[compute_dtype]
    assert np.linalg.norm(results[0] - expected) <= bound * np.linalg.norm(expected)
