"""Mixture-of-Experts layers: alignment, routing and whole layers, compared with ``marlin_cy.reference``."""

import numpy as np
import pytest
from asserts import GuardedArray, GuardedBuffer, assert_agree, assert_same_bits, relative_error
from layers import Layer, check
from problems import DTYPES, G_IDX_MODES, activations, as_given

import marlin_cy
from marlin_cy import reference
from marlin_cy.activations import ACTIVATIONS

SLICE_BYTES = 64 << 20  # of rows between the two products, as in cpu/_layer.pyx


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


class TestLayer:
    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("inner", [32, 96, 160])
    @pytest.mark.parametrize("hidden", [32, 96, 288])
    def test_shapes(self, backend, rng, hidden, inner):
        layer, ctx = Layer(rng, hidden=hidden, inner=inner), backend.new_context()
        x, logits, moe = activations(rng, 9, hidden), rng.standard_normal((9, 5)).astype(np.float32), layer.on(backend)
        result = backend.to_host(moe(ctx, backend.from_host(x), backend.from_host(logits)))
        check(backend, layer, x, *reference.route(logits, moe.routing), result)

    @pytest.mark.sampled(4)
    @pytest.mark.parametrize("top_k", [1, 2, 3, 4])
    @pytest.mark.parametrize("normalise", [True, False])
    def test_top_k(self, backend, rng, top_k, normalise):
        layer, ctx = Layer(rng, experts=4), backend.new_context()
        x, logits = activations(rng, 9, 96), rng.standard_normal((9, 4)).astype(np.float32)
        moe = layer.on(backend, top_k=top_k, norm_topk_prob=normalise)
        result = backend.to_host(moe(ctx, backend.from_host(x), backend.from_host(logits)))
        check(backend, layer, x, *reference.route(logits, moe.routing), result)

    @pytest.mark.sampled(4)
    @pytest.mark.parametrize("dtype_in", DTYPES)
    @pytest.mark.parametrize("dtype_out", [None, *DTYPES])
    def test_dtypes(self, backend, rng, dtype_in, dtype_out):
        layer, ctx = Layer(rng), backend.new_context()
        x = activations(rng, 6, 96, DTYPES[dtype_in])
        logits = rng.standard_normal((6, 5)).astype(DTYPES[dtype_in])
        out = None if dtype_out is None else GuardedBuffer(backend, (6, 96), DTYPES[dtype_out])
        given = None if out is None else out.buffer
        moe = layer.on(backend)
        result = moe(ctx, backend.from_host(x), backend.from_host(logits), out=given)
        if out is not None:
            assert result is given
            out.result()
        result = backend.to_host(result)
        assert result.dtype == DTYPES[dtype_out or dtype_in]
        check(backend, layer, x, *reference.route(as_given(logits), moe.routing), result)

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("g_idx", G_IDX_MODES)
    def test_g_idx(self, backend, rng, g_idx):
        layer, ctx = Layer(rng, g_idx=g_idx), backend.new_context()
        x, logits = activations(rng, 9, 96), rng.standard_normal((9, 5)).astype(np.float32)
        moe = layer.on(backend)
        result = backend.to_host(moe(ctx, backend.from_host(x), backend.from_host(logits)))
        check(backend, layer, x, *reference.route(logits, moe.routing), result)

    def test_output_of_another_width(self, backend, rng):
        layer, ctx = Layer(rng, hidden=64, inner=32, width=40), backend.new_context()
        x, logits = activations(rng, 3, 64), rng.standard_normal((3, 5)).astype(np.float32)
        moe = layer.on(backend)
        result = backend.to_host(moe(ctx, backend.from_host(x), backend.from_host(logits)))
        assert result.shape == (3, 40)
        check(backend, layer, x, *reference.route(logits, moe.routing), result)

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

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("g_idx", G_IDX_MODES)
    def test_few_experts_chosen_after_many(self, backend, rng, g_idx):
        """Values that an earlier, larger call left in the workspace are not read."""
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
        """The ids and weights are copied before they are checked."""
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


