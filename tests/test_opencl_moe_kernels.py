"""The kernels of ``moe.cl`` by themselves: routing, grouping by expert, combination."""

import numpy as np
import pytest
from asserts import assert_close, assert_same_bits, unit_roundoff
from problems import DTYPES, as_given

from marlin_cy import reference

cl = pytest.importorskip("pyopencl")

from opencl_devices import each_device, runtime_of  # noqa: E402

FLOAT32 = unit_roundoff(np.float32)
TYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}
GUARD = 3  # elements before and behind each output
ROUTE_ITEMS, ALIGN_ITEMS = 32, 256


class Output:
    """A guarded device array."""

    def __init__(self, runtime, shape, dtype):
        self.shape, self.dtype, self._runtime = shape, np.dtype(dtype), runtime
        size = int(np.prod(shape))
        self._filled = np.full((2 * GUARD + size) * self.dtype.itemsize, 0xA5, np.uint8)
        self.buffer = runtime.buffer(self._filled)

    def read(self):
        """What was written, the guards having been checked."""
        result = np.empty_like(self._filled)
        cl.enqueue_copy(self._runtime.queue, result, self.buffer)
        guard = GUARD * self.dtype.itemsize
        for part in (slice(0, guard), slice(len(result) - guard, None)):
            np.testing.assert_array_equal(result[part], self._filled[part])
        return result[guard : len(result) - guard].view(self.dtype).reshape(self.shape)


def input_buffer(runtime, array, before=0):
    """A buffer in which the array begins after so many elements of NaN (or of -1)."""
    array = np.ascontiguousarray(array)
    return runtime.buffer(
        np.concatenate([np.full(before * array.itemsize, 0xFF, np.uint8), array.reshape(-1).view(np.uint8)])
    )


def route(runtime, logits, top_k, normalise=True, dtype="float32"):
    """``(ids, weights)`` by the device."""
    tokens, experts = logits.shape
    kernel = runtime.programs.kernel("moe", "route", {"INPUT_TYPE": TYPE_CODES[dtype], "ROUTE_ITEMS": ROUTE_ITEMS})
    ids, weights = Output(runtime, (tokens, top_k), np.int32), Output(runtime, (tokens, top_k), np.float32)
    kernel(
        runtime.queue,
        (tokens * ROUTE_ITEMS,),
        (ROUTE_ITEMS,),
        input_buffer(runtime, logits.astype(DTYPES[dtype]), before=5),
        np.uint64(5),
        np.uint32(experts),
        np.uint32(top_k),
        np.int32(normalise),
        ids.buffer,
        np.uint64(GUARD),
        weights.buffer,
        np.uint64(GUARD),
    )
    return ids.read(), weights.read()


def align(runtime, ids, block_size, num_experts):
    """``(sorted_ids, expert_ids, past)`` by the device, cut off at past."""
    capacity = ids.size + num_experts * (block_size - 1)
    kernel = runtime.programs.kernel("moe", "align", {"ALIGN_ITEMS": ALIGN_ITEMS})
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


def combine(runtime, rows, ids, weights, num_experts, dtype="float32", out_dtype="float32", items=64):
    """float32 ``[tokens, width]`` by the device."""
    tokens, top_k = ids.shape
    width = rows.shape[1]
    kernel = runtime.programs.kernel(
        "moe", "combine", {"INPUT_TYPE": TYPE_CODES[dtype], "OUTPUT_TYPE": TYPE_CODES[out_dtype]}
    )
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
        input_buffer(runtime, weights.astype(np.float32), before=2),
        np.uint64(2),
        np.uint32(num_experts),
        np.uint32(top_k),
        output.buffer,
        np.uint64(GUARD),
        np.uint32(width),
        np.uint32(groups),
    )
    return output.read()


