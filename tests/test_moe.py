"""Mixture-of-Experts layers: alignment, routing, and the whole, held against ``marlin_cy.reference``."""

import numpy as np
import pytest
from asserts import (
    GuardedArray,
    GuardedBuffer,
    assert_close,
    assert_same_bits,
    product_bound,
    unit_roundoff,
)
from problems import DTYPES, G_IDX_MODES, activations, as_given, random_problem

import marlin_cy
from marlin_cy import reference

FLOAT32 = unit_roundoff(np.float32)
SLICE_BYTES = 64 << 20  # of rows between the two products, as in _moe.pyx


class Layer:
    """A random layer, with what it means."""

    def __init__(self, rng, *, experts=5, hidden=96, inner=64, width=None, group_size=32, g_idx="none"):
        self.gate_up = random_problem(rng, experts, hidden, 2 * inner, group_size, g_idx=g_idx)
        self.down = random_problem(rng, experts, inner, width or hidden, group_size, g_idx=g_idx)

    def on(self, backend, top_k=2, **options):
        return marlin_cy.MoeLayer(self.gate_up.stack(backend), self.down.stack(backend), top_k=top_k, **options)

    def expected(self, x, ids, weights):
        return reference.moe_layer(as_given(x), self.gate_up.dense_all(), self.down.dense_all(), ids, weights)

    def bound(self, backend, x, ids, weights, dtype=np.float32):
        """The bounds of both products, carried through ``silu(gate) * up`` (whose slope is below 1.1) and the sum.

        On a device, what lies between is float16 where ``x`` is.
        """
        between = np.float16 if backend.name != "cpu" and x.dtype == np.float16 else np.float32
        bound = np.zeros((len(x), self.down.n))
        for token, row in enumerate(as_given(x).astype(np.float64)):
            for expert, weight in zip(ids[token], weights[token], strict=True):
                if expert < 0:
                    continue
                w1, w2 = self.gate_up.dense(expert), self.down.dense(expert)
                off_gate, off_up = np.split(product_bound(backend, row[None], w1, between)[0], 2)
                gate, up = np.split(row @ w1, 2)
                inner = np.abs(reference.silu(gate) * up)
                off = 1.1 * off_gate * (np.abs(up) + off_up) + np.abs(reference.silu(gate)) * off_up
                off = off + 8 * FLOAT32 * (inner + off)
                product = (inner + off) @ np.abs(w2)
                error = off @ np.abs(w2) + product_bound(backend, (inner + off)[None], w2, between)[0]
                bound[token] += np.abs(weight) * (error + 16 * FLOAT32 * product)
                bound[token] += unit_roundoff(dtype) * np.abs(weight) * (product + error)
        return bound + 2.0**-24


def check(backend, layer, x, ids, weights, result):
    bound = layer.bound(backend, x, ids, weights, result.dtype)
    assert_close(result, layer.expected(x, ids, weights), bound)


class TestAlign:
    @pytest.mark.parametrize("block_size", [1, 2, 3, 16, 64])
    @pytest.mark.parametrize(
        ("tokens", "top_k", "experts"), [(0, 2, 3), (1, 1, 1), (7, 2, 4), (50, 4, 4), (20, 3, 128)]
    )
    @pytest.mark.parametrize("with_map", [False, True])
    def test_matches_the_reference(self, rng, block_size, tokens, top_k, experts, with_map):
        ids = rng.integers(-1, experts, (tokens, top_k)).astype(rng.choice([np.int32, np.int64]))
        expert_map = rng.permutation(np.arange(-2, experts - 2).clip(-1)).astype(np.int32) if with_map else None
        actual = marlin_cy.moe_align_block_size(ids, block_size, experts, expert_map)
        for mine, expected in zip(
            actual, reference.moe_align_block_size(ids, block_size, experts, expert_map), strict=True
        ):
            assert mine.dtype == np.int32
            np.testing.assert_array_equal(mine, expected)

    def test_by_hand(self):
        """vLLM's example: 4 tokens, 3 choices, 4 experts (here from 0), blocks of 4."""
        ids = np.array([[1, 2, 3], [0, 1, 3], [0, 2, 3], [0, 1, 2]])
        sorted_ids, experts, past = marlin_cy.moe_align_block_size(ids, 4, 4)
        assert past.tolist() == [16]
        assert sorted_ids[:16].tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
        assert experts[:4].tolist() == [0, 1, 2, 3]

    def test_one_expert_takes_all(self):
        sorted_ids, experts, past = marlin_cy.moe_align_block_size(np.full((5, 2), 6), 4, 8)
        assert past.tolist() == [12]
        assert sorted_ids[:12].tolist() == [*range(10), 10, 10]
        assert experts[:3].tolist() == [6, 6, 6]
        assert (experts[3:] == -1).all()

    def test_lists_and_other_strides(self, rng):
        ids = rng.integers(0, 4, (6, 4))
        expected = marlin_cy.moe_align_block_size(ids[:, ::2].copy(), 2, 4)
        for form in (ids[:, ::2], ids[:, ::2].tolist(), np.asfortranarray(ids[:, ::2]), ids[:, ::2].astype(">i4")):
            for actual, right in zip(marlin_cy.moe_align_block_size(form, 2, 4), expected, strict=True):
                np.testing.assert_array_equal(actual, right)


