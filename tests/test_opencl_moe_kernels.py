"""The kernels of ``routing.cl``, ``align.cl`` and ``moe.cl`` one by one, and the buffers that a layer keeps."""

import dataclasses
import gc

import numpy as np
import pytest
from asserts import GuardedBuffer, assert_close, assert_same_bits, unit_roundoff
from layers import Layer, check
from problems import DTYPES, activations, as_given
from test_routing import check as check_routed
from test_routing import decided

from marlin_cy import Routing, UnsupportedError, reference
from marlin_cy.moe.routing import SCORINGS

cl = pytest.importorskip("pyopencl")

from opencl_devices import each_device, runtime_of, unless_the_driver_is_wrong  # noqa: E402

from marlin_cy.opencl.backend import OpenClBackend  # noqa: E402
from marlin_cy.opencl.checks.routing import check_route  # noqa: E402
from marlin_cy.opencl.layer import forward as moe  # noqa: E402
from marlin_cy.opencl.layer import routing  # noqa: E402

FLOAT32 = unit_roundoff(np.float32)
TYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}
GUARD = 3  # elements before and behind each output
ROUTE_ITEMS, ALIGN_ITEMS, FACTOR_ITEMS = 128, 256, 256
# Experts, groups, groups to pick from, experts a token, what a group is worth: more groups than work-items and fewer,
# more experts a token than work-items, groups that do not divide the work-items evenly.
ROUTINGS = [
    (1, 1, 1, 1, "max"),
    (7, 1, 1, 3, "max"),
    (7, 7, 3, 2, "max"),
    (128, 1, 1, 8, "max"),
    (257, 1, 1, 100, "max"),
    (256, 8, 4, 8, "top2_sum"),
    (99, 3, 2, 66, "max"),
    (99, 3, 1, 2, "top2_sum"),
    (66, 33, 5, 10, "top2_sum"),
    (120, 40, 30, 40, "max"),
    (64, 32, 31, 33, "top2_sum"),
]


class Output:
    """A device array with guard elements: ``before`` of them before it, and others after it."""

    def __init__(self, runtime, shape, dtype, before=GUARD):
        self.shape, self.dtype, self._runtime, self._before = shape, np.dtype(dtype), runtime, before
        size = int(np.prod(shape))
        self._filled = np.full((before + size + GUARD) * self.dtype.itemsize, 0xA5, np.uint8)
        self.buffer = runtime.buffer(self._filled)

    def refill(self):
        """Restore the contents from before the first write."""
        cl.enqueue_copy(self._runtime.queue, self.buffer, self._filled)

    def read(self):
        """The contents, after a check of the guards."""
        result = np.empty_like(self._filled)
        cl.enqueue_copy(self._runtime.queue, result, self.buffer)
        begin, end = self._before * self.dtype.itemsize, len(result) - GUARD * self.dtype.itemsize
        for part in (slice(0, begin), slice(end, None)):
            np.testing.assert_array_equal(result[part], self._filled[part])
        return result[begin:end].view(self.dtype).reshape(self.shape)


def input_buffer(runtime, array, before=0):
    """A buffer in which the array begins after so many elements of NaN (or of -1)."""
    array = np.ascontiguousarray(array)
    return runtime.buffer(
        np.concatenate([np.full(before * array.itemsize, 0xFF, np.uint8), array.reshape(-1).view(np.uint8)])
    )


def route_call(runtime, logits, how, dtype):
    """``(macros, arguments, ids, weights)`` of the kernel; the last two are its outputs."""
    tokens, experts = logits.shape
    bias, grouped = how.correction_bias, how.topk_groups < how.num_groups
    macros = {
        "LOGITS_TYPE": TYPE_CODES[dtype],
        "ROUTE_ITEMS": ROUTE_ITEMS,
        "SCORING": routing.SCORING[how.scoring],
        "CORRECTED": bias is not None,
        "SCALED": how.expert_scale is not None,
        "GROUPING": routing.GROUPING[how.group_score] if grouped else 0,
    }
    shape = tokens, how.top_k
    ids, weights = Output(runtime, shape, np.int32), Output(runtime, shape, np.float32)
    arguments = (
        input_buffer(runtime, logits.astype(DTYPES[dtype]), before=5),
        np.uint64(5),
        np.uint32(experts),
        np.uint32(how.top_k),
        np.int32(routing.normalises(how)),
        np.float32(how.routed_scaling_factor),
        None if how.expert_scale is None else input_buffer(runtime, how.expert_scale),
        np.float32(how.mixer_jitter),
        None if bias is None else input_buffer(runtime, bias),
        np.uint32(how.num_groups),
        np.uint32(how.topk_groups),
        ids.buffer,
        np.uint64(GUARD),
        weights.buffer,
        np.uint64(GUARD),
        *(cl.LocalMemory(4 * words) for words in routing.kept_words(experts, how.num_groups, how.top_k)),
    )
    return macros, arguments, ids, weights


