"""Attention and the delta rule of ``ukernels/operations.h``: every ISA that runs here, against float64 and each other.

What a query does not see is NaN, in pages that are read and in pages that are not, and pages that no query sees have
no valid index.
"""

import numpy as np
import pytest
from asserts import assert_close, assert_same_bits, unit_roundoff
from row_operations import (
    ATTENTION_CHUNK,
    CHUNK_PAGES,
    DTYPES,
    KV_BLOCK,
    LANES,
    MAX_HEAD_DIM,
    MAX_QUERIES,
    floats,
    names,
    run_all,
    spaced,
    unset,
)

U = unit_roundoff(np.float32)
NO_PAGE = -(2**30)  # far outside of any memory


class Chunk:
    """A chunk of a cache, and queries that see random parts of it."""

    def __init__(self, rng, m, d, dv, dtype, *, begin=None, end=None, scale=None, soft_cap=0.0):
        self.m, self.d, self.dv, self.soft_cap = m, d, dv, soft_cap
        self.scale = d**-0.5 if scale is None else scale
        self.end = rng.integers(1, ATTENTION_CHUNK + 1, m) if end is None else np.broadcast_to(end, m)
        self.begin = rng.integers(-50, self.end).clip(0) if begin is None else np.broadcast_to(begin, m)
        self.begin, self.end = self.begin.astype(np.int32), self.end.astype(np.int32)
        self.q = floats(rng, m, d)
        self.key, self.value = (
            floats(rng, ATTENTION_CHUNK, d).astype(dtype),
            floats(rng, ATTENTION_CHUNK, dv).astype(dtype),
        )
        position = np.arange(ATTENTION_CHUNK)
        seen = ((self.begin[:, None] <= position) & (position < self.end[:, None])).any(axis=0)
        self.key[~seen] = self.value[~seen] = np.nan
        places = rng.permutation(CHUNK_PAGES + 3)[:CHUNK_PAGES]
        self.keys = np.full((CHUNK_PAGES + 3, d, KV_BLOCK), np.nan, dtype)
        self.values = np.full((CHUNK_PAGES + 3, KV_BLOCK, dv), np.nan, dtype)
        self.keys[places] = self.key.reshape(CHUNK_PAGES, KV_BLOCK, d).transpose(0, 2, 1)
        self.values[places] = self.value.reshape(CHUNK_PAGES, KV_BLOCK, dv)
        page_is_seen = seen.reshape(CHUNK_PAGES, KV_BLOCK).any(axis=1)
        self.pages = np.where(page_is_seen, places, NO_PAGE).astype(np.int32)

    def run(self, rows=slice(None)):
        """``(out, max, sum)`` of some queries."""
        q, begin, end = spaced(self.q[rows]), self.begin[rows].copy(), self.end[rows].copy()

        def call(operations, out, largest, total):
            operations.scratch.fill(np.nan)
            operations.attention(
                out, largest, total, q, self.keys, self.values, self.pages, begin, end,
                scale=self.scale, soft_cap=self.soft_cap,
            )  # fmt: skip

        return run_all(call, unset(len(q), self.dv), unset(len(q)), unset(len(q)))

    def expected(self, r):
        """Weighted mean of the values that query r sees, in float64, and its bound; with them, the scores' maximum."""
        seen = slice(self.begin[r], self.end[r])
        q, key, value = (array.astype(np.float64) for array in (self.q[r], self.key[seen], self.value[seen]))
        scores = self.scale * (key @ q)
        error = (self.d + 2) * U * abs(self.scale) * (np.abs(key) @ np.abs(q))
        if self.soft_cap:
            scores = self.soft_cap * np.tanh(scores / self.soft_cap)
            error = error + 8 * U * self.soft_cap
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        # Of a weight, relative: both scores of the difference, its rounding, and exp; the sum doubles it.
        relative = 2 * (2 * error.max() + U * np.ptp(scores) + 4 * U)
        bound = (relative + (len(scores) * 1.1 + 8) * U) * (weights @ np.abs(value))
        return weights @ value, bound, scores.max(), error.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=names(DTYPES))
@pytest.mark.parametrize(("d", "dv"), [(2, 16), (30, 48), (128, 128), (576, 512), (MAX_HEAD_DIM, MAX_HEAD_DIM)])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, MAX_QUERIES])
def test_attention(rng, m, d, dv, dtype):
    if m > 9 and d > 128 and dtype != np.float16:
        m = 13
    chunk = Chunk(rng, m, d, dv, dtype)
    out, largest, total = chunk.run()
    for r in range(m):
        expected, bound, highest, error = chunk.expected(r)
        assert_close(out[r] / total[r], expected, bound)
        assert_close(largest[r], highest, error + 2 * U * abs(highest))


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
@pytest.mark.parametrize("m", [1, 7])
def test_soft_cap(rng, m, soft_cap):
    chunk = Chunk(rng, m, 64, 32, np.float32, scale=3.0, soft_cap=soft_cap)
    out, largest, total = chunk.run()
    assert (np.abs(largest) <= soft_cap).all()
    for r in range(m):
        expected, bound, _, _ = chunk.expected(r)
        assert_close(out[r] / total[r], expected, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=names(DTYPES))
