"""The contract of ``marlin_cy.interface``, compared with ``marlin_cy.reference``; the same tests for every backend."""

import numpy as np
import pytest
from asserts import (
    GuardedArray,
    GuardedBuffer,
    assert_agree,
    assert_close,
    assert_same_bits,
    product_bound,
    unit_roundoff,
)
from conftest import OPENCL_PLACES
from problems import DTYPES, G_IDX_MODES, WEIGHT_KINDS, activations, as_given, random_problem

import marlin_cy
from marlin_cy import reference
from marlin_cy.backends import BUILT_IN
from marlin_cy.errors import UnsupportedError

SHAPES = [  # (k, n, group_size): tails of K, N down to one unit, groups longer than K
    (32, 8, 32),
    (96, 24, 32),
    (96, 24, 128),
    (160, 40, 64),
    (160, 40, -1),
    (256, 136, 128),
    (2080, 56, 128),
    (1056, 16, 256),
]
DTYPE_PAIRS = [(a, b) for a in DTYPES for b in DTYPES]


def batched(stack, ctx, x, dispatches, rows, dtype=np.float32):
    """The output of ``gemm_phase_batched``, with rows that no dispatch names at their first value."""
    backend = ctx.backend
    out = GuardedBuffer(backend, (rows, stack.n_per_expert), dtype)
    assert stack.gemm_phase_batched(ctx, backend.from_host(x), dispatches, out.buffer, stack.k) is None
    return out.result()


def vllm(stack, ctx, x, routing, rows, prob_m, block_size, top_k, dtype=np.float32):
    backend = ctx.backend
    out = GuardedBuffer(backend, (rows, stack.n_per_expert), dtype)
    x, sorted_ids, expert_ids, past = map(backend.from_host, (x, *routing))
    stack.gemm_phase_vllm(ctx, x, sorted_ids, expert_ids, past, out.buffer, prob_m, block_size, top_k)
    return out.result()


def forward(linear, ctx, x, m=None, dtype=np.float32):
    backend = ctx.backend
    out = GuardedBuffer(backend, (len(x), linear.out_features), dtype)
    assert linear.forward(ctx, backend.from_host(x), out.buffer, len(x) if m is None else m) is None
    return out.result()


def with_bias(bound, bias, dtype=np.float32):
    """The bound of a product that a bias is added to, in float32, before it is rounded to ``dtype``."""
    return bound + 2 * unit_roundoff(dtype) * np.abs(bias)


def untouched(rows, n, dtype=np.float32):
    return GuardedArray((rows, n), dtype).array


@pytest.mark.parametrize("name", BUILT_IN)
def test_backend_is_tested_here(name):
    reason = marlin_cy.available_backends()[name]
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("place", OPENCL_PLACES, ids=lambda place: place.label)
def test_tier_is_tested_here(place):
    if place.missing is not None:
        pytest.skip(f"the device lacks {place.missing}")


class TestStack:
    def test_properties(self, backend, rng):
        problem = random_problem(rng, 3, 160, 40, 32)
        stack = problem.stack(backend)
        assert (stack.num_experts, stack.k, stack.n_per_expert) == (3, 160, 40)
        assert 64 % stack.n_tile == 0
        assert stack.requires_vllm_moe in (False, True)
        assert isinstance(stack.as_any(), type(stack))
        metadata = stack.metadata
        assert (metadata.bits, metadata.group_size, metadata.act_order) == (4, 32, False)
        assert metadata.packed_bytes >= 3 * 160 * 40 / 2

    @pytest.mark.parametrize("g_idx", ["common", "per_expert", "unequal"])
    def test_metadata_of_act_order(self, backend, rng, g_idx):
        assert random_problem(rng, 3, 128, 16, 32, g_idx=g_idx).stack(backend).metadata.act_order

    def test_metadata_of_one_group(self, backend, rng):
        assert random_problem(rng, 1, 96, 16, -1).stack(backend).metadata.group_size == 96

    def test_context_knows_its_backend(self, backend):
        assert backend.new_context().backend is backend

    def test_buffers(self, backend, rng):
        x = activations(rng, 3, 5)
        assert_same_bits(backend.to_host(backend.from_host(x)), x)
        assert backend.empty((3, 5), np.float32).shape == (3, 5)


