"""The CPU gives the same bits as ``marlin_cy.reference``, on every instruction set."""

from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from asserts import GuardedArray, assert_close, assert_same_bits, relative_error
from problems import DTYPES, G_IDX_MODES, WEIGHT_KINDS, activations, as_given, random_problem

import marlin_cy
from marlin_cy import reference
from marlin_cy.activations import ACTIVATIONS
from marlin_cy.cpu._dispatch import KERNEL_CODE_TYPES, activate
from marlin_cy.weights.canonical import CanonicalWeight, pack_words
from marlin_cy.weights.code_types import CODE_TYPES
from marlin_cy.weights.scale_records import scale_record

CODES_16 = np.arange(1 << 16, dtype=np.uint16)


def product(stack, ctx, x, expert=0, dtype=np.float32):
    out = GuardedArray((len(x), stack.n_per_expert), dtype)
    stack.gemm_phase_batched(ctx, x, [(expert, 0, 0, len(x))], out.array, stack.k)
    out.assert_guards()
    return out.array


def one_expert(backend, q, scale, zero, group_size, scales="float16", codes="uint4"):
    zero = None if zero is None else zero.astype(np.uint8)
    builder = backend.new_stack_builder(1, *q.shape, group_size=group_size, codes=codes, scales=scales)
    builder.add(
        0, 0, CanonicalWeight(pack_words(q), scale.astype(scale_record(scales).scale), zero, group_size, codes=codes)
    )
    return builder.finish()