def route(runtime, logits, how, dtype="float32"):
    """``(ids, weights)`` by the device, by a :class:`Routing`."""
    macros, arguments, ids, weights = route_call(runtime, logits, how, dtype)
    kernel = runtime.programs.kernel("routing", "route", macros)
    kernel(runtime.queue, (len(logits) * ROUTE_ITEMS,), (ROUTE_ITEMS,), *arguments)
    return ids.read(), weights.read()


def align(runtime, ids, block_size, num_experts):
    """``(sorted_ids, expert_ids, past)`` by the device, cut off at past."""
    capacity = ids.size + num_experts * (block_size - 1)
    kernel = runtime.programs.kernel("align", "align", {"ALIGN_ITEMS": ALIGN_ITEMS})
    sorted_ids, past = Output(runtime, (capacity,), np.int32), Output(runtime, (1,), np.int32)
    expert_ids = Output(runtime, (-(-capacity // block_size),), np.int32)
    kernel(
        runtime.queue,
        (num_experts * ALIGN_ITEMS,),
        (ALIGN_ITEMS,),
        input_buffer(runtime, ids.astype(np.int32), before=5),
        np.uint64(5),
        np.uint32(ids.size),
        np.uint32(num_experts),
        np.uint32(block_size),
        sorted_ids.buffer,
        np.uint64(GUARD),
        expert_ids.buffer,
        np.uint64(GUARD),
        past.buffer,
        np.uint64(GUARD),
        cl.LocalMemory(4 * num_experts),
    )
    used = int(past.read()[0])
    return sorted_ids.read()[:used], expert_ids.read()[: used // block_size], used


def weigh_tokens(runtime, rows, weights, items):
    """float32 ``[tokens, width]`` by the device."""
    tokens, width = rows.shape
    kernel = runtime.programs.kernel("moe", "weigh_tokens", {"INPUT_TYPE": TYPE_CODES[rows.dtype.name]})
    output = Output(runtime, (tokens, width), np.float32, before=0)
    kernel(
        runtime.queue,
        (tokens * items,),
        (items,),
        input_buffer(runtime, rows, before=3),
        np.uint64(3),
        input_buffer(runtime, weights, before=2),
        np.uint64(2),
        output.buffer,
        np.uint32(width),
    )
    return output.read()


def shared_factor(runtime, rows, gate):
    """float32 ``[tokens]`` by the device."""
    tokens, width = rows.shape
    macros = {"INPUT_TYPE": TYPE_CODES[rows.dtype.name], "FACTOR_ITEMS": FACTOR_ITEMS}
    kernel = runtime.programs.kernel("moe", "shared_factor", macros)
    output = Output(runtime, (tokens,), np.float32, before=0)
    kernel(
        runtime.queue,
        (tokens * FACTOR_ITEMS,),
        (FACTOR_ITEMS,),
        input_buffer(runtime, rows, before=3),
        np.uint64(3),
        input_buffer(runtime, gate),
        output.buffer,
        np.uint32(width),
    )
    return output.read()


def combine(
    runtime,
    rows,
    ids,
    weights,
    num_experts,
    dtype="float32",
    out_dtype="float32",
    *,
    shared=None,
    factors=None,
    items=64,
):
    """``[tokens, width]`` by the device; with ``weights`` None all weights are 1."""
    tokens, top_k = ids.shape
    width = rows.shape[1]
    macros = {
        "INPUT_TYPE": TYPE_CODES[dtype],
        "OUTPUT_TYPE": TYPE_CODES[out_dtype],
        "WEIGHTED": weights is not None,
        "SHARED": 0 if shared is None else 1 if factors is None else 2,
    }
    kernel = runtime.programs.kernel("moe", "combine", macros)
    groups = -(-width // (4 * items))
    output = Output(runtime, (tokens, width), DTYPES[out_dtype])
    kernel(
        runtime.queue,
        (tokens * groups * items,),
        (items,),
        input_buffer(runtime, rows, before=8),
        np.uint64(8),
        input_buffer(runtime, ids.astype(np.int32), before=1),
        np.uint64(1),
        input_buffer(runtime, np.full(ids.shape, np.nan, np.float32) if weights is None else weights, before=2),
        np.uint64(2),
        np.uint32(num_experts),
        np.uint32(top_k),
        None if shared is None else input_buffer(runtime, shared),
        None if factors is None else input_buffer(runtime, factors),
        output.buffer,
        np.uint64(GUARD),
        np.uint32(width),
        np.uint32(groups),
    )
    return output.read()


@each_device
class TestRoute:
    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("scoring", [scoring for scoring in SCORINGS if scoring != "sparsemixer"])
    @pytest.mark.parametrize("sizes", ROUTINGS)
    @pytest.mark.parametrize("corrected", [False, True])
    def test_matches_the_reference(self, device, rng, sizes, scoring, corrected):
        experts, groups, topk_groups, top_k, group_score = sizes
        for tokens, dtype, normalise in ((1, "bfloat16", True), (70, "float32", False), (33, "float16", True)):
            how = Routing(
                experts,
                top_k,
                scoring=scoring,
                norm_topk_prob=normalise,
                correction_bias=rng.standard_normal(experts) if corrected else None,
                num_groups=groups,
                topk_groups=topk_groups,
                group_score=group_score,
                routed_scaling_factor=2.5,
            )
            logits = (2 * rng.standard_normal((4 * tokens + 20, experts))).astype(DTYPES[dtype])
            logits = logits[decided(as_given(logits), how)][:tokens]
            assert len(logits) == tokens
            check_routed(route(runtime_of(device), logits, how, dtype), logits, how)

    @pytest.mark.parametrize("scaled", [False, True])
    def test_sparsemixer_and_scales(self, device, rng, scaled):
        """Weights over the logits that are near, one after the other; with a scale for each expert."""
        logits = (2 * rng.standard_normal((40, 16))).astype(np.float32)
        scoring, scale = ("softmax", rng.random(16).astype(np.float32) + 0.5) if scaled else ("sparsemixer", None)
        how = Routing(16, 2, scoring=scoring, expert_scale=scale, norm_topk_prob=False)
        ids, weights = route(runtime_of(device), logits, how)
        expected_ids, expected = reference.route(logits, how)
        np.testing.assert_array_equal(ids, expected_ids)
        assert_close(weights, expected, 64 * FLOAT32 * np.abs(expected))

    @pytest.mark.parametrize(("experts", "top_k"), [(513, 10), (1030, 3), (6000, 100)])
    @pytest.mark.sampled(1)
    def test_many_experts(self, device, rng, experts, top_k):
        logits = (4 * rng.standard_normal((50, experts))).astype(np.float32)
        how = Routing(experts, top_k)
        with unless_the_driver_is_wrong(device):
            check_route(OpenClBackend(device=device, tier="portable").new_context(), how, TYPE_CODES["float32"])
        ids, weights = route(runtime_of(device), logits, how)
        expected_ids, expected_weights = reference.route(logits, how)
        np.testing.assert_array_equal(ids, expected_ids)
        assert_close(weights, expected_weights, (top_k + 64) * FLOAT32 * expected_weights)

    @pytest.mark.parametrize("scoring", SCORINGS)
    @pytest.mark.parametrize(("experts", "top_k"), [(24, 6), (200, 150)])
    def test_of_equal_ones_the_smaller_index(self, device, rng, experts, top_k, scoring):
        logits = rng.integers(0, 3, (20, experts)).astype(np.float32)
        logits[0] = 0
        logits[1] = rng.choice([0.0, -0.0], experts)
        how = Routing(experts, top_k, scoring=scoring)
        ids, weights = route(runtime_of(device), logits, how)
        np.testing.assert_array_equal(ids, reference.route(logits, how)[0])
        assert ids[:2].tolist() == 2 * [list(range(top_k))]
        if scoring != "sparsemixer":  # whose weights depend on those picked before
            assert (weights[:2] == weights[0, 0]).all()

    def test_of_equal_groups_the_earlier(self, device):
        for group_score in ("max", "top2_sum"):
            how = Routing(40, 4, scoring="sigmoid", num_groups=10, topk_groups=2, group_score=group_score)
            logits = np.zeros((1, 40), np.float32)
            logits[0, [13, 14, 22, 23, 30, 31]] = 1
            assert route(runtime_of(device), logits, how)[0].tolist() == [[13, 14, 22, 23]]

    def test_choices_below_zero(self, device, rng):
        """Ranks have the order of numbers, for logits and biased scores of both signs and every magnitude."""
        logits = np.array([[-3e38, -1, -1e-30, 0, 1e-30, 1e-6, 5, 3e38]], np.float32)
        how = Routing(8, 8, scoring="softmax_topk")
        assert route(runtime_of(device), logits, how)[0].tolist() == [[7, 6, 5, 4, 3, 2, 1, 0]]
        bias = np.array([-7, 3, -0.5, -1e30, 1e30, -2, 0, -0.25])
        how = Routing(8, 8, scoring="sigmoid", correction_bias=bias)
        ids, weights = route(runtime_of(device), np.zeros((1, 8), np.float32), how)
        assert ids.tolist() == [[4, 1, 6, 7, 2, 5, 0, 3]]
        assert (weights == 0.125).all()

    @pytest.mark.parametrize("corrected", [False, True])
    @pytest.mark.parametrize("scoring", SCORINGS)
    @pytest.mark.parametrize(("experts", "groups"), [(5, 1), (100, 1), (100, 10)])
    @pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.nan, np.inf], [0, np.inf], "all -inf", "all nan"])
    @pytest.mark.sampled(12)
    def test_bad_logits(self, device, rng, bad, experts, groups, scoring, corrected):
        """The row has ids 0, 1, 2, ... and weights of NaN, as on the CPU; other rows do not change."""
        if scoring == "sparsemixer":  # has neither
            groups, corrected = 1, False
        logits = rng.standard_normal((3, experts)).astype(np.float32)
        how = Routing(
            experts,
            4,
            scoring=scoring,
            correction_bias=rng.standard_normal(experts) if corrected else None,
            num_groups=groups,
            topk_groups=(groups + 1) // 2,
            group_score="top2_sum" if corrected else "max",
            norm_topk_prob=corrected,
        )
        clean = route(runtime_of(device), logits, how)
        if isinstance(bad, str):
            logits[1] = float(bad.split()[1])
        else:
            logits[1, -len(bad) :] = bad
        ids, weights = route(runtime_of(device), logits, how)
        assert np.isnan(weights[1]).all()
        assert ids[1].tolist() == [0, 1, 2, 3]
        assert_same_bits(ids[::2], clean[0][::2])
        assert_same_bits(weights[::2], clean[1][::2])
        assert not np.isnan(weights[::2]).any()

    @pytest.mark.parametrize("scoring", SCORINGS)
    def test_every_place_of_a_bad_logit(self, device, rng, scoring):
        logits = rng.standard_normal((70, 70)).astype(np.float32)
        np.fill_diagonal(logits, np.nan)
        ids, weights = route(runtime_of(device), logits, Routing(70, 3, scoring=scoring))
        assert np.isnan(weights).all()
        assert (ids == [0, 1, 2]).all()


@each_device
class TestAlign:
    @pytest.mark.sampled(6)
    @pytest.mark.parametrize("block_size", [1, 3, 16, 64])
    @pytest.mark.parametrize(
        ("tokens", "top_k", "experts"), [(1, 1, 1), (7, 2, 4), (50, 4, 7), (20, 3, 128), (300, 2, 1), (100, 8, 513)]
    )
    def test_matches_the_reference(self, device, rng, tokens, top_k, experts, block_size):
        self.check(device, rng.integers(-1, experts, (tokens, top_k)), block_size, experts)

    @pytest.mark.parametrize("pairs", [32767, 32768, 32769, 70000])
    def test_more_pairs_than_marks(self, device, rng, pairs):
        """Some experts have pairs in some tiles only."""
        ids = rng.integers(-1, 5, (pairs, 1))
        ids[:33000][ids[:33000] == 2] = 3
        ids[-100:] = 4
        self.check(device, ids, 16, 6)

    def test_ids_out_of_range_take_no_part(self, device, rng):
        ids = rng.integers(0, 9, (40, 3))
        wild = ids.copy()
        wild[::3, 1] = rng.choice([-1, -7, 9, 10**6, 2**31 - 1, -(2**31)], wild[::3, 1].shape)
        ids[::3, 1] = -1
        for given in (ids, wild):
            self.check(device, given, 8, 9, expected=ids)

    def test_no_experts_chosen(self, device):
        self.check(device, np.full((10, 2), -1), 16, 60)

    def test_one_expert_takes_all(self, device):
        self.check(device, np.full((100, 9), 59), 64, 60)

    def check(self, device, ids, block_size, experts, expected=None):
        expected = reference.moe_align_block_size(ids if expected is None else expected, block_size, experts)
        sorted_ids, expert_ids, past = align(runtime_of(device), ids, block_size, experts)
        assert past == expected[2][0]
        np.testing.assert_array_equal(sorted_ids, expected[0][:past])
        np.testing.assert_array_equal(expert_ids, expected[1][: past // block_size])


@each_device
class TestWeighTokens:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("tokens", "width", "items"), [(1, 32, 32), (7, 96, 64), (300, 288, 1)])
    def test_to_the_last_bit(self, device, rng, tokens, width, items, dtype):
        rows = rng.standard_normal((tokens, width)).astype(DTYPES[dtype])
        weights = rng.standard_normal(tokens).astype(np.float32)
        result = weigh_tokens(runtime_of(device), rows, weights, items)
        assert_same_bits(result, weights[:, None] * as_given(rows))

    def test_what_float16_cannot_hold(self, device):
        rows, weights = np.full((2, 32), 60000, np.float16), np.array([1e4, 1e-20], np.float32)
        result = weigh_tokens(runtime_of(device), rows, weights, 32)
        assert_same_bits(result, weights[:, None] * as_given(rows))
        assert np.isfinite(result).all()

    def test_nan_stays_in_its_token(self, device, rng):
        rows, weights = rng.standard_normal((3, 32)).astype(np.float32), np.array([1, np.nan, 2], np.float32)
        assert np.isnan(weigh_tokens(runtime_of(device), rows, weights, 32)).any(axis=1).tolist() == [0, 1, 0]


@each_device
class TestSharedFactor:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("tokens", "width"), [(1, 32), (5, 256), (70, 288), (3, 4096)])
    def test_within_rounding(self, device, rng, tokens, width, dtype):
        """The error of a sum is at most ``width`` roundoffs of its magnitude; the sigmoid's slope is at most 1/4."""
        rows = activations(rng, tokens, width, DTYPES[dtype])
        gate = (rng.standard_normal(width) / width**0.5).astype(np.float32)
        result = shared_factor(runtime_of(device), rows, gate)
        exact = as_given(rows).astype(np.float64)
        expected = 1 / (1 + np.exp(-(exact @ gate)))
        bound = FLOAT32 * (width * (np.abs(exact) @ np.abs(gate)) / 4 + 8)
        assert_close(result, expected, bound)

    def test_extremes(self, device):
        rows = np.full((5, 32), [[0], [1e3], [-1e3], [np.nan], [np.inf]], np.float32)
        result = shared_factor(runtime_of(device), rows, np.ones(32, np.float32))
        assert_same_bits(result, np.array([0.5, 1, 0, np.nan, 1], np.float32))


@each_device
class TestCombine:
    def chained(self, rows, ids, weights, begin=0):
        """float32 ``[tokens, width]``: a chain of fused multiply-adds."""
        tokens, top_k = ids.shape
        rows = as_given(rows).reshape(tokens, top_k, -1)
        sums = np.full((tokens, rows.shape[2]), begin, np.float32)
        for j in range(top_k):
            added = reference.fma_f32(weights[:, j, None], rows[:, j], sums)
            sums = np.where(ids[:, j, None] >= 0, added, sums)
        return sums

    @pytest.mark.sampled(18)
    @pytest.mark.parametrize("out_dtype", DTYPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 1, 8), (5, 3, 40), (3, 8, 256), (4, 2, 264)])
    def test_to_the_last_bit(self, device, rng, tokens, top_k, width, dtype, out_dtype):
        rows = rng.standard_normal((tokens * top_k, width)).astype(DTYPES[dtype])
        ids = rng.integers(-1, 6, (tokens, top_k))
        weights = rng.standard_normal((tokens, top_k)).astype(np.float32)
        result = combine(runtime_of(device), rows, ids, weights, 6, dtype, out_dtype)
        assert_same_bits(result, self.chained(rows, ids, weights).astype(DTYPES[out_dtype]))

    @pytest.mark.parametrize("out_dtype", DTYPES)
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.sampled(2)
    def test_from_what_a_shared_expert_gave(self, device, rng, gated, dtype, out_dtype):
        rows = rng.standard_normal((9, 264)).astype(DTYPES[dtype])
        shared = rng.standard_normal((3, 264)).astype(DTYPES[dtype])
        ids = np.array([[0, 5, 1], [-1, -1, -1], [2, -1, 2]])
        weights = rng.standard_normal((3, 3)).astype(np.float32)
        factors = rng.random(3).astype(np.float32) if gated else None
        options = {"shared": shared, "factors": factors}
        result = combine(runtime_of(device), rows, ids, weights, 6, dtype, out_dtype, **options)
        begin = as_given(shared) * (factors[:, None] if gated else 1)
        assert_same_bits(result, self.chained(rows, ids, weights, begin).astype(DTYPES[out_dtype]))

    @pytest.mark.parametrize("with_shared", [False, True])
    def test_of_tokens_weighed_before(self, device, rng, with_shared):
        rows = rng.standard_normal((5, 40)).astype(np.float32)
        shared = rng.standard_normal((5, 40)).astype(np.float32) if with_shared else None
        ids = np.array([[0], [3], [-1], [4], [1]])
        result = combine(runtime_of(device), rows, ids, None, 4, shared=shared)
        begin = shared if with_shared else 0
        assert_same_bits(result, self.chained(rows, np.where(ids < 4, ids, -1), np.ones((5, 1), np.float32), begin))

    def test_rows_of_no_expert_are_left_out(self, device, rng):
        rows = rng.standard_normal((12, 16)).astype(np.float32)
        weights = np.ones((4, 3), np.float32)
        ids = np.array([[0, -1, 1], [-1, -1, -1], [2, 3, 0], [5, 4, 4]])  # of 4 experts
        rows[[1, 3, 4, 5, 9, 10, 11]] = np.nan
        weights[1] = np.nan
        result = combine(runtime_of(device), rows, ids, weights, 4)
        assert (result[[1, 3]] == 0).all()
        assert not np.isnan(result).any()
        assert_same_bits(result[2], self.chained(rows[6:9], ids[2:3], weights[2:3])[0])

    def test_nan_stays_in_its_token(self, device, rng):
        rows = rng.standard_normal((6, 16)).astype(np.float32)
        weights = np.array([[1, np.nan], [1, 1], [0, 1]], np.float32)
        rows[4] = np.inf
        result = combine(runtime_of(device), rows, np.zeros((3, 2), int), weights, 1)
        assert np.isnan(result[[0, 2]]).all()
        assert not np.isnan(result[1]).any()