class TestBatched:
    @pytest.mark.sampled(12)
    @pytest.mark.parametrize(("k", "n", "group_size"), SHAPES)
    @pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
    def test_matches_the_reference(self, backend, rng, k, n, group_size, checkpoint_format):
        problem = random_problem(rng, 3, k, n, group_size, checkpoint_format=checkpoint_format)
        x = activations(rng, 12, k)
        dispatches = [(2, 0, 5, 4), (0, 4, 1, 1), (1, 3, 12, 7)]
        result = batched(problem.stack(backend), backend.new_context(), x, dispatches, 20)
        expected = reference.gemm_phase_batched(
            x.astype(np.float64), problem.dense_all(), dispatches, untouched(20, n).astype(np.float64)
        )
        bound = np.zeros((20, n))
        for expert, in_row, out_row, m in dispatches:
            bound[out_row : out_row + m] = product_bound(backend, x[in_row : in_row + m], problem.dense(expert))
        assert_close(result, expected, bound)  # and with bounds of 0, the rows that no dispatch names

    @pytest.mark.parametrize("g_idx", ["common", "per_expert", "unequal"])
    @pytest.mark.parametrize("group_size", [32, 128])
    def test_g_idx(self, backend, rng, g_idx, group_size):
        problem = random_problem(rng, 3, 288, 24, group_size, g_idx=g_idx)
        x = activations(rng, 5, 288)
        result = batched(problem.stack(backend), backend.new_context(), x, [(e, 0, 5 * e, 5) for e in range(3)], 15)
        for expert in range(3):
            w = problem.dense(expert)
            assert_close(result[5 * expert : 5 * expert + 5], x.astype(np.float64) @ w, product_bound(backend, x, w))

    def test_symmetric(self, backend, rng):
        problem = random_problem(rng, 1, 128, 16, 64, sym=True)
        x = activations(rng, 3, 128)
        w = problem.dense(0)
        result = batched(problem.stack(backend), backend.new_context(), x, [(0, 0, 0, 3)], 3)
        assert_close(result, x.astype(np.float64) @ w, product_bound(backend, x, w))

    @pytest.mark.sampled(5)
    @pytest.mark.parametrize(("dtype_in", "dtype_out"), DTYPE_PAIRS)
    def test_dtypes(self, backend, rng, dtype_in, dtype_out):
        problem = random_problem(rng, 2, 160, 40, 64)
        x = activations(rng, 6, 160, DTYPES[dtype_in])
        result = batched(problem.stack(backend), backend.new_context(), x, [(1, 0, 0, 6)], 7, DTYPES[dtype_out])
        w = problem.dense(1)
        assert result.dtype == DTYPES[dtype_out]
        assert_close(result[:6], as_given(x) @ w, product_bound(backend, as_given(x), w, DTYPES[dtype_out]))
        assert_same_bits(result[6:], untouched(1, 40, DTYPES[dtype_out]))

    def test_dispatches_as_lists_tuples_and_arrays(self, backend, rng):
        problem = random_problem(rng, 2, 64, 16, 32)
        stack, ctx, x = problem.stack(backend), backend.new_context(), activations(rng, 4, 64)
        dispatches = [(0, 0, 2, 2), (1, 1, 0, 2)]
        expected = batched(stack, ctx, x, dispatches, 4)
        columns = np.array(dispatches, np.int64).T.copy().T  # in column order
        for form in (
            tuple(map(list, dispatches)),
            np.array(dispatches, np.int64),
            np.array(dispatches, np.int32),
            columns,
            [tuple(np.int16(number) for number in dispatch) for dispatch in dispatches],
        ):
            assert_same_bits(batched(stack, ctx, x, form, 4), expected)

    @pytest.mark.parametrize("dispatches", [[], (), np.empty((0, 4), np.int64), [(0, 0, 0, 0)], [(1, 4, 4, 0)]])
    def test_nothing_to_do(self, backend, rng, dispatches):
        stack = random_problem(rng, 2, 64, 16, 32).stack(backend)
        result = batched(stack, backend.new_context(), activations(rng, 4, 64), dispatches, 4)
        assert_same_bits(result, untouched(4, 16))

    def test_no_rows_at_all(self, backend, rng):
        stack = random_problem(rng, 2, 64, 16, 32).stack(backend)
        empty = np.empty((0, 64), np.float32)
        assert batched(stack, backend.new_context(), empty, [(0, 0, 0, 0)], 0).shape == (0, 16)

    def test_input_rows_may_be_shared(self, backend, rng):
        problem = random_problem(rng, 3, 64, 16, 32)
        stack, ctx, x = problem.stack(backend), backend.new_context(), activations(rng, 3, 64)
        result = batched(stack, ctx, x, [(0, 0, 0, 3), (0, 1, 3, 2), (2, 0, 5, 3)], 8)
        assert_same_bits(result[1:3], result[3:5])
        alone = batched(stack, ctx, x, [(2, 0, 0, 3)], 3)
        assert_agree(backend, result[5:], alone, product_bound(backend, x, problem.dense(2)))

    def test_many_rows_and_dispatches(self, backend, rng):
        """Row blocks of one dispatch, and runs of one expert over several."""
        problem = random_problem(rng, 4, 64, 16, 32)
        x = activations(rng, 400, 64)
        sizes = rng.integers(0, 60, 12)
        ends = np.cumsum(sizes)
        dispatches = [
            (int(rng.integers(4)), int(rng.integers(400 - m)), int(end - m), int(m))
            for m, end in zip(sizes, ends, strict=True)
        ]
        expected = reference.gemm_phase_batched(
            x.astype(np.float64), problem.dense_all(), dispatches, np.zeros((ends[-1], 16))
        )
        order = rng.permutation(len(dispatches))
        result = batched(
            problem.stack(backend), backend.new_context(), x, [dispatches[i] for i in order], int(ends[-1])
        )
        bound = np.concatenate([product_bound(backend, x[i : i + m], problem.dense(e)) for e, i, _, m in dispatches])
        assert_close(result, expected, bound)

    def test_flat_buffers(self, backend, rng):
        problem = random_problem(rng, 2, 64, 16, 32)
        stack, ctx, x = problem.stack(backend), backend.new_context(), activations(rng, 3, 64)
        expected = batched(stack, ctx, x, [(1, 0, 0, 3)], 3)
        out = backend.from_host(np.zeros(3 * 16, np.float32))
        stack.gemm_phase_batched(ctx, backend.from_host(x.reshape(-1)), [(1, 0, 0, 3)], out, 64)
        assert_same_bits(backend.to_host(out).reshape(3, 16), expected)

    def test_read_only_and_unaligned_to_more_than_its_dtype(self, backend, rng):
        problem = random_problem(rng, 1, 64, 16, 32)
        stack, ctx, x = problem.stack(backend), backend.new_context(), activations(rng, 3, 64)
        expected = batched(stack, ctx, x, [(0, 0, 0, 3)], 3)
        shifted = GuardedArray(x.shape, x.dtype).array
        shifted[:] = x
        shifted.flags.writeable = False
        assert_same_bits(batched(stack, ctx, shifted, [(0, 0, 0, 3)], 3), expected)

    def test_zero_workspace(self, backend, rng):
        problem = random_problem(rng, 2, 2080, 16, 32)
        stack, ctx, x = problem.stack(backend), backend.new_context(), activations(rng, 2, 2080)
        assert stack.zero_workspace(ctx) is None
        first = batched(stack, ctx, x, [(1, 0, 0, 2)], 2)
        stack.zero_workspace(ctx)
        assert_same_bits(batched(stack, ctx, x, [(1, 0, 0, 2)], 2), first)

    def test_a_context_serves_many_stacks(self, backend, rng):
        ctx = backend.new_context()
        for k, n, m in ((64, 16, 1), (512, 72, 70), (32, 8, 2), (2048, 8, 5)):
            problem = random_problem(rng, 2, k, n, 32)
            x, w = activations(rng, m, k), problem.dense(1)
            result = batched(problem.stack(backend), ctx, x, [(1, 0, 0, m)], m)
            assert_close(result, x.astype(np.float64) @ w, product_bound(backend, x, w))