# The options of a layer.
MADE_OF = {
    "bias": {"bias": True},
    "shared": {"shared": 32},
    "shared, wider": {"shared": 160},
    "gated": {"shared": 96, "gate": True},
    "weighed input": {"weigh_input": True},
    "bias and weighed input": {"bias": True, "weigh_input": True},
    "all": {"bias": True, "shared": 96, "gate": True, "weigh_input": True},
}


class TestWholeModels:
    """The features of model families: activations, biases, shared experts, weights on the input, kinds of routing."""

    def run(self, backend, layer, x, logits, **options):
        moe = layer.on(backend, **options)
        result = backend.to_host(moe(backend.new_context(), backend.from_host(x), backend.from_host(logits)))
        assert result.dtype == x.dtype
        check(backend, layer, x, *reference.route(as_given(logits), moe.routing), result)

    def inputs(self, rng, dtype=np.float32, tokens=9, hidden=96):
        return activations(rng, tokens, hidden, dtype), rng.standard_normal((tokens, 5)).astype(dtype)

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, backend, rng, activation, dtype):
        layer = Layer(rng, activation=activation, bias=True, shared=32)
        self.run(backend, layer, *self.inputs(rng, DTYPES[dtype]))

    def test_gelus_are_told_apart(self, backend, rng):
        """Both differ by less than the error bounds, but measurably on average."""
        x, logits = rng.standard_normal((100, 96)).astype(np.float32), rng.standard_normal((100, 5)).astype(np.float32)
        layer, errors = Layer(rng, activation="gelu"), {}
        for computed in ("gelu", "gelu_tanh"):
            layer.activation = computed
            moe = layer.on(backend)
            result = backend.to_host(moe(backend.new_context(), backend.from_host(x), backend.from_host(logits)))
            for meant in ("gelu", "gelu_tanh"):
                layer.activation = meant
                expected = layer.expected(x, *reference.route(logits, moe.routing))
                errors[computed, meant] = relative_error(result, expected)
        print(errors)
        assert errors["gelu", "gelu"] < errors["gelu", "gelu_tanh"]
        assert errors["gelu_tanh", "gelu_tanh"] < errors["gelu_tanh", "gelu"]

    @pytest.mark.sampled(5)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("parts", MADE_OF)
    def test_parts(self, backend, rng, parts, dtype):
        self.run(backend, Layer(rng, **MADE_OF[parts]), *self.inputs(rng, DTYPES[dtype]))

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("g_idx", G_IDX_MODES)
    def test_parts_with_g_idx(self, backend, rng, g_idx):
        layer = Layer(rng, g_idx=g_idx, **MADE_OF["all"])
        self.run(backend, layer, *self.inputs(rng))

    def test_parts_of_another_width(self, backend, rng):
        layer = Layer(rng, hidden=64, inner=32, width=40, **MADE_OF["all"])
        self.run(backend, layer, *self.inputs(rng, hidden=64))

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize(
        "routing",
        [
            {"scoring": "softmax_topk"},
            {"scoring": "sigmoid", "correction_bias": [1, -1, 0, 0.5, -2], "routed_scaling_factor": 2.5},
            {"norm_topk_prob": False, "num_groups": 5, "topk_groups": 3, "routed_scaling_factor": -16},
        ],
        ids=lambda routing: routing.get("scoring", "groups"),
    )
    def test_routing(self, backend, rng, routing):
        self.run(backend, Layer(rng, shared=32), *self.inputs(rng), top_k=3, **routing)

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("tokens", [1, 2, 49, 130])
    def test_tokens(self, backend, rng, tokens):
        """One token, and more tokens than a block of rows has."""
        self.run(backend, Layer(rng, **MADE_OF["all"]), *self.inputs(rng, tokens=tokens))

    def test_large_gates_and_ups(self, backend, rng):
        """Values beyond the limits to which gpt-oss clamps them."""
        x, logits = self.inputs(rng)
        self.run(backend, Layer(rng, activation="swigluoai", bias=True), 16 * x, logits)

    @pytest.mark.parametrize("choices", [1, 4])
    def test_routed(self, backend, rng, choices):
        """Any experts and weights. A token without experts gets only the shared expert's output."""
        layer, ctx = Layer(rng, bias=True, shared=96, gate=True), backend.new_context()
        x = activations(rng, 12, 96)
        ids = rng.integers(-1, 5, (12, choices))
        ids[4] = -1
        weights = rng.standard_normal(ids.shape).astype(np.float32)
        result = layer.on(backend).forward_routed(ctx, backend.from_host(x), ids, weights)
        check(backend, layer, x, ids, weights, backend.to_host(result))

    def test_routed_with_weights_on_the_input(self, backend, rng):
        """Weights of any sign, and 0. They affect the activation but not the biases."""
        layer, ctx = Layer(rng, activation="gelu_tanh", bias=True, weigh_input=True), backend.new_context()
        x, ids = activations(rng, 12, 96), rng.integers(-1, 5, (12, 1))
        weights = (2 * rng.standard_normal(ids.shape)).astype(np.float32)
        weights[3] = 0
        result = layer.on(backend).forward_routed(ctx, backend.from_host(x), ids, weights)
        check(backend, layer, x, ids, weights, backend.to_host(result))

    def test_weighing_the_input_by_a_power_of_two(self, backend, rng):
        """Such a weight rounds nothing, so its order with quantisation does not matter."""
        layer, ctx = Layer(rng, weigh_input=True, shared=32), backend.new_context()
        moe, x, ids = layer.on(backend), activations(rng, 8, 96), rng.integers(0, 5, (8, 1))
        weights = (2.0 ** rng.integers(-3, 4, (8, 1))).astype(np.float32)
        plain = Layer(rng)
        plain.gate_up, plain.down = layer.gate_up, layer.down
        result = moe.forward_routed(ctx, backend.from_host(x), ids, weights)
        check(backend, layer, x, ids, weights, backend.to_host(result))
        ones = np.ones_like(weights)
        layer.shared = None
        result = layer.on(backend).forward_routed(ctx, backend.from_host(x), ids, weights)
        expected = plain.on(backend).forward_routed(ctx, backend.from_host(x * weights), ids, ones)
        bound = plain.bound(backend, x * weights, ids, ones)
        assert_agree(backend, backend.to_host(result), backend.to_host(expected), bound)

    def test_a_shared_expert_is_one_chosen_by_all(self, backend, rng):
        """The shared expert equals a routed expert that every token selects first, with a weight of 1."""
        layer, ctx = Layer(rng, bias=True, g_idx="common"), backend.new_context()
        x, ids = activations(rng, 12, 96), rng.integers(-1, 4, (12, 2))
        weights = rng.standard_normal(ids.shape).astype(np.float32)
        by_hand = np.insert(ids, 0, 4, axis=1), np.insert(weights, 0, 1, axis=1)
        expected = layer.on(backend).forward_routed(ctx, backend.from_host(x), *by_hand)
        bound = layer.bound(backend, x, *by_hand)
        layer.shared = layer.gate_up.part(slice(4, 5)), layer.down.part(slice(4, 5))
        layer.gate_up, layer.down = layer.gate_up.part(slice(0, 4)), layer.down.part(slice(0, 4))
        result = layer.on(backend).forward_routed(ctx, backend.from_host(x), ids, weights)
        assert_agree(backend, backend.to_host(result), backend.to_host(expected), bound)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_gate_that_is_open_or_shut(self, backend, rng, sign):
        layer, ctx = Layer(rng, shared=32, gate=True), backend.new_context()
        x, ids = np.abs(activations(rng, 6, 96)) + 1, np.full((6, 1), -1)
        layer.gate_weight[:] = 100 * sign
        result = layer.on(backend).forward_routed(ctx, backend.from_host(x), ids, np.ones(ids.shape))
        check(backend, layer, x, ids, np.ones(ids.shape), backend.to_host(result))
        if sign < 0:
            assert (backend.to_host(result) == 0).all()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_bad_tokens_stay_alone(self, backend, rng, bad):
        layer, ctx = Layer(rng, **MADE_OF["all"]), backend.new_context()
        moe, (x, logits) = layer.on(backend), self.inputs(rng)
        clean = backend.to_host(moe(ctx, backend.from_host(x), backend.from_host(logits)))
        x[2, 50] = bad
        logits[6] = bad
        result = backend.to_host(moe(ctx, backend.from_host(x), backend.from_host(logits)))
        assert np.isnan(result[[2, 6]]).all()
        assert_same_bits(np.delete(result, [2, 6], axis=0), np.delete(clean, [2, 6], axis=0))

    @pytest.mark.sampled(1)
    def test_few_tokens_after_many(self, backend, rng):
        """Values that another layer's larger call left in the workspace are not read."""
        ctx = backend.new_context()
        large, small = Layer(rng, inner=160, shared=32), Layer(rng, hidden=64, **MADE_OF["all"])
        for tokens, layer, hidden in ((300, large, 96), (3, small, 64), (20, large, 96), (1, small, 64)):
            x, logits = self.inputs(rng, tokens=tokens, hidden=hidden)
            moe = layer.on(backend)
            result = backend.to_host(moe(ctx, backend.from_host(x), backend.from_host(logits)))
            check(backend, layer, x, *reference.route(logits, moe.routing), result)

    def test_no_tokens(self, backend, rng):
        moe, ctx = Layer(rng, **MADE_OF["all"]).on(backend), backend.new_context()
        x, logits = (backend.from_host(np.empty((0, n), np.float32)) for n in (96, 5))
        assert moe(ctx, x, logits).shape == (0, 96)
        assert moe.forward_routed(ctx, x, np.empty((0, 1), np.int32), np.empty((0, 1), np.float32)).shape == (0, 96)

    @pytest.mark.parametrize("weigh_input", [False, True])
    def test_more_tokens_than_one_slice(self, cpu_backend, rng, weigh_input):
        """A slice also holds the shared expert's rows."""
        size, choices = 32, 1 if weigh_input else 64
        layer = Layer(rng, hidden=size, inner=size, bias=True, shared=4096, gate=True, weigh_input=weigh_input)
        slice_tokens = SLICE_BYTES // (4 * (max(choices * size, 4096) + (choices + 1) * size))
        tokens, ctx = slice_tokens + 50, cpu_backend.new_context()
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

    @pytest.mark.parametrize("parts", ["gated", "all"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_bits_do_not_depend_on_threads_batch_or_isa(self, cpu_backend, rng, isa, dtype, parts):
        """With K long enough to be split among threads."""
        layer = Layer(rng, hidden=1056, inner=64, g_idx="per_expert", activation="gelu", **MADE_OF[parts])
        moe, (x, logits) = layer.on(cpu_backend), self.inputs(rng, DTYPES[dtype], tokens=20, hidden=1056)
        expected = moe(cpu_backend.new_context(num_threads=1, isa="generic"), x, logits)
        for threads in (1, 2, 5):
            ctx = cpu_backend.new_context(num_threads=threads, isa=isa)
            for part in (slice(None), slice(3, 4), slice(7, 15)):
                assert_same_bits(moe(ctx, x[part], logits[part]), expected[part])


def test_properties_of_a_shared_expert(backend, rng):
    layer = Layer(rng, shared=32, gate=True)
    moe = layer.on(backend)
    shared = moe.shared_expert
    assert repr(shared) == "SharedExpert(96 -> 32 -> 96)"
    np.testing.assert_array_equal(shared.gate_weight, layer.gate_weight)
    layer.gate_weight[:] = 0
    assert shared.gate_weight.any()
    assert Layer(rng, shared=32).on(backend).shared_expert.gate_weight is None
    assert (moe.activation, moe.apply_router_weight_on_input) == ("silu", False)