class TestRouting:
    @pytest.fixture
    def ctx(self, backend):
        return backend.new_context()

    def route(self, rng, backend, ctx, logits, top_k, normalise=True):
        layer = Layer(rng, experts=logits.shape[1], hidden=32, inner=32).on(
            backend, top_k=top_k, norm_topk_prob=normalise
        )
        return tuple(map(backend.to_host, layer.route(ctx, backend.from_host(logits))))

    @pytest.mark.parametrize("normalise", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("experts", [1, 7, 16, 60])
    def test_matches_the_reference(self, backend, rng, ctx, experts, dtype, normalise):
        logits = (rng.permuted(np.tile(np.arange(experts), (20, 1)), axis=1) / 8 - 2).astype(DTYPES[dtype])
        for top_k in {1, (experts + 1) // 2, experts}:
            ids, weights = self.route(rng, backend, ctx, logits, top_k, normalise)
            expected_ids, expected_weights = reference.route(as_given(logits), top_k, normalise)
            assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
            np.testing.assert_array_equal(ids, expected_ids)
            assert_close(weights, expected_weights, (experts + 8) * FLOAT32 * expected_weights)

    def test_random_logits(self, backend, rng, ctx):
        logits = (4 * rng.standard_normal((100, 128))).astype(np.float32)
        ids, weights = self.route(rng, backend, ctx, logits, 8)
        expected_ids, expected_weights = reference.route(logits, 8)
        np.testing.assert_array_equal(ids, expected_ids)
        assert_close(weights, expected_weights, 64 * FLOAT32 * expected_weights)

    def test_of_equal_ones_the_smaller_index(self, backend, rng, ctx):
        logits = rng.integers(0, 3, (50, 24)).astype(np.float32)
        logits[0] = 0
        ids, weights = self.route(rng, backend, ctx, logits, 6)
        np.testing.assert_array_equal(ids, reference.route(logits, 6)[0])
        assert ids[0].tolist() == [0, 1, 2, 3, 4, 5]
        assert (weights[0] == weights[0, 0]).all()

    def test_extreme_logits(self, backend, rng, ctx):
        logits = np.array([[3e38, -3e38, 0, 1], [-np.inf, 0, -np.inf, -1], [-1e30, -1e30, -1e30, -1e30]], np.float32)
        ids, weights = self.route(rng, backend, ctx, logits, 2)
        np.testing.assert_array_equal(ids, [[0, 1], [1, 3], [0, 1]])
        assert_close(weights, reference.route(logits, 2)[1], 1e-6)

    @pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.nan, np.inf]])
    def test_nan_weights_of_bad_logits(self, backend, rng, ctx, bad):
        logits = rng.standard_normal((3, 5)).astype(np.float32)
        logits[1, : len(bad)] = bad
        ids, weights = self.route(rng, backend, ctx, logits, 2)
        assert np.isnan(weights[1]).all()
        assert ((ids >= 0) & (ids < 5)).all()
        assert not np.isnan(weights[[0, 2]]).any()

    def test_no_tokens(self, backend, rng, ctx):
        ids, weights = self.route(rng, backend, ctx, np.empty((0, 5), np.float32), 2)
        assert ids.shape == weights.shape == (0, 2)