class TestVllm:
    @pytest.mark.sampled(10)
    @pytest.mark.parametrize("block_size", [1, 3, 16, 64])
    @pytest.mark.parametrize("top_k", [1, 2, 4])
    def test_matches_the_reference(self, backend, rng, block_size, top_k):
        problem = random_problem(rng, 5, 96, 24, 32)
        tokens = 13
        x = activations(rng, tokens + 2, 96)  # two rows beyond prob_m
        ids = np.stack([rng.choice(5, top_k, replace=False) for _ in range(tokens)])
        routing = marlin_cy.moe_align_block_size(ids, block_size, 5)
        rows = tokens * top_k + 3
        result = vllm(problem.stack(backend), backend.new_context(), x, routing, rows, tokens, block_size, top_k)
        expected = reference.gemm_phase_vllm(
            x.astype(np.float64),
            problem.dense_all(),
            *routing[:2],
            int(routing[2][0]),
            untouched(rows, 24).astype(np.float64),
            tokens,
            block_size,
            top_k,
        )
        bound = np.zeros((rows, 24))
        for pair, expert in enumerate(ids.reshape(-1)):
            bound[pair] = product_bound(backend, x[pair // top_k, None], problem.dense(expert))[0]
        assert_close(result, expected, bound)

    def test_skipped_blocks_and_padding(self, backend, rng):
        """Blocks of expert -1, blocks of padding alone, ids far beyond the last."""
        problem = random_problem(rng, 2, 64, 16, 32)
        x, n = activations(rng, 4, 64), np.iinfo(np.int32).max
        routing = [np.array(a, np.int32) for a in ([0, 2, 1, 4, n, n, 3, 4, n, n], [1, -1, 0, 1, 0], [8])]
        result = vllm(problem.stack(backend), backend.new_context(), x, routing, 5, 4, 2, 1)
        for row, expert in ((0, 1), (2, 1), (3, 1)):
            w = problem.dense(expert)
            assert_close(
                result[row, None], x[row, None].astype(np.float64) @ w, product_bound(backend, x[row, None], w)
            )
        assert_same_bits(result[[1, 4]], untouched(2, 16))  # of a skipped block; beyond prob_m * top_k

    def test_expert_map(self, backend, rng):
        """Half of the experts are on another device: their slots are not written."""
        problem = random_problem(rng, 3, 64, 16, 32)
        x = activations(rng, 9, 64)
        ids = rng.integers(0, 6, (9, 2))
        expert_map = np.array([-1, 0, -1, 1, 2, -1], np.int32)
        routing = marlin_cy.moe_align_block_size(ids, 4, 6, expert_map)
        result = vllm(problem.stack(backend), backend.new_context(), x, routing, 18, 9, 4, 2)
        for pair, expert in enumerate(expert_map[ids.reshape(-1)]):
            if expert < 0:
                assert_same_bits(result[pair], untouched(1, 16)[0])
            else:
                w, row = problem.dense(expert), x[pair // 2, None]
                assert_close(result[pair, None], row.astype(np.float64) @ w, product_bound(backend, row, w))

    def test_same_as_batched(self, backend, rng):
        problem = random_problem(rng, 4, 96, 24, 32, g_idx="per_expert")
        stack, ctx, x = problem.stack(backend), backend.new_context(), activations(rng, 10, 96)
        ids = rng.integers(0, 4, (10, 1))
        result = vllm(stack, ctx, x, marlin_cy.moe_align_block_size(ids, 4, 4), 10, 10, 4, 1)
        expected = batched(stack, ctx, x, [(int(e), i, i, 1) for i, e in enumerate(ids[:, 0])], 10)
        rows = zip(x[:, None], ids[:, 0], strict=True)
        bound = np.concatenate([product_bound(backend, row, problem.dense(e)) for row, e in rows])
        assert_agree(backend, result, expected, bound)

    @pytest.mark.parametrize("form", [int, np.int32, lambda n: np.array([n], np.int32), lambda n: np.array(n)])
    def test_forms_of_num_tokens_past_padded(self, backend, rng, form):
        problem = random_problem(rng, 2, 64, 16, 32)
        stack, ctx, x = problem.stack(backend), backend.new_context(), activations(rng, 4, 64)
        sorted_ids, expert_ids, past = marlin_cy.moe_align_block_size(rng.integers(0, 2, (4, 1)), 2, 2)
        out = backend.from_host(np.zeros((4, 16), np.float32))
        arrays = map(backend.from_host, (x, sorted_ids, expert_ids))
        stack.gemm_phase_vllm(ctx, *arrays, form(int(past[0])), out, 4, 2, 1)
        assert_same_bits(backend.to_host(out), vllm(stack, ctx, x, (sorted_ids, expert_ids, past), 4, 4, 2, 1))

    @pytest.mark.parametrize("prob_m", [0, 3])
    def test_nothing_to_do(self, backend, rng, prob_m):
        stack = random_problem(rng, 2, 64, 16, 32).stack(backend)
        routing = [np.array(a, np.int32) for a in ([99, 99], [0], [2 if prob_m else 0])]
        result = vllm(stack, backend.new_context(), activations(rng, 3, 64), routing, 3, prob_m, 2, 1)
        assert_same_bits(result, untouched(3, 16))

    @pytest.mark.sampled(5)
    @pytest.mark.parametrize(("dtype_in", "dtype_out"), DTYPE_PAIRS)
    def test_dtypes(self, backend, rng, dtype_in, dtype_out):
        problem = random_problem(rng, 2, 64, 16, 32)
        x = activations(rng, 4, 64, DTYPES[dtype_in])
        routing = marlin_cy.moe_align_block_size(np.ones((4, 1), np.int32), 2, 2)
        result = vllm(problem.stack(backend), backend.new_context(), x, routing, 4, 4, 2, 1, DTYPES[dtype_out])
        w = problem.dense(1)
        assert_close(result, as_given(x) @ w, product_bound(backend, as_given(x), w, DTYPES[dtype_out]))


class TestLinear:
    @pytest.mark.sampled(8)
    @pytest.mark.parametrize(("k", "n", "group_size"), SHAPES)
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_load_gptq(self, backend, rng, k, n, group_size, with_bias):
        problem = random_problem(rng, 1, k, n, group_size)
        bias = rng.standard_normal(n).astype(np.float32) if with_bias else None
        linear = problem.linear(backend, bias)
        x, w = activations(rng, 6, k), problem.dense(0)
        expected = x.astype(np.float64) @ w + (0 if bias is None else bias)
        assert (linear.in_features, linear.out_features) == (k, n)
        assert (linear.metadata.bits, linear.metadata.group_size) == (4, problem.group)
        assert_close(forward(linear, backend.new_context(), x), expected, 2 * product_bound(backend, x, w) + 2.0**-21)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_bias_of_every_dtype(self, backend, rng, dtype):
        problem = random_problem(rng, 1, 64, 16, 32)
        bias = rng.standard_normal(16).astype(DTYPES[dtype])
        ctx, x = backend.new_context(), activations(rng, 2, 64)
        expected = forward(problem.linear(backend, bias.astype(np.float32)), ctx, x)
        assert_same_bits(forward(problem.linear(backend, bias), ctx, x), expected)

    def test_bias_is_copied(self, backend, rng):
        problem, bias = random_problem(rng, 1, 64, 16, 32), np.ones(16, np.float32)
        linear, ctx, x = problem.linear(backend, bias), backend.new_context(), activations(rng, 2, 64)
        expected = forward(linear, ctx, x)
        bias[:] = np.nan
        assert_same_bits(forward(linear, ctx, x), expected)

    @pytest.mark.sampled(5)
    @pytest.mark.parametrize(("dtype_in", "dtype_out"), DTYPE_PAIRS)
    def test_dtypes(self, backend, rng, dtype_in, dtype_out):
        problem = random_problem(rng, 1, 96, 40, 32)
        x, w = activations(rng, 5, 96, DTYPES[dtype_in]), problem.dense(0)
        result = forward(problem.linear(backend), backend.new_context(), x, dtype=DTYPES[dtype_out])
        assert_close(result, as_given(x) @ w, product_bound(backend, as_given(x), w, DTYPES[dtype_out]))

    @pytest.mark.parametrize("m", [0, 1, 4])
    def test_rows_from_m_on_are_untouched(self, backend, rng, m):
        linear = random_problem(rng, 1, 64, 16, 32).linear(backend)
        result = forward(linear, backend.new_context(), activations(rng, 6, 64), m)
        assert_same_bits(result[m:], untouched(6 - m, 16))
        assert (result[:m] != untouched(m, 16)).all()

    @pytest.mark.sampled(3)
    def test_views(self, backend, rng):
        """Whole experts, halves, single tiles at either end, several experts, all of them."""
        problem = random_problem(rng, 3, 96, 88, 32)
        stack, ctx, x = problem.stack(backend), backend.new_context(), activations(rng, 5, 96)
        tile = stack.n_tile
        every = [(e, 0, 5 * e, 5) for e in range(3)]
        whole = np.concatenate(np.split(batched(stack, ctx, x, every, 15), 3), axis=1)
        bias = rng.standard_normal(3 * 88).astype(np.float32)
        bound = np.concatenate([product_bound(backend, x, w) for w in problem.dense_all()], axis=1) + 2.0**-21
        for begin, width in (
            (0, 88),
            (88, 88),
            (88, 40),
            (128, 48),
            (tile, tile),
            (88 - tile, tile),
            (88 - tile, 2 * tile),
            (40, 176),
            (0, 264),
            (264 - tile, tile),
        ):
            view = stack.make_expert_linear(begin, width)
            assert (view.in_features, view.out_features) == (96, width)
            columns = slice(begin, begin + width)
            assert_agree(backend, forward(view, ctx, x), whole[:, columns], bound[:, columns])
            with_bias = stack.make_expert_linear(begin, width, bias[columns])
            expected = whole[:, columns] + bias[columns]
            assert_agree(backend, forward(with_bias, ctx, x), expected, bound[:, columns])

    def test_a_view_copies_nothing(self, backend, rng):
        stack = random_problem(rng, 2, 64, 32, 32).stack(backend)
        view = stack.make_expert_linear(32, 16)
        assert view.metadata.packed_bytes <= stack.metadata.packed_bytes / 2

    @pytest.mark.parametrize("g_idx", ["common", "per_expert"])
    def test_views_of_act_order(self, backend, rng, g_idx):
        problem = random_problem(rng, 3, 128, 32, 32, g_idx=g_idx)
        stack, ctx, x = problem.stack(backend), backend.new_context(), activations(rng, 4, 128)
        for expert in range(3):
            expected = batched(stack, ctx, x, [(expert, 0, 0, 4)], 4)[:, 16:]
            view = stack.make_expert_linear(32 * expert + 16, 16)
            bound = product_bound(backend, x, problem.dense(expert)[:, 16:])
            assert_agree(backend, forward(view, ctx, x), expected, bound)
        if g_idx == "per_expert":
            with pytest.raises(UnsupportedError, match="span experts 0 to 1.*ordered differently"):
                stack.make_expert_linear(16, 32)
        else:
            assert stack.make_expert_linear(16, 32).out_features == 32

    def test_flat_buffers(self, backend, rng):
        problem = random_problem(rng, 1, 64, 16, 32)
        linear, ctx, x = problem.linear(backend), backend.new_context(), activations(rng, 3, 64)
        out = backend.from_host(np.zeros(3 * 16, np.float32))
        linear.forward(ctx, backend.from_host(x.reshape(-1)), out, 3)
        assert_same_bits(backend.to_host(out).reshape(3, 16), forward(linear, ctx, x))


@pytest.mark.parametrize("kind", [kind for kind in WEIGHT_KINDS if kind != "uint4-float16"])
class TestKindsOfWeights:
    """Other codes, and scales of another type, than GPTQ's."""

    @pytest.mark.sampled(4)
    @pytest.mark.parametrize(("k", "n", "group_size"), SHAPES)
    def test_batched(self, backend, rng, kind, k, n, group_size):
        problem = random_problem(rng, 3, k, n, group_size, bias=True, **WEIGHT_KINDS[kind])
        x = activations(rng, 28, k)
        dispatches = [(2, 0, 5, 4), (0, 4, 1, 1), (1, 3, 12, 25)]
        result = batched(problem.stack(backend), backend.new_context(), x, dispatches, 40)
        for expert, in_row, out_row, m in dispatches:
            rows, w, bias = x[in_row : in_row + m], problem.dense(expert), problem.bias[expert]
            bound = with_bias(product_bound(backend, rows, w), bias)
            assert_close(result[out_row : out_row + m], rows.astype(np.float64) @ w + bias, bound)

    @pytest.mark.sampled(8)
    @pytest.mark.parametrize("g_idx", G_IDX_MODES)
    @pytest.mark.parametrize("group_size", [32, 128])
    @pytest.mark.parametrize("block_size", [2, 16])
    def test_vllm(self, backend, rng, kind, block_size, group_size, g_idx):
        problem = random_problem(rng, 4, 288, 40, group_size, g_idx=g_idx, bias=True, **WEIGHT_KINDS[kind])
        x, ids = activations(rng, 21, 288), rng.integers(0, 4, (21, 1))
        routing = marlin_cy.moe_align_block_size(ids, block_size, 4)
        result = vllm(problem.stack(backend), backend.new_context(), x, routing, 21, 21, block_size, 1)
        for row, expert in enumerate(ids[:, 0]):
            one, w, bias = x[row, None], problem.dense(expert), problem.bias[expert]
            bound = with_bias(product_bound(backend, one, w), bias)
            assert_close(result[row, None], one.astype(np.float64) @ w + bias, bound)

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_views(self, backend, rng, kind, dtype):
        problem = random_problem(rng, 3, 160, 40, 32, **WEIGHT_KINDS[kind])
        x, bias = activations(rng, 9, 160, DTYPES[dtype]), rng.standard_normal(48).astype(np.float32)
        view = problem.stack(backend).make_expert_linear(24, 48, bias)
        result = forward(view, backend.new_context(), x, dtype=DTYPES[dtype])
        w = np.concatenate(problem.dense_all(), axis=1)[:, 24:72]
        bound = with_bias(product_bound(backend, as_given(x), w, DTYPES[dtype]), bias, dtype)
        assert_close(result, as_given(x) @ w + bias, bound)

    def test_every_code(self, backend, rng, kind):
        """Each code at every place of a block of 32 by 16 codes: rows with one value and zeros."""
        problem = random_problem(rng, 1, 32, 256, 32, **WEIGHT_KINDS[kind])
        problem.q[0] = np.arange(256) // 16 ^ np.arange(32)[:, None] % 16
        x, w = np.eye(32, dtype=np.float32), problem.dense(0)
        result = batched(problem.stack(backend), backend.new_context(), x, [(0, 0, 0, 32)], 32)
        assert_close(result, w, product_bound(backend, x, w))

    @pytest.mark.parametrize("exponent", [-127, -60, 60, 110])
    def test_extreme_scales(self, backend, rng, kind, exponent):
        """Of a bfloat16's, for rows that bring products to where float32 holds them."""
        problem = random_problem(rng, 1, 160, 24, 32, **WEIGHT_KINDS[kind])
        if problem.scale.dtype == np.float16:
            exponent //= 10
        problem.scale[:] = problem.scale.astype(np.float64) * 2.0**exponent
        w = problem.dense(0)
        x, factor = activations(rng, 12, 160), 2.0 ** -(exponent * 3 // 4)
        result = batched(problem.stack(backend), backend.new_context(), x * np.float32(factor), [(0, 0, 0, 12)], 12)
        bound = product_bound(backend, x, w * 2.0**-exponent) * 2.0**exponent * factor
        assert_close(result, x.astype(np.float64) * factor @ w, bound)


class TestStackBias:
    """The bias of an expert is added once to each of its products; a view has its own bias."""

    def test_property(self, backend, rng):
        problem = random_problem(rng, 3, 64, 24, 32, bias=True)
        assert random_problem(rng, 3, 64, 24, 32).stack(backend).bias is None
        bias, given = problem.stack(backend).bias, problem.bias.copy()
        problem.bias[:] = np.nan
        assert_same_bits(bias, given)

    @pytest.mark.sampled(4)
    @pytest.mark.parametrize("k", [96, 2080])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_batched(self, backend, rng, k, dtype):
        problem = random_problem(rng, 3, k, 40, 32, bias=True)
        x = activations(rng, 12, k)
        dispatches = [(2, 0, 5, 4), (0, 4, 1, 1), (1, 3, 12, 7)]
        result = batched(problem.stack(backend), backend.new_context(), x, dispatches, 20, DTYPES[dtype])
        expected, bound = untouched(20, 40, DTYPES[dtype]).astype(np.float64), np.zeros((20, 40))
        for expert, in_row, out_row, m in dispatches:
            rows, to = x[in_row : in_row + m], slice(out_row, out_row + m)
            expected[to] = rows @ problem.dense(expert) + problem.bias[expert]
            product = product_bound(backend, rows, problem.dense(expert), DTYPES[dtype])
            bound[to] = with_bias(product, problem.bias[expert], dtype)
        assert_close(result, expected, bound)

    @pytest.mark.sampled(8)
    @pytest.mark.parametrize("block_size", [1, 16])
    @pytest.mark.parametrize("g_idx", ["none", "per_expert"])
    @pytest.mark.parametrize("k", [96, 2080])
    def test_vllm(self, backend, rng, k, g_idx, block_size):
        problem = random_problem(rng, 5, k, 24, 32, g_idx=g_idx, bias=True)
        x, ids = activations(rng, 13, k), np.stack([rng.choice(5, 2, replace=False) for _ in range(13)])
        routing = marlin_cy.moe_align_block_size(ids, block_size, 5)
        result = vllm(problem.stack(backend), backend.new_context(), x, routing, 27, 13, block_size, 2)
        for pair, expert in enumerate(ids.reshape(-1)):
            row, w = x[pair // 2, None], problem.dense(expert)
            bound = with_bias(product_bound(backend, row, w), problem.bias[expert])
            assert_close(result[pair, None], row.astype(np.float64) @ w + problem.bias[expert], bound)
        assert_same_bits(result[26:], untouched(1, 24))

    def test_views_have_their_own(self, backend, rng):
        problem = random_problem(rng, 3, 96, 40, 32, bias=True)
        stack, ctx, x = problem.stack(backend), backend.new_context(), activations(rng, 5, 96)
        w = np.concatenate(problem.dense_all(), axis=1)[:, 24:72]
        expected, bound = x.astype(np.float64) @ w, product_bound(backend, x, w)
        assert_close(forward(stack.make_expert_linear(24, 48), ctx, x), expected, bound)
        own = rng.standard_normal(48).astype(np.float32)
        result = forward(stack.make_expert_linear(24, 48, own), ctx, x)
        assert_close(result, expected + own, with_bias(bound, own))

    def test_of_another_shape(self, backend, rng):
        problem = random_problem(rng, 2, 64, 16, 32)
        builder = problem.builder(backend)
        for expert in range(2):
            builder.add(expert, 0, problem.canonical(expert))
        with pytest.raises(ValueError, match=r"bias: got shape \(16,\), expected \(2, 16\)"):
            builder.finish(np.zeros(16, np.float32))
        assert builder.finish(np.zeros((2, 16), np.float16)).bias.dtype == np.float32


class TestLoading:
    def test_stacked_arrays_are_sequences_too(self, backend, rng):
        problem = random_problem(rng, 2, 64, 16, 32, g_idx="unequal")
        ctx, x = backend.new_context(), activations(rng, 2, 64)
        arrays = map(np.stack, problem.tensors())
        stack = backend.load_gptq_stacked(*arrays, np.stack(problem.g_idx), **problem.sizes())
        dispatches = [(0, 0, 0, 2), (1, 0, 2, 2)]
        assert_same_bits(batched(stack, ctx, x, dispatches, 4), batched(problem.stack(backend), ctx, x, dispatches, 4))

    def test_ordinary_g_idx_is_none(self, backend, rng):
        problem = random_problem(rng, 2, 64, 16, 32)
        stack = backend.load_gptq_stacked(*problem.tensors(), np.arange(64, dtype=np.int32) // 32, **problem.sizes())
        assert not stack.metadata.act_order

    def test_builder_takes_an_ordinary_g_idx(self, backend, rng):
        problem = random_problem(rng, 1, 64, 16, 32)
        in_order = np.arange(64, dtype=np.int32) // 32
        builder = backend.new_stack_builder(1, 64, 16, group_size=32, g_idx=in_order)
        builder.add(0, 0, problem.canonical(0))
        assert not builder.finish().metadata.act_order

    def test_sizes_may_be_numpy_integers(self, backend, rng):
        problem = random_problem(rng, 2, 64, 16, 32)
        sizes = {name: np.uint8(size) for name, size in problem.sizes().items() if name != "checkpoint_format"}
        assert backend.load_gptq_stacked(*problem.tensors(), **sizes).k == 64