def test_a_query_does_not_depend_on_the_others(rng, dtype):
    """Neither on their number, nor on what they see."""
    chunk = Chunk(rng, MAX_QUERIES, 66, 80, dtype)
    whole = chunk.run()
    for first, end in [(0, 1), (1, 3), (2, 6), (5, 11), (10, 17), (20, 33), (7, 57)]:
        part = chunk.run(slice(first, end))
        for actual, all_rows in zip(part, whole, strict=True):
            assert_same_bits(actual, all_rows[first:end])


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (15, 16), (16, 17), (15, 17), (255, 256), (0, 256), (100, 131)])
def test_limits_of_what_is_visible(rng, begin, end):
    chunk = Chunk(rng, 3, 16, 16, np.float16, begin=begin, end=end)
    out, _, total = chunk.run()
    for r in range(3):
        expected, bound, _, _ = chunk.expected(r)
        assert_close(out[r] / total[r], expected, bound)


@pytest.mark.parametrize("m", [1, 5, 20])
def test_queries_that_see_nothing(rng, m):
    """No page is read if no query sees a position; otherwise each query is by itself."""
    chunk = Chunk(rng, m, 16, 32, np.float16, begin=7, end=7)
    out, largest, total = chunk.run()
    assert not out.any()
    assert not total.any()
    assert (largest == -np.inf).all()
    begin = np.where(np.arange(m) % 2, 9, 3)
    chunk = Chunk(rng, m, 16, 32, np.float16, begin=begin, end=np.full(m, 9))
    out, _, total = chunk.run()
    assert ((total == 0) == (begin == 9)).all()
    assert not out[begin == 9].any()


def test_a_nan_stays_with_the_queries_that_see_it(rng):
    chunk = Chunk(
        rng, 9, 20, 32, np.float32, begin=np.array([0, 0, 0, 0, 40, 40, 0, 0, 0]), end=np.array([41] * 6 + [40] * 3)
    )
    _, key_page = np.nan, chunk.pages[2]
    chunk.keys[key_page][3, 8] = np.nan  # of position 40
    out, largest, total = chunk.run()
    sees = np.arange(9) < 6
    for result in (largest, total, out.sum(axis=1)):
        assert (np.isnan(result) == sees).all()
    assert (np.isnan(out).all(axis=1) == sees).all()


def test_a_nan_among_values_stays_in_its_column(rng):
    chunk = Chunk(rng, 4, 20, 32, np.float32, begin=0, end=50)
    chunk.values[chunk.pages[1]][2, 5] = np.nan
    out, largest, total = chunk.run()
    assert np.isfinite(largest).all()
    assert np.isfinite(total).all()
    assert (np.isnan(out) == (np.arange(32) == 5)).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_scores(rng, value):
    """A weight of an infinite maximum is NaN; one score of -infinity among finite ones has weight 0."""
    chunk = Chunk(rng, 3, 8, 16, np.float32, begin=0, end=5)
    chunk.q[:] = 1
    chunk.keys[chunk.pages[0]][0, 2] = value
    out, largest, total = chunk.run()
    assert (np.isnan(total) == (value > 0)).all()
    assert (np.isnan(largest) == (value > 0)).all()
    assert (np.isnan(out) == (value > 0)).all()


# ---------------------------------------------------------------------------------------------
# Chunks together


def merged(results, n):
    """The chunks' results ``(out, max, sum)`` of one query, merged in their order."""

    def call(operations, out, largest, total):
        for chunk_out, chunk_max, chunk_sum in results:
            operations.attention_merge(largest, total, out, chunk_max, chunk_sum, chunk_out)

    return run_all(call, unset(n), unset(1), np.zeros(1, np.float32))


def finished(out, largest, total, sink=None):
    logit = None if sink is None else np.array([sink], np.float32)
    return run_all(lambda operations, y: operations.attention_finish(y, largest[0], total[0], logit), out)