@each_device
class TestRoute:
    @pytest.mark.parametrize("normalise", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("experts", [1, 7, 60, 64, 65, 128])
    def test_matches_the_reference(self, device, rng, experts, dtype, normalise):
        logits = (rng.permuted(np.tile(np.arange(experts), (9, 1)), axis=1) / 8 - 2).astype(DTYPES[dtype])
        for top_k in {1, (experts + 1) // 2, experts}:
            ids, weights = route(runtime_of(device), logits, top_k, normalise, dtype)
            expected_ids, expected_weights = reference.route(as_given(logits), top_k, normalise)
            np.testing.assert_array_equal(ids, expected_ids)
            assert_close(weights, expected_weights, (experts + 16) * FLOAT32 * expected_weights)

    @pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (513, 10), (1030, 3), (9000, 100)])
    def test_random_logits(self, device, rng, experts, top_k):
        logits = (4 * rng.standard_normal((50, experts))).astype(np.float32)
        ids, weights = route(runtime_of(device), logits, top_k)
        expected_ids, expected_weights = reference.route(logits, top_k)
        np.testing.assert_array_equal(ids, expected_ids)
        assert_close(weights, expected_weights, (top_k + 64) * FLOAT32 * expected_weights)

    @pytest.mark.parametrize(("experts", "top_k"), [(24, 6), (200, 150)])
    def test_of_equal_ones_the_smaller_index(self, device, rng, experts, top_k):
        logits = rng.integers(0, 3, (20, experts)).astype(np.float32)
        logits[0] = 0
        ids, weights = route(runtime_of(device), logits, top_k)
        np.testing.assert_array_equal(ids, reference.route(logits, top_k)[0])
        assert ids[0].tolist() == list(range(top_k))
        assert (weights[0] == weights[0, 0]).all()

    def test_extreme_logits(self, device):
        logits = np.array([[3e38, -3e38, 0, 1], [-np.inf, 0, -np.inf, -1], [-1e30, -1e30, -1e30, -1e30]], np.float32)
        ids, weights = route(runtime_of(device), logits, 2)
        np.testing.assert_array_equal(ids, [[0, 1], [1, 3], [0, 1]])
        assert_close(weights, reference.route(logits, 2)[1], 1e-6)

    @pytest.mark.parametrize("normalise", [True, False])
    @pytest.mark.parametrize("experts", [5, 100])
    @pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.nan, np.inf], [0, np.inf], "all -inf", "all nan"])
    def test_bad_logits(self, device, rng, bad, experts, normalise):
        """Ids 0, 1, 2, ... and weights of NaN, in that row alone: as on the CPU."""
        logits = rng.standard_normal((3, experts)).astype(np.float32)
        if isinstance(bad, str):
            logits[1] = float(bad.split()[1])
        else:
            logits[1, -len(bad) :] = bad
        ids, weights = route(runtime_of(device), logits, 4, normalise)
        assert np.isnan(weights[1]).all()
        assert ids[1].tolist() == [0, 1, 2, 3]
        np.testing.assert_array_equal(ids[[0, 2]], reference.route(logits[[0, 2]], 4)[0])
        assert not np.isnan(weights[[0, 2]]).any()

    def test_every_place_of_a_bad_logit(self, device, rng):
        logits = rng.standard_normal((70, 70)).astype(np.float32)
        np.fill_diagonal(logits, np.nan)
        ids, weights = route(runtime_of(device), logits, 3)
        assert np.isnan(weights).all()
        assert (ids == [0, 1, 2]).all()


@each_device
class TestAlign:
    @pytest.mark.parametrize("block_size", [1, 3, 16, 64])
    @pytest.mark.parametrize(
        ("tokens", "top_k", "experts"), [(1, 1, 1), (7, 2, 4), (50, 4, 7), (20, 3, 128), (300, 2, 1), (100, 8, 513)]
    )
    def test_matches_the_reference(self, device, rng, tokens, top_k, experts, block_size):
        self.check(device, rng.integers(-1, experts, (tokens, top_k)), block_size, experts)

    @pytest.mark.parametrize("pairs", [32767, 32768, 32769, 70000])
    def test_more_pairs_than_marks(self, device, rng, pairs):
        """Experts whose pairs lie in some tiles alone."""
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
class TestCombine:
    def chained(self, rows, ids, weights):
        """float32 ``[tokens, width]``: a chain of fused multiply-adds."""
        tokens, top_k = ids.shape
        rows = as_given(rows).reshape(tokens, top_k, -1)
        sums = np.zeros((tokens, rows.shape[2]), np.float32)
        for j in range(top_k):
            added = reference.fma_f32(weights[:, j, None], rows[:, j], sums)
            sums = np.where(ids[:, j, None] >= 0, added, sums)
        return sums

    @pytest.mark.parametrize("out_dtype", DTYPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 1, 8), (5, 3, 40), (3, 8, 256), (4, 2, 264)])
    def test_to_the_last_bit(self, device, rng, tokens, top_k, width, dtype, out_dtype):
        rows = rng.standard_normal((tokens * top_k, width)).astype(DTYPES[dtype])
        ids = rng.integers(-1, 6, (tokens, top_k))
        weights = rng.standard_normal((tokens, top_k)).astype(np.float32)
        result = combine(runtime_of(device), rows, ids, weights, 6, dtype, out_dtype)
        assert_same_bits(result, self.chained(rows, ids, weights).astype(DTYPES[out_dtype]))

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