class TestLayer:
    @pytest.mark.parametrize("inner", [32, 96, 160])
    @pytest.mark.parametrize("hidden", [32, 96, 288])
    def test_shapes(self, backend, rng, hidden, inner):
        layer, ctx = Layer(rng, hidden=hidden, inner=inner), backend.new_context()
        x, logits = activations(rng, 9, hidden), rng.standard_normal((9, 5)).astype(np.float32)
        result = backend.to_host(layer.on(backend)(ctx, backend.from_host(x), backend.from_host(logits)))
        check(backend, layer, x, *reference.route(logits, 2), result)

    @pytest.mark.parametrize("top_k", [1, 2, 3, 4])
    @pytest.mark.parametrize("normalise", [True, False])
    def test_top_k(self, backend, rng, top_k, normalise):
        layer, ctx = Layer(rng, experts=4), backend.new_context()
        x, logits = activations(rng, 9, 96), rng.standard_normal((9, 4)).astype(np.float32)
        result = layer.on(backend, top_k=top_k, norm_topk_prob=normalise)(
            ctx, backend.from_host(x), backend.from_host(logits)
        )
        check(backend, layer, x, *reference.route(logits, top_k, normalise), backend.to_host(result))

    @pytest.mark.parametrize("dtype_in", DTYPES)
    @pytest.mark.parametrize("dtype_out", [None, *DTYPES])
    def test_dtypes(self, backend, rng, dtype_in, dtype_out):
        layer, ctx = Layer(rng), backend.new_context()
        x = activations(rng, 6, 96, DTYPES[dtype_in])
        logits = rng.standard_normal((6, 5)).astype(DTYPES[dtype_in])
        out = None if dtype_out is None else GuardedBuffer(backend, (6, 96), DTYPES[dtype_out])
        given = None if out is None else out.buffer
        result = layer.on(backend)(ctx, backend.from_host(x), backend.from_host(logits), out=given)
        if out is not None:
            assert result is given
            out.result()
        result = backend.to_host(result)
        assert result.dtype == DTYPES[dtype_out or dtype_in]
        check(backend, layer, x, *reference.route(as_given(logits), 2), result)

    @pytest.mark.parametrize("g_idx", G_IDX_MODES)
    def test_g_idx(self, backend, rng, g_idx):
        layer, ctx = Layer(rng, g_idx=g_idx), backend.new_context()
        x, logits = activations(rng, 9, 96), rng.standard_normal((9, 5)).astype(np.float32)
        result = layer.on(backend)(ctx, backend.from_host(x), backend.from_host(logits))
        check(backend, layer, x, *reference.route(logits, 2), backend.to_host(result))

    def test_output_of_another_width(self, backend, rng):
        layer, ctx = Layer(rng, hidden=64, inner=32, width=40), backend.new_context()
        x, logits = activations(rng, 3, 64), rng.standard_normal((3, 5)).astype(np.float32)
        result = backend.to_host(layer.on(backend)(ctx, backend.from_host(x), backend.from_host(logits)))
        assert result.shape == (3, 40)
        check(backend, layer, x, *reference.route(logits, 2), result)

    @pytest.mark.parametrize("choices", [1, 3, 9])
    @pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
    def test_routed(self, backend, rng, choices, ids_dtype):
        """Any experts, more often than once, with weights of any sign, some missing."""
        layer, ctx = Layer(rng), backend.new_context()
        x = activations(rng, 12, 96)
        ids = rng.integers(-1, 5, (12, choices)).astype(ids_dtype)
        ids[4] = -1
        weights = rng.standard_normal((12, choices)).astype(np.float32)
        result = backend.to_host(layer.on(backend).forward_routed(ctx, backend.from_host(x), ids, weights))
        check(backend, layer, x, ids, weights, result)
        assert (result[4] == 0).all()

    @pytest.mark.parametrize("g_idx", G_IDX_MODES)
    def test_few_experts_chosen_after_many(self, backend, rng, g_idx):
        """What an earlier, larger call left in the workspace is not read."""
        layer, ctx = Layer(rng, g_idx=g_idx), backend.new_context()
        moe = layer.on(backend)
        x = activations(rng, 600, 96)
        moe.forward_routed(ctx, backend.from_host(x), rng.integers(0, 5, (600, 2)), np.ones((600, 2), np.float32))
        ids = np.full((60, 1), -1)
        ids[::20] = 3
        result = backend.to_host(moe.forward_routed(ctx, backend.from_host(x[:60]), ids, np.ones(ids.shape)))
        check(backend, layer, x[:60], ids, np.ones(ids.shape), result)

    @pytest.mark.parametrize("g_idx", G_IDX_MODES)
    def test_no_experts_chosen(self, backend, rng, g_idx):
        moe, x = Layer(rng, g_idx=g_idx).on(backend), activations(rng, 4, 96)
        ids, weights = np.full((4, 2), -1), np.ones((4, 2), np.float32)
        result = moe.forward_routed(backend.new_context(), backend.from_host(x), ids, weights)
        assert (backend.to_host(result) == 0).all()

    def test_routing_by_hand_is_routing(self, backend, rng):
        layer, ctx = Layer(rng), backend.new_context()
        moe, x = layer.on(backend, top_k=3), backend.from_host(activations(rng, 9, 96))
        logits = backend.from_host(rng.standard_normal((9, 5)).astype(np.float32))
        by_hand = moe.forward_routed(ctx, x, *moe.route(ctx, logits))
        assert_same_bits(backend.to_host(by_hand), backend.to_host(moe(ctx, x, logits)))

    def test_ids_and_weights_of_other_strides_and_dtypes(self, backend, rng):
        layer, ctx = Layer(rng), backend.new_context()
        moe, x = layer.on(backend), backend.from_host(activations(rng, 8, 96))
        ids, weights = rng.integers(0, 5, (8, 4)), rng.integers(1, 8, (8, 4)) / 8
        expected = backend.to_host(moe.forward_routed(ctx, x, ids[:, ::2].copy(), weights[:, ::2].astype(np.float32)))
        for form in (weights[:, ::2], weights[:, ::2].astype(np.float16), weights[:, ::2].tolist()):
            result = moe.forward_routed(ctx, x, ids[:, ::2].astype(">i8"), form)
            assert_same_bits(backend.to_host(result), expected)

    def test_more_tokens_than_one_slice(self, cpu_backend, rng):
        choices, size = 64, 32
        slice_tokens = SLICE_BYTES // (4 * choices * 2 * size)
        tokens = slice_tokens + 50
        layer, ctx = Layer(rng, hidden=size, inner=size), cpu_backend.new_context()
        moe, x = layer.on(cpu_backend), activations(rng, tokens, size)
        ids = rng.integers(-1, 5, (tokens, choices)).astype(np.int32)
        weights = rng.standard_normal(ids.shape).astype(np.float32)
        out = GuardedArray((tokens, size), np.float32)
        moe.forward_routed(ctx, x, ids, weights, out=out.array)
        out.assert_guards()
        for part in (slice(0, 20), slice(slice_tokens - 20, slice_tokens + 20), slice(tokens - 20, tokens)):
            expected = moe.forward_routed(ctx, x[part], ids[part], weights[part])
            assert_same_bits(out.array[part], expected)
        part = slice(slice_tokens - 1, slice_tokens + 1)
        check(cpu_backend, layer, x[part], ids[part], weights[part], out.array[part])

    def test_out_may_lie_over_ids_and_weights(self, cpu_backend, rng):
        """They are copied when they are checked."""
        layer, ctx = Layer(rng, hidden=64, inner=32), cpu_backend.new_context()
        moe, x = layer.on(cpu_backend), activations(rng, 6, 64)
        ids, weights = rng.integers(0, 5, (6, 64)).astype(np.int32), rng.standard_normal((6, 64)).astype(np.float32)
        expected = moe.forward_routed(ctx, x, ids.copy(), weights.copy())
        for given in ((ids.copy(), weights), (ids, weights.copy())):
            out = given[1] if given[1] is weights else ids.view(np.float32)
            assert_same_bits(moe.forward_routed(ctx, x, *given, out=out), expected)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_bad_tokens_stay_alone(self, backend, rng, bad):
        layer, ctx = Layer(rng), backend.new_context()
        moe = layer.on(backend)
        x, logits = activations(rng, 9, 96), rng.standard_normal((9, 5)).astype(np.float32)
        clean = backend.to_host(moe(ctx, backend.from_host(x), backend.from_host(logits)))
        x[2, 50] = bad
        if bad > -np.inf or np.isnan(bad):
            logits[6, 1] = bad
        result = backend.to_host(moe(ctx, backend.from_host(x), backend.from_host(logits)))
        wrong = [2] if bad == -np.inf else [2, 6]
        assert np.isnan(result[wrong]).all()
        assert_same_bits(np.delete(result, wrong, axis=0), np.delete(clean, wrong, axis=0))

    def test_no_tokens(self, backend, rng):
        moe, ctx = Layer(rng).on(backend), backend.new_context()
        x, logits = (backend.from_host(np.empty((0, n), np.float32)) for n in (96, 5))
        assert moe(ctx, x, logits).shape == (0, 96)
        assert moe.forward_routed(ctx, x, np.empty((0, 2), np.int32), np.empty((0, 2), np.float32)).shape == (0, 96)

    def test_properties(self, backend, rng):
        moe = Layer(rng).on(backend, top_k=3)
        assert (moe.num_experts, moe.hidden_size, moe.intermediate_size, moe.top_k) == (5, 96, 64, 3)