@pytest.mark.parametrize("sink", [None, -3.0, 4.0, 60.0])
def test_merged_chunks(rng, sink):
    """The chunks of a query that sees 3 of them, and part of a fourth; the first is one that it does not see."""
    chunks = [Chunk(rng, 5, 32, 48, np.float16, begin=0, end=end) for end in (0, 256, 256, 256, 77)]
    for chunk in chunks[1:]:
        chunk.q = chunks[0].q
    results = [chunk.run() for chunk in chunks]
    for r in range(5):
        out, largest, total = merged([(out[r], largest[r], total[r]) for out, largest, total in results], 48)
        actual = finished(out, largest, total, sink)
        key = np.concatenate([chunk.key[: chunk.end[0]] for chunk in chunks]).astype(np.float64)
        value = np.concatenate([chunk.value[: chunk.end[0]] for chunk in chunks]).astype(np.float64)
        q, scale = chunks[0].q[r].astype(np.float64), chunks[0].scale
        scores = scale * (key @ q)
        logits = scores if sink is None else np.append(scores, sink)
        weights = np.exp(logits - logits.max())
        weights = (weights / weights.sum())[: len(scores)]
        error = 34 * U * scale * (np.abs(key) @ np.abs(q)).max()
        bound = (2 * (2 * error + U * np.ptp(logits) + 8 * U) + 350 * U) * (weights @ np.abs(value))
        assert_close(actual, weights @ value, bound)


def test_chunks_may_be_computed_in_any_company_and_order(rng):
    """The merge takes them in ascending order, whoever computed them."""
    chunks = [Chunk(rng, 12, 32, 48, np.float16, begin=0, end=256) for _ in range(4)]
    for chunk in chunks[1:]:
        chunk.q = chunks[0].q
    together = [chunk.run() for chunk in chunks]
    alone = [[part[0] for part in chunk.run(slice(3, 4))] for chunk in reversed(chunks)][::-1]
    expected = merged([(out[3], largest[3], total[3]) for out, largest, total in together], 48)
    for actual, wanted in zip(merged(alone, 48), expected, strict=True):
        assert_same_bits(actual, wanted)


def test_a_chunk_without_visible_positions_changes_nothing(rng):
    chunk = Chunk(rng, 1, 16, 16, np.float32, begin=0, end=20)
    seen = [part[0] for part in chunk.run()]
    seen[0][3] = -0.0
    nothing = np.zeros(16, np.float32), np.float32(-np.inf), np.float32(0)
    for results in ([seen], [nothing, seen], [seen, nothing], [nothing, seen, nothing]):
        for actual, wanted in zip(merged(results, 16), seen, strict=True):
            assert_same_bits(actual.reshape(wanted.shape), wanted)


def test_a_nan_of_a_chunk_stays(rng):
    chunk = Chunk(rng, 1, 16, 16, np.float32, begin=0, end=20)
    seen = [part[0] for part in chunk.run()]
    broken = np.full(16, np.nan, np.float32), np.float32(np.nan), np.float32(np.nan)
    for results in ([seen, broken], [broken, seen]):
        for part in merged(results, 16):
            assert np.isnan(part).all()


def test_a_query_that_saw_nothing_is_zero():
    zeros, largest, total = np.zeros(16, np.float32), np.float32([-np.inf]), np.zeros(1, np.float32)
    assert not finished(zeros, largest, total).any()
    assert not finished(zeros, largest, total, 1.0).any()


# ---------------------------------------------------------------------------------------------
# Gated DeltaNet


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 15, 17, 63, 65, 200])
def test_short_conv(rng, channels, width):
    """Token by token; the state has rows apart."""
    tokens = 6
    x, weight = floats(rng, tokens, channels), floats(rng, width, channels)
    before = floats(rng, width - 1, channels)
    inputs = np.concatenate([before, x]).astype(np.float64)
    state = before
    for token in range(tokens):
        call = lambda operations, y, s, t=token: operations.short_conv(y, s, x[t], weight)  # noqa: E731
        out, state = run_all(call, unset(channels), state)
        taps = inputs[token : token + width] * weight
        sums = taps.sum(axis=0)
        error = (width + 1) * U * np.abs(taps).sum(axis=0)
        # silu's derivative is at most 1.1.
        assert_close(out, sums / (1 + np.exp(-sums)), 1.1 * error + 6 * U * np.abs(sums))
        assert_same_bits(state, np.concatenate([before, x])[token + 1 : token + width].reshape(state.shape))
        in_place, _ = run_all(lambda operations, y, s: operations.short_conv(y, s, y.copy(), weight), x[token], state)
        assert in_place.shape == out.shape