class TestLayer:
    """Launches, slices and buffers of a layer; test_moe.py checks its results."""

    def test_labels(self, device_alone, rng, monkeypatch):
        monkeypatch.setattr(moe, "aligns_as_it_routes", lambda *args: False)
        layer = Layer(rng, shared=160, gate=True, weigh_input=True).on(device_alone)
        ctx = device_alone.new_context()
        x = device_alone.from_host(activations(rng, 4, 96))
        logits = device_alone.from_host(rng.standard_normal((4, 5)).astype(np.float32))
        with ctx.profile() as events:
            layer(ctx, x, logits)
        labels = [label for label, _ in events if ": " not in label]
        assert labels == [
            *("route", "weigh_tokens", "align", "gate_up", "down"),
            *("shared gate_up", "shared down", "shared_factor", "combine"),
        ]

    @pytest.mark.parametrize("weigh_input", [False, True])
    def test_slices(self, device_alone, rng, monkeypatch, weigh_input):
        backend = device_alone
        layer, ctx = Layer(rng, shared=160, gate=True, weigh_input=weigh_input), backend.new_context()
        x, logits = activations(rng, 20, 96), rng.standard_normal((20, 5)).astype(np.float32)
        monkeypatch.setattr(moe, "SLICE_BYTES", 20_000)
        with ctx.profile() as events:
            result = layer.on(backend)(ctx, backend.from_host(x), backend.from_host(logits))
        for label in ("combine", "shared down", "shared_factor", *["weigh_tokens"] * weigh_input):
            assert sum(found == label for found, _ in events) > 3
        check(backend, layer, x, *reference.route(logits, Routing(5, 1 if weigh_input else 2)), backend.to_host(result))

    def test_rows_of_a_slice_fit(self, device_alone, rng, monkeypatch):
        """All rows of a slice, the shared expert's and the weighed tokens included, stay below the limit."""
        layer = Layer(rng, shared=160, gate=True, weigh_input=True).on(device_alone)
        monkeypatch.setattr(moe, "SLICE_BYTES", 100_000)
        ctx = device_alone.new_context()
        tokens = moe.tokens_a_slice(ctx, layer, 1000, 1)
        assert 4 * (128 + 64 + 96 + 320 + 160 + 96 + 96) * tokens <= 100_000 < 6000 * tokens

    def test_what_is_kept(self, device_alone, rng):
        """Bias and gate are uploaded once, and freed with their owners."""
        backend, ctx = device_alone, device_alone.new_context()
        bias = rng.standard_normal(5)
        layer = Layer(rng, shared=160, gate=True).on(backend, scoring="sigmoid", correction_bias=bias)
        x = backend.from_host(activations(rng, 3, 96))
        logits = backend.from_host(rng.standard_normal((3, 5)).astype(np.float32))
        first = backend.to_host(layer(ctx, x, logits))
        kept = list(map(id, ctx._kept.values()))
        held = ctx.workspace_bytes
        assert len(kept) == 2
        with ctx.profile() as events:
            again = backend.to_host(layer(ctx, x, logits))
        assert_same_bits(again, first)
        assert list(map(id, ctx._kept.values())) == kept
        assert ctx.workspace_bytes == held
        assert not any(label.startswith("upload") for label, _ in events)
        del layer
        gc.collect()
        assert not ctx._kept

    def test_more_tokens_to_share(self, device_alone, rng):
        """More tokens than in any earlier call, and more than the counting buffer first holds."""
        backend, ctx = device_alone, device_alone.new_context()
        layer = Layer(rng, hidden=32, inner=32, shared=32)
        moe, x, logits = layer.on(backend), activations(rng, 2100, 32), np.zeros((2100, 5), np.float32)
        for tokens in (3, 1023, 2100, 1030):
            result = backend.to_host(moe(ctx, backend.from_host(x[:tokens]), backend.from_host(logits[:tokens])))
            ends = [0, 1, 2, tokens // 2, tokens - 2, tokens - 1]
            check(backend, layer, x[ends], *reference.route(logits[ends], moe.routing), result[ends])

    @pytest.mark.parametrize("shared", [None, 64])
    def test_ids_out_of_range(self, device_alone, rng, shared):
        """Ids out of range are ignored, whatever their weights; a shared expert is still added."""
        backend = device_alone
        layer, ctx = Layer(rng, weigh_input=True, shared=shared), backend.new_context()
        x, ids = activations(rng, 6, 96), np.array([[0], [-1], [5], [4], [2**31 - 1], [-(2**31)]], np.int32)
        weights = np.where((ids >= 0) & (ids < 5), np.float32(0.75), np.float32(np.nan))
        given = map(backend.from_host, (x, ids, weights))
        result = backend.to_host(layer.on(backend).forward_routed(ctx, *given))
        taken = np.where(np.isnan(weights), -1, ids)
        check(backend, layer, x, taken, np.nan_to_num(weights), result)

    def test_too_little_local_memory(self, device_alone, rng, monkeypatch):
        """The call is refused before any launch, and not by the driver."""
        backend = device_alone
        small = dataclasses.replace(backend.runtime.capabilities, local_memory=1100)
        runtime = dataclasses.replace(backend.runtime, capabilities=small)
        layer, ctx = Layer(rng).on(backend), backend.new_context()
        grouped = Layer(rng, experts=20).on(backend, num_groups=10)
        x, logits = (backend.from_host(np.zeros((4, n), np.float32)) for n in (96, 5))
        out = GuardedBuffer(backend, (4, 96), np.float32)
        monkeypatch.setattr(backend, "runtime", runtime)
        layer.route(ctx, logits)
        with pytest.raises(
            UnsupportedError, match=r"num_experts: got 5, which take 5144 bytes of local memory; .* 1100"
        ):
            layer(ctx, x, logits, out=out.buffer)
        with pytest.raises(UnsupportedError, match="num_experts: got 20, which take 1152 bytes"):
            grouped.route(ctx, backend.from_host(np.zeros((4, 20), np.float32)))
        out.assert_untouched()