def selection(backend, k, scale=1.0):
    """A stack whose column ``n`` is row ``n``, times ``scale``: one code of 1 among zeros."""
    q = np.eye(k, dtype=np.uint8)
    return one_expert(backend, q, np.full((k // 32, k), scale), np.zeros((k // 32, k)), 32)


@pytest.mark.sampled(30)
@pytest.mark.parametrize("g_idx", G_IDX_MODES)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_equals_the_reference(cpu_backend, rng, on_every_isa, compute_dtype, group_size, g_idx, kind):
    for _ in range(2):
        k, n, m = 32 * int(rng.integers(1, 40)), 8 * int(rng.integers(1, 12)), int(rng.integers(1, 60))
        checkpoint_format = rng.choice(["gptq", "gptq_v2"])
        problem = random_problem(
            rng, 2, k, n, group_size, g_idx=g_idx, checkpoint_format=checkpoint_format, **WEIGHT_KINDS[kind]
        )
        print(f"k {k}, n {n}, m {m}")
        stack, x = problem.stack(cpu_backend), activations(rng, m, k)
        expected = [problem.reference(expert, x, compute_dtype) for expert in range(2)]
        for ctx in on_every_isa(compute_dtype=compute_dtype, num_threads=2):
            for expert in range(2):
                assert_same_bits(product(stack, ctx, x, expert), expected[expert])


@pytest.mark.sampled(64)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 47, 48, 49, 96, 97])
@pytest.mark.parametrize("codes", KERNEL_CODE_TYPES)
def test_every_number_of_rows(cpu_backend, rng, on_every_isa, compute_dtype, m, codes):
    """Register tiles and row blocks, and one row more and less."""
    problem = random_problem(rng, 1, 160, 56, 64, codes=codes)
    stack, x = problem.stack(cpu_backend), activations(rng, m, 160)
    expected = problem.reference(0, x, compute_dtype)
    for ctx in on_every_isa(compute_dtype=compute_dtype, num_threads=1):
        assert_same_bits(product(stack, ctx, x), expected)


@pytest.mark.parametrize("n", range(8, 80, 8))
@pytest.mark.parametrize("codes", KERNEL_CODE_TYPES)
def test_every_tail_of_n(cpu_backend, rng, on_every_isa, compute_dtype, n, codes):
    problem = random_problem(rng, 2, 96, n, 32, codes=codes)
    stack, x = problem.stack(cpu_backend), activations(rng, 3, 96)
    expected = problem.reference(1, x, compute_dtype)
    for ctx in on_every_isa(compute_dtype=compute_dtype, num_threads=1):
        assert_same_bits(product(stack, ctx, x, 1), expected)


@pytest.mark.sampled(80)
@pytest.mark.parametrize("k", [32, 96, 128, 160, 992, 1024, 1056, 2048, 2080, 3104])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("codes", KERNEL_CODE_TYPES)
def test_every_tail_of_k(cpu_backend, rng, on_every_isa, compute_dtype, k, group_size, codes):
    """Around the chunks of 1024 in which K is summed."""
    problem = random_problem(rng, 1, k, 8, group_size, codes=codes)
    stack, x = problem.stack(cpu_backend), activations(rng, 3, k)
    expected = problem.reference(0, x, compute_dtype)
    for ctx in on_every_isa(compute_dtype=compute_dtype, num_threads=1):
        assert_same_bits(product(stack, ctx, x), expected)


@pytest.mark.parametrize(
    ("codes", "code", "zero"),
    [("uint4", code, zero) for code in (0, 15) for zero in (0, 16)] + [("e2m1", code, None) for code in (0, 7, 8, 15)],
)
@pytest.mark.parametrize("m", [1, 12])
def test_extreme_codes(cpu_backend, isa, compute_dtype, codes, code, zero, m):
    """The largest sums that a group can have, of either sign: no intermediate overflows."""
    k, n = 256, 16
    x = np.ones((12, k), np.float32)
    x[1] = -1
    x[2, ::2] = -1
    x[3, 0] = 1e-3
    x[4, 1:] = (127 * 256 - 128) / 32639  # a plane of -128, the largest magnitude
    x[5] = -x[4]
    ctx = cpu_backend.new_context(compute_dtype=compute_dtype, isa=isa)
    q, scale = np.full((k, n), code, np.uint8), np.full((2, n), 0.5, np.float16)
    zero = None if zero is None else np.full((2, n), zero, np.uint8)
    stack = one_expert(cpu_backend, q, scale, zero, 128, codes=codes)
    expected = reference.gemm(x, q, scale, zero, 128, compute_dtype=compute_dtype, codes=codes)
    results = [product(stack, ctx, rows) for rows in np.split(x, len(x) // m)]
    assert_same_bits(np.concatenate(results), expected)


def test_every_code(cpu_backend, isa, compute_dtype):
    """Each 4-bit float at each place in a block of 8: the value itself comes out."""
    q = (np.arange(32)[:, None] + np.arange(16)).astype(np.uint8) % 16
    stack = one_expert(cpu_backend, q, np.ones((1, 16)), None, 32, codes="e2m1")
    result = product(stack, cpu_backend.new_context(compute_dtype=compute_dtype, isa=isa), np.eye(32, dtype=np.float32))
    np.testing.assert_allclose(result, CODE_TYPES["e2m1"].decode_table[q], rtol=3e-7)


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_scales_of_any_finite_size(cpu_backend, rng, isa, compute_dtype, kind):
    """Includes subnormal scales, which halving must not round, and bfloat16 scales whose products exceed float32."""
    codes, record = WEIGHT_KINDS[kind].values()
    scales = CODES_16.view(scale_record(record).scale)
    with np.errstate(invalid="ignore"):
        scales = scales[np.isfinite(scales)]
    k, n = 64, 512
    scale, zero = rng.choice(scales, (2, n)), rng.integers(0, 17, (2, n)).astype(np.uint8)
    scale[0, :64] = CODES_16[1:65].view(scales.dtype)
    zero = None if codes == "e2m1" else zero
    q, x = rng.integers(0, 16, (k, n)).astype(np.uint8), activations(rng, 5, k)
    ctx = cpu_backend.new_context(compute_dtype=compute_dtype, isa=isa)
    with np.errstate(over="ignore"):
        expected = reference.gemm(x, q, scale, zero, 32, compute_dtype=compute_dtype, codes=codes)
    stack = one_expert(cpu_backend, q, scale, zero, 32, record, codes)
    assert_same_bits(product(stack, ctx, x), expected)


FLOAT32 = np.finfo(np.float32)
ROWS = {
    "zeros": [0.0, -0.0],
    "largest": [FLOAT32.max, -FLOAT32.max],
    "largest and tiny": [FLOAT32.max, FLOAT32.tiny],
    "smallest normal": [FLOAT32.tiny],
    "denormal": [FLOAT32.smallest_subnormal, -FLOAT32.smallest_subnormal],
    "just below the least magnitude": [np.nextafter(reference.MIN_AMAX, np.float32(0))],
    "the least magnitude": [reference.MIN_AMAX, -reference.MIN_AMAX],
    "denormal beside normal": [1.0, FLOAT32.smallest_subnormal],
    "halfway between steps": [32639.0, *(i + 0.5 for i in range(-40, 40))],
    "NaN": [1.0, np.nan],
    "negative NaN": [1.0, -np.nan],
    "infinity": [1.0, np.inf],
    "negative infinity": [-np.inf, 1.0],
    "both infinities": [np.inf, -np.inf],
}


@pytest.mark.parametrize("values", ROWS.values(), ids=ROWS)
def test_special_activations(cpu_backend, rng, isa, compute_dtype, values):
    """One row of them among ordinary ones, in one group and in all."""
    k = 160
    problem = random_problem(rng, 1, k, 24, 64)
    x = activations(rng, 7, k)
    x[2, 64:128] = np.resize(np.array(values, np.float32), 64)
    x[4] = np.resize(np.array(values, np.float32), k)
    ctx = cpu_backend.new_context(compute_dtype=compute_dtype, isa=isa)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = problem.reference(0, x, compute_dtype)
    result = product(problem.stack(cpu_backend), ctx, x)
    assert_same_bits(result, expected)
    finite = np.isfinite(np.array(values)).all()
    assert np.isnan(result[[2, 4]]).all() if not finite else not np.isnan(result[2]).any()
    assert not np.isnan(np.delete(result, [2, 4], axis=0)).any()


@pytest.mark.parametrize("column", [0, 31, 32, 95, 127])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(cpu_backend, rng, isa, compute_dtype, column, value, dtype):
    problem = random_problem(rng, 1, 128, 24, 32, g_idx="unequal")
    stack = problem.stack(cpu_backend)
    ctx = cpu_backend.new_context(compute_dtype=compute_dtype, isa=isa)
    x = activations(rng, 50, 128, DTYPES[dtype])
    clean = product(stack, ctx, x, dtype=DTYPES[dtype])
    x[17, column] = value
    result = product(stack, ctx, x, dtype=DTYPES[dtype])
    assert np.isnan(result[17].astype(np.float32)).all()
    assert_same_bits(np.delete(result, 17, axis=0), np.delete(clean, 17, axis=0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_of_a_stack(cpu_backend, rng, isa, compute_dtype, dtype):
    """Each expert's own, rounded once more; in row blocks of any length, and not in a view."""
    problem, dtype = random_problem(rng, 3, 96, 40, 32, bias=True), DTYPES[dtype]
    stack, x = problem.stack(cpu_backend), activations(rng, 70, 96)
    ctx = cpu_backend.new_context(compute_dtype=compute_dtype, isa=isa, num_threads=2)
    np.testing.assert_array_equal(stack.bias, problem.bias)
    for expert in range(3):
        expected = problem.reference(expert, x, compute_dtype).astype(dtype)
        assert_same_bits(product(stack, ctx, x, expert, dtype), expected)
    ids = rng.permuted(np.tile(np.arange(3), (70, 1)), axis=1)[:, :2]
    out = GuardedArray((140, 40), dtype)
    stack.gemm_phase_vllm(ctx, x, *marlin_cy.moe_align_block_size(ids, 16, 3), out.array, 70, 16, 2)
    out.assert_guards()
    every = np.stack([problem.reference(expert, x, compute_dtype) for expert in range(3)]).astype(dtype)
    assert_same_bits(out.array, every[ids.reshape(-1), np.arange(140) // 2])
    out = GuardedArray((70, 40), np.float32)
    stack.make_expert_linear(40, 40).forward(ctx, x, out.array, 70)
    out.assert_guards()
    assert_same_bits(out.array, replace(problem, bias=None).reference(1, x, compute_dtype))


@pytest.mark.parametrize(("name", "bound"), [("int16", 1e-4), ("int8", 2e-2)])
@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_relative_error(cpu_backend, rng, name, bound, kind):
    problem = random_problem(rng, 1, 2048, 256, 128, **WEIGHT_KINDS[kind])
    x = rng.standard_normal((32, 2048)).astype(np.float32)
    result = product(problem.stack(cpu_backend), cpu_backend.new_context(compute_dtype=name), x)
    assert relative_error(result, x.astype(np.float64) @ problem.dense(0)) <= bound


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_input_is_widened_exactly(cpu_backend, isa, dtype):
    """Each of the 65536 values of a 16-bit type gives the same result as the equal float32 value."""
    x = CODES_16.view(DTYPES[dtype]).reshape(-1, 32)
    ctx = cpu_backend.new_context(isa=isa)
    stack = selection(cpu_backend, 32)
    with np.errstate(invalid="ignore"):
        assert_same_bits(product(stack, ctx, x), product(stack, ctx, as_given(x)))
        # One code at a time, so that no code is hidden by a larger one. Exact values are returned unchanged.
        alone = np.zeros((1 << 16, 32), DTYPES[dtype])
        alone[:, 5] = CODES_16.view(DTYPES[dtype])
        wide = as_given(alone)
    result = product(stack, ctx, alone)
    assert_same_bits(result, product(stack, ctx, wide))
    live = np.isfinite(wide[:, 5]) & (np.abs(wide[:, 5]) >= reference.MIN_AMAX)
    np.testing.assert_allclose(result[live, 5], wide[live, 5], rtol=3e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_outputs_are_narrowed_to_nearest_even(cpu_backend, rng, isa, dtype):
    """Random bits, and the neighbourhoods of all halfway points, through a bias on a product of zero."""
    target = DTYPES[dtype]
    values = CODES_16.view(target)
    values = values[np.isfinite(values.astype(np.float32))].astype(np.float32)
    ordered = np.unique(values)
    halfway = (ordered[1:] / 2 + ordered[:-1] / 2).astype(np.float32)
    bits = np.frombuffer(rng.bytes(1 << 18), np.float32)
    special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, FLOAT32.max, -FLOAT32.max, 65504, 65519.996, 65520, 1e-45])
    steps = [np.nextafter(halfway, np.float32(limit)) for limit in (-np.inf, np.inf)]
    bias = np.concatenate([values, halfway, *steps, bits, special.astype(np.float32)]).astype(np.float32)
    bias = np.pad(bias, (0, -len(bias) % 8))
    q = np.zeros((32, len(bias)), np.uint8)
    stack = one_expert(cpu_backend, q, np.ones((1, len(bias))), np.zeros((1, len(bias))), 32)
    out = GuardedArray((1, len(bias)), target)
    x = np.zeros((1, 32), np.float32)
    stack.make_expert_linear(0, len(bias), bias).forward(cpu_backend.new_context(isa=isa), x, out.array, 1)
    out.assert_guards()
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (bias + np.float32(0)).astype(target)  # a product of +0 makes -0 into +0
    assert_same_bits(out.array[0], expected)


SPECIAL = [np.nan, np.inf, 0.0, FLOAT32.max, 1e30, 1e19, 1e10, 100.0, 89.0, 7.0, 1.0, 1e-10, FLOAT32.tiny, 1e-45]


def activation_sums(gates, ups):
    """float32 ``[rows, 32]``: 16 gates and 16 ups per row, as ``glu_epilogue`` takes them."""
    return np.concatenate([part.astype(np.float32).reshape(-1, 16) for part in (gates, ups)], axis=1)


def activation_bound(name, gates, ups):
    """The bound that rowops.h derives, plus the error where ``gate * sigmoid`` or the result is subnormal."""
    if name == "swigluoai":
        gates, ups = np.minimum(gates, 7), 1 + np.minimum(np.abs(ups), 7)
    elif name == "silu_clamp10":
        gates, ups = np.minimum(gates, 10), np.minimum(np.abs(ups), 10)
    elif name == "relu2":
        gates = ups = np.maximum(ups, 0)
    return 6 * 2.0**-24 * np.abs(gates * ups) + (1 + np.abs(ups)) * FLOAT32.smallest_subnormal


def assert_activated(name, isa, sums):
    gates, ups = np.split(sums.astype(np.float64), 2, axis=1)
    expected = ACTIVATIONS[name].reference(gates, ups)
    assert_close(activate(isa, name, sums), expected, activation_bound(name, gates, ups))


@pytest.mark.parametrize("name", ACTIVATIONS)
class TestActivations:
    def test_close_to_float64(self, rng, isa, name):
        gates = np.concatenate([np.linspace(-20, 20, 1 << 15), rng.standard_normal(1 << 15)])
        assert_activated(name, isa, activation_sums(gates, rng.uniform(-10, 10, 1 << 16)))

    def test_gates_and_ups_of_any_size(self, rng, isa, name):
        """Inputs whose products float32 can represent."""
        gates = 2.0 ** rng.uniform(-149, 127, 1 << 14) * rng.choice([-1, 1], 1 << 14)
        ups = 2.0 ** rng.uniform(-149, np.minimum(127, 126 - np.log2(np.abs(gates)))) * rng.choice([-1, 1], 1 << 14)
        if name == "relu2":  # the square of up alone
            ups = np.clip(ups, -(2.0**63), 2.0**63)
        assert_activated(name, isa, activation_sums(gates, ups))

    def test_special_values(self, isa, name):
        """All pairs: NaN and infinities just where the formula has them, and the rest within the bound.

        Except an infinite up with a gate that float32 may round to 0.
        """
        values = np.array(SPECIAL + [-value for value in SPECIAL]).astype(np.float32).astype(np.float64)
        pairs = np.stack(np.meshgrid(values, values), axis=-1).reshape(-1, 2)
        with np.errstate(all="ignore"):
            faint = np.abs(ACTIVATIONS[name].reference(pairs[:, 0], np.ones(len(pairs)))) < 1e-35
            pairs = pairs[~(faint & np.isinf(pairs[:, 1]))]
            gates, ups = (np.resize(part, (50, 16)) for part in pairs.T)
            expected, bound = ACTIVATIONS[name].reference(gates, ups), activation_bound(name, gates, ups)
            rounded = expected.astype(np.float32)
            actual = activate(isa, name, activation_sums(gates, ups))
        finite = np.isfinite(rounded)
        assert_same_bits(actual[~finite], rounded[~finite])
        bound = np.where(np.isfinite(bound), bound, 0)  # an infinite gate or up times 0
        assert_close(actual[finite], expected[finite], bound[finite])

    def test_tails(self, isa, name):
        """Far from 0 a gate comes out as itself, or as 0; the way there is monotone."""
        gates = np.linspace(8, 1000, 1 << 12)
        ones = np.ones_like(gates)
        high, low = (activate(isa, name, activation_sums(sign * gates, ones)).reshape(-1) for sign in (1, -1))
        if name == "relu2":
            assert (high == 1).all()
            assert (low == 1).all()  # gates do not matter
            return
        if name == "swigluoai":
            assert (high == high[0]).all()
        elif name == "silu_clamp10":
            assert (high[gates >= 10] == high[-1]).all()
            assert (np.diff(high) >= 0).all()
        else:
            assert (np.abs(high - gates) <= 2 * np.spacing(high) + 1.01 * gates * np.exp(-gates)).all()
        assert (low <= 0).all()
        assert (np.diff(low) >= 0).all()
        assert (low[gates > 100] == 0).all()

    def test_same_bits_on_every_isa(self, rng, isa, name):
        sums = np.frombuffer(rng.bytes(1 << 18), np.float32).reshape(-1, 32)
        normal = (4 * rng.standard_normal((1 << 12, 32))).astype(np.float32)
        bias = rng.standard_normal(32).astype(np.float32)
        for given in (None, bias):
            for values in (sums, normal):
                assert_same_bits(activate(isa, name, values, given), activate("generic", name, values, given))

    def test_bias_is_added_before(self, rng, isa, name):
        sums, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((50, 32), 32))
        assert_same_bits(activate(isa, name, sums, bias), activate(isa, name, sums + bias))


def test_reference_fma_rounds_once(rng):
    """Against exact rational arithmetic: random, and cases in which two roundings would give another result."""
    a, b = (rng.standard_normal(300).astype(np.float32) for _ in range(2))
    c = (-a * b * (1 + rng.choice([0, 2.0**-23, 2.0**-40, 1e-3], 300))).astype(np.float32)
    tie = np.float32(1 + 2.0**-12), np.float32(1 - 2.0**-12 + 2.0**-24), np.float32(2.0**-24)
    a, b, c = (np.append(array, value) for array, value in zip((a, b, c), tie, strict=True))
    for i, result in enumerate(reference.fma_f32(a, b, c)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        below, above = np.nextafter(result, np.float32(-np.inf)), np.nextafter(result, np.float32(np.inf))
        distance = abs(Fraction(float(result)) - exact)
        assert all(distance <= abs(Fraction(float(other)) - exact) for other in (below, above))


def test_reference_values_fit_their_planes(rng):
    for name, qmax in reference.QMAX.items():
        values, _ = reference.quantize(activations(rng, 50, 128), 32, name)
        assert np.abs(values).max() == qmax


def test_bfloat16_is_the_type_of_ml_dtypes():
    assert DTYPES["bfloat16"] == np.dtype(ml_dtypes.bfloat16)