def test_short_conv_of_some_channels(rng):
    """Rows of weights and state belong to more channels than a call computes."""
    x, weight, state = floats(rng, 40), floats(rng, 4, 40), floats(rng, 3, 40)
    whole, whole_state = run_all(lambda operations, y, s: operations.short_conv(y, s, x, weight), unset(40), state)

    def in_parts(operations, y, s):
        for part in (slice(0, 7), slice(7, 40)):
            operations.short_conv(y[part], s[:, part], x[part], weight[:, part])

    parts, parts_state = run_all(in_parts, unset(40), state)
    assert_same_bits(parts, whole)
    assert_same_bits(parts_state, whole_state)


@pytest.mark.parametrize("n", [1, 7, 8, 33])
def test_delta_gates(rng, n):
    a, b, a_log, dt_bias = 10 * floats(rng, n), 10 * floats(rng, n), floats(rng, n), floats(rng, n)
    decay, beta = run_all(
        lambda operations, first, second: operations.delta_gates(first, second, a, b, a_log, dt_bias),
        unset(n),
        unset(n),
    )
    argument = np.exp(a_log.astype(np.float64)) * np.logaddexp(0, a.astype(np.float64) + dt_bias)
    expected = np.exp(-argument)
    # exp, and the product's factors: exp, softplus and the sum within it.
    error = (12 * argument + np.exp(a_log.astype(np.float64)) * (np.abs(a) + np.abs(dt_bias)) + 6) * U
    assert_close(decay, expected, expected * error + 2.0**-149)
    sigmoid = 1 / (1 + np.exp(-b.astype(np.float64)))
    assert_close(beta, sigmoid, 8 * U * sigmoid + 2.0**-149)


def test_delta_gates_at_the_limits():
    a = np.array([np.nan, 100, -100, 0, -np.inf, np.inf], np.float32)
    zeros = np.zeros(6, np.float32)
    decay, beta = run_all(
        lambda operations, first, second: operations.delta_gates(first, second, a, a, zeros, zeros), unset(6), unset(6)
    )
    assert np.isnan(decay[0])
    assert np.isnan(beta[0])
    assert_close(decay[1:], [0, 1, 0.5, 1, 0], 2.0**-22)
    assert_close(beta[1:], [1, 0, 0.5, 0, 1], 2.0**-22)


@pytest.mark.parametrize("columns", [16, 48, 64, 128, 208])
@pytest.mark.parametrize(("tokens", "key_dim"), [(1, 1), (1, 128), (3, 17), (9, 64)])
def test_delta_rule(rng, tokens, key_dim, columns):
    q, k = (spaced(floats(rng, tokens, key_dim) / np.float32(key_dim**0.5)) for _ in range(2))
    v, decay, beta = spaced(floats(rng, tokens, columns)), rng.random(tokens), rng.random(tokens)
    decay, beta = decay.astype(np.float32), beta.astype(np.float32)
    initial = floats(rng, key_dim, columns)
    y, state = run_all(
        lambda operations, out, s: operations.delta_rule(out, s, q, k, v, decay, beta), unset(tokens, columns), initial
    )
    memory, error = initial.astype(np.float64), np.zeros((key_dim, columns))
    for t in range(tokens):
        query, key, value = (array[t].astype(np.float64) for array in (q, k, v))
        memory, error = memory * decay[t], (error + U * np.abs(memory)) * decay[t]
        delta = (value - key @ memory) * beta[t]
        delta_error = beta[t] * (np.abs(key) @ (error + (key_dim + 1) * U * np.abs(memory)) + 3 * U * np.abs(value))
        memory = memory + np.outer(key, delta)
        error = error + np.outer(np.abs(key), 1.01 * delta_error) + 2 * U * np.abs(memory)
        bound = np.abs(query) @ (1.01 * error + (key_dim + 1) * U * np.abs(memory))
        assert_close(y[t], query @ memory, bound + 2.0**-140)
    assert_close(state, memory, error)


def test_tokens_of_the_delta_rule_one_by_one(rng):
    """The same bits as all at once, and for any part of the columns."""
    q, k, v = floats(rng, 7, 32) / 6, floats(rng, 7, 32) / 6, floats(rng, 7, 96)
    decay, beta, initial = rng.random(7).astype(np.float32), rng.random(7).astype(np.float32), floats(rng, 32, 96)

    def at_once(operations, y, state):
        operations.delta_rule(y, state, q, k, v, decay, beta)

    def in_parts(operations, y, state):
        for columns in (slice(0, LANES), slice(LANES, 96)):
            for t in range(7):
                now = slice(t, t + 1)
                operations.delta_rule(
                    y[now, columns], state[:, columns], q[now], k[now], v[now, columns], decay[now], beta[now]
                )

    expected = run_all(at_once, unset(7, 96), initial)
    for actual, wanted in zip(run_all(in_parts, unset(7, 96), initial), expected, strict=True):
        assert_same_bits(actual, wanted)
