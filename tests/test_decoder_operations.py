"""The operations of a decoder, one by one: a backend's against those of the reference."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from asserts import assert_close, assert_same_bits, unit_roundoff
from conftest import ISAS

from marlin_cy import UnsupportedError
from marlin_cy.cpu._dispatch import CONSTANTS
from marlin_cy.decoder import reference
from marlin_cy.decoder.operations import DecoderOperations
from marlin_cy.decoder.plan import RopeTable
from marlin_cy.decoder.program import PAGE_TOKENS

U = unit_roundoff(np.float32)
AVAILABLE = [name for name, isa in ISAS.items() if isa["available"]]
CACHE_DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture
def run(cpu_backend):
    """Runs an operation with every ISA and several numbers of threads, which must agree on its outputs."""

    def run(operation, *outputs):
        results = []
        for isa, threads in itertools.product(AVAILABLE, (1, 3)):
            ctx, copies = cpu_backend.new_context(isa=isa, num_threads=threads), [output.copy() for output in outputs]
            operation(cpu_backend, ctx, *copies)
            results.append(copies)
        for result in results[1:]:
            for actual, expected in zip(result, results[0], strict=True):
                assert_same_bits(actual, expected)
        return results[0][0] if len(outputs) == 1 else results[0]

    return run


def unset(*shape):
    return np.full(shape, np.nan, np.float32)


def test_pages():
    assert CONSTANTS["KV_BLOCK"] == PAGE_TOKENS


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_embedding_rows(run, rng, dtype):
    table, tokens = floats(rng, 30, 37).astype(dtype), np.array([29, 0, 7, 7], np.int32)
    out = run(lambda backend, ctx, y: backend.embedding_rows(ctx, table, tokens, y), unset(4, 37))
    assert_same_bits(out, table[tokens].astype(np.float32))


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(run, rng, weighted):
    x, residual, weight = floats(rng, 5, 100), floats(rng, 5, 100), floats(rng, 100) if weighted else None
    out = run(lambda backend, ctx, y: backend.rms_norm(ctx, x, weight, 1e-5, y), unset(5, 100))
    expected = reference.rms_norm(x, weight, 1e-5)
    assert_close(out, expected, 20 * U * np.abs(expected))
    out, total = run(
        lambda backend, ctx, y, sums: backend.rms_norm(ctx, x, weight, 1e-5, y, residual=sums), unset(5, 100), residual
    )
    assert_same_bits(total, residual + x)
    expected = reference.rms_norm(total, weight, 1e-5)
    assert_close(out, expected, 20 * U * np.abs(expected))


def test_gated_rms_norm(run, rng):
    x, gate, weight = floats(rng, 6, 64), floats(rng, 6, 64), floats(rng, 64)
    out = run(lambda backend, ctx, y: backend.gated_rms_norm(ctx, x, weight, gate, 1e-6, y), unset(6, 64))
    expected = reference.gated_rms_norm(x, weight, gate, 1e-6)
    assert_close(out, expected, 25 * U * np.abs(expected))


def test_l2_normalize(run, rng):
    x = floats(rng, 6, 64)
    out = run(lambda backend, ctx, y: backend.l2_normalize(ctx, y, 0.125), x)
    expected = reference.l2_normalize(x, 0.125)
    assert_close(out, expected, 20 * U * np.abs(expected))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(run, rng, interleaved):
    angle = rng.uniform(-9, 9, (50, 12))
    table = RopeTable(np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32), interleaved)
    x, positions = floats(rng, 4, 3, 30), np.array([49, 0, 3, 3], np.int32)
    out = run(lambda backend, ctx, y: backend.rope(ctx, y, table.cos, table.sin, positions, interleaved=interleaved), x)
    assert_close(out, reference.rope(x, table, positions), 4 * U * np.abs(x).max())
    assert_same_bits(np.ascontiguousarray(out[..., 24:]), np.ascontiguousarray(x[..., 24:]))


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_dense(run, rng, rows, dtype):
    x, weight, bias = floats(rng, rows, 1100), floats(rng, 150, 1100).astype(dtype), floats(rng, 150)
    for b in (bias, None):
        out = run(lambda backend, ctx, y, b=b: backend.dense(ctx, x, weight, b, y), unset(rows, 150))
        magnitude = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T + 4
        assert_close(out, reference.dense(x, weight, b), 72 * U * magnitude)


class Cache:
    """A cache with pages in random order, and what one sequence has written to it."""

    def __init__(self, rng, length, kv_heads, head_dim, value_dim, dtype):
        pages = -(-length // PAGE_TOKENS)
        self.page_table = rng.permutation(pages + 4)[:pages].astype(np.int32)
        self.keys = np.full((pages + 4, kv_heads, head_dim, PAGE_TOKENS), np.nan, dtype)
        self.values = np.full((pages + 4, kv_heads, PAGE_TOKENS, value_dim), np.nan, dtype)
        self.k, self.v = floats(rng, length, kv_heads, head_dim), floats(rng, length, kv_heads, value_dim)

    def append(self, run, parts):
        """Append the tokens in calls of these lengths."""
        start = 0
        for tokens in parts:
            now = slice(start, start + tokens)
            self.keys, self.values = run(
                lambda backend, ctx, keys, values, now=now: backend.append_to_cache(
                    ctx, keys, values, self.k[now].copy(), self.v[now].copy(), self.page_table, now.start
                ),
                self.keys,
                self.values,
            )
            start += tokens


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_append_to_cache(run, rng, dtype):
    """Other positions and other pages stay as they are."""
    cache = Cache(rng, 40, 2, 6, 16, dtype)
    cache.append(run, [1, 20, 16])
    for position, head in itertools.product(range(40), range(2)):
        page, place = cache.page_table[position // PAGE_TOKENS], position % PAGE_TOKENS
        key, value = cache.keys[page, head, :, place].copy(), cache.values[page, head, place].copy()
        if position < 37:
            assert_same_bits(key, cache.k[position, head].astype(dtype))
            assert_same_bits(value, cache.v[position, head].astype(dtype))
        else:
            assert np.isnan(key.astype(np.float32)).all()
            assert np.isnan(value.astype(np.float32)).all()
    unused = np.setdiff1d(np.arange(len(cache.keys)), cache.page_table)
    assert np.isnan(cache.keys[unused].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "sinks", "soft_cap"),
    [(4, 2, None, False, None), (3, 3, 20, True, None), (8, 1, 300, False, 5.0), (70, 1, None, True, None)],
)
def test_attention(run, rng, heads, kv_heads, window, sinks, soft_cap, dtype):
    """In one call and token by token: the same bits, and within the rounding of float32 of the reference."""
    length, tokens, d, dv = 530, 6, 24, 32
    cache = Cache(rng, length, kv_heads, d, dv, dtype)
    cache.append(run, [length])
    q, logits = floats(rng, tokens, heads, d), floats(rng, heads) if sinks else None
    start, options = length - tokens, {"scale": d**-0.5, "window": window, "soft_cap": soft_cap}
    if window is not None:  # pages that no token sees may be gone
        cache.page_table[: (start - window + 1) // PAGE_TOKENS] = -1

    def attend(now):
        return run(
            lambda backend, ctx, y: backend.attention(
                ctx,
                q[now].copy(),
                cache.keys,
                cache.values,
                cache.page_table,
                start + now.start,
                y,
                sinks=logits,
                **options,
            ),
            unset(now.stop - now.start, heads, dv),
        )

    out = attend(slice(0, tokens))
    keys, values = (array.astype(dtype).astype(np.float64) for array in (cache.k, cache.v))
    positions = np.arange(start, length)
    expected = reference.attention(q, keys, values, positions, sinks=logits, **options)
    score_error = (d + 2) * U * d**-0.5 * np.linalg.norm(q, axis=-1).max() * np.linalg.norm(keys, axis=-1).max()
    score_error += 0 if soft_cap is None else 8 * U * soft_cap
    magnitude = reference.attention(q, keys, np.abs(values), positions, sinks=logits, **options)
    assert_close(out, expected, (4 * score_error + 30 * U + 300 * U) * magnitude)
    for token in range(tokens):
        assert_same_bits(attend(slice(token, token + 1)), out[token : token + 1])


def test_attention_of_the_first_tokens(run, rng):
    """The first token sees itself only."""
    cache = Cache(rng, 3, 1, 8, 16, np.float32)
    cache.append(run, [3])
    q = floats(rng, 3, 2, 8)
    out = run(
        lambda backend, ctx, y: backend.attention(ctx, q, cache.keys, cache.values, cache.page_table, 0, y, scale=1.0),
        unset(3, 2, 16),
    )
    assert_same_bits(out[0], np.repeat(cache.v[0], 2, axis=0))
    expected = reference.attention(q, cache.k, cache.v, np.arange(3), scale=1.0)
    assert_close(out, expected, 200 * U * np.abs(cache.v).max())


def test_delta_net(run, rng):
    """Convolution, gates and rule of 9 tokens, in two calls and in one."""
    tokens, k_heads, v_heads, key_dim, value_dim, width = 9, 2, 4, 20, 32, 4
    x, weight = floats(rng, tokens, 50), floats(rng, 50, width)
    a, b, a_log, dt_bias = (
        floats(rng, tokens, v_heads),
        floats(rng, tokens, v_heads),
        floats(rng, v_heads),
        floats(rng, v_heads),
    )
    q, k = (reference.l2_normalize(floats(rng, tokens, k_heads, key_dim)).astype(np.float32) for _ in range(2))
    v = floats(rng, tokens, v_heads, value_dim)

    def compute(parts):
        def call(backend, ctx, mixed, conv_state, decay, beta, state, y):
            for now in parts:
                outputs = [unset(*array[now].shape) for array in (mixed, decay, beta, y)]
                backend.short_conv(ctx, x[now].copy(), weight, conv_state, outputs[0])
                backend.delta_gates(ctx, a[now].copy(), b[now].copy(), a_log, dt_bias, outputs[1], outputs[2])
                inputs = [array[now].copy() for array in (q, k, v)]
                backend.delta_rule(ctx, *inputs, outputs[1], outputs[2], state, outputs[3])
                for array, output in zip((mixed, decay, beta, y), outputs, strict=True):
                    array[now] = output

        gates, zeros = (tokens, v_heads), np.zeros
        return run(
            call,
            unset(tokens, 50),
            zeros((width - 1, 50), np.float32),
            unset(*gates),
            unset(*gates),
            zeros((v_heads, key_dim, value_dim), np.float32),
            unset(tokens, v_heads, value_dim),
        )

    at_once, in_parts = compute([slice(0, 9)]), compute([slice(0, 2), slice(2, 9)])
    for actual, expected in zip(in_parts, at_once, strict=True):
        assert_same_bits(actual, expected)
    mixed, conv_state, decay, beta, state, y = at_once
    expected, expected_state = reference.short_conv(x, weight)
    assert_close(mixed, expected, 40 * U * np.abs(x).max() * np.abs(weight).sum(axis=1))
    assert_close(conv_state, expected_state, 0)
    for actual, expected in zip((decay, beta), reference.delta_gates(a, b, a_log, dt_bias), strict=True):
        assert_close(actual, expected, 100 * U)
    expected, expected_state = reference.delta_rule(q, k, v, decay, beta)
    # Heads are normalised and decay shrinks: an error of a token adds to those before it.
    bound = tokens * 4 * key_dim * U * np.abs(v).max()
    assert_close(y, expected, bound)
    assert_close(state, expected_state, bound)


# ---------------------------------------------------------------------------------------------
# What is refused


def test_a_backend_without_operations():
    class Empty(DecoderOperations):
        name = "empty"

    x = np.ones((2, 16), np.float32)
    with pytest.raises(UnsupportedError, match="rms_norm: the empty backend does not have this operation"):
        Empty().rms_norm(None, x, None, 1e-6, x)
    methods = [name for name in vars(DecoderOperations) if not name.startswith("_")]
    assert len(methods) == 11
    for name in methods:
        method, count = getattr(Empty(), name), getattr(DecoderOperations, name).__code__.co_argcount - 1
        options = {"scale": 1.0} if name == "attention" else {}
        with pytest.raises(UnsupportedError, match=f"{name}: the empty backend"):
            method(*[None] * count, **options)


X = np.ones((4, 16), np.float32)
HEADS = np.ones((4, 2, 8), np.float32)
KEYS, VALUES = np.zeros((3, 2, 8, 16), np.float32), np.zeros((3, 2, 16, 16), np.float32)
TABLE = np.array([0, 1], np.int32)
OUT = np.zeros((4, 2, 16), np.float32)
READ_ONLY = np.zeros((4, 16), np.float32)
READ_ONLY.flags.writeable = False
BAD_CALLS = {
    "a list": (lambda b, c: b.rms_norm(c, [[1.0]], None, 1e-6, X), ValueError, r"x: got list, expected \[any, any\]"),
    "dtype": (lambda b, c: b.rms_norm(c, X.astype(float), None, 1e-6, X), TypeError, "x: got dtype float64"),
    "rank": (lambda b, c: b.rms_norm(c, X[0], None, 1e-6, X), ValueError, r"x: got shape \(16,\)"),
    "out's shape": (lambda b, c: b.rms_norm(c, X, None, 1e-6, X[:3].copy()), ValueError, r"out: got shape \(3, 16\)"),
    "read-only": (lambda b, c: b.rms_norm(c, X, None, 1e-6, READ_ONLY), ValueError, "out: got a read-only array"),
    "strides": (lambda b, c: b.rms_norm(c, X[:, ::2], None, 1e-6, X), ValueError, "x: got strides"),
    "empty": (lambda b, c: b.rms_norm(c, X[:0], None, 1e-6, X[:0]), ValueError, "expected no length of 0"),
    "weight": (lambda b, c: b.rms_norm(c, X, X[0, :9], 1e-6, X), ValueError, r"weight: got shape \(9,\)"),
    "residual is x": (
        lambda b, c: b.rms_norm(c, X, None, 1e-6, READ_ONLY.copy(), residual=X),
        ValueError,
        "residual: shares memory",
    ),
    "eps": (lambda b, c: b.rms_norm(c, X, None, "small", X), TypeError, "eps: got 'small'"),
    "context": (lambda b, c: b.rms_norm(None, X, None, 1e-6, X), TypeError, "ctx: got NoneType"),
    "token": (
        lambda b, c: b.embedding_rows(c, X, np.array([4], np.int32), X[:1].copy()),
        IndexError,
        "tokens: got 4 at",
    ),
    "negative token": (
        lambda b, c: b.embedding_rows(c, X, np.array([-1], np.int32), X[:1].copy()),
        IndexError,
        "tokens: got -1 at",
    ),
    "pairs": (
        lambda b, c: b.rope(
            c, HEADS.copy(), np.ones((9, 5), np.float32), np.ones((9, 5), np.float32), np.arange(4, dtype=np.int32)
        ),
        ValueError,
        "cos: got 5 pairs, expected at most 4",
    ),
    "position": (
        lambda b, c: b.rope(c, HEADS.copy(), X[:2, :4].copy(), X[:2, :4].copy(), np.arange(4, dtype=np.int32)),
        IndexError,
        r"positions: got 2 at \[2\]",
    ),
    "dense out": (lambda b, c: b.dense(c, X, X, None, X), ValueError, r"out: got shape \(4, 16\), expected \[4, 4\]"),
    "dense overlap": (
        lambda b, c: b.dense(c, X, np.ones((16, 16), np.float32), None, X),
        ValueError,
        "out: shares memory with the input",
    ),
    "page": (
        lambda b, c: b.attention(c, HEADS, KEYS, VALUES, np.array([3], np.int32), 0, OUT, scale=1.0),
        IndexError,
        r"page_table: got 3 at \[0\], expected 0 to 2",
    ),
    "too few pages": (
        lambda b, c: b.attention(c, HEADS, KEYS, VALUES, TABLE, 29, OUT, scale=1.0),
        ValueError,
        "page_table: got 2 pages, expected at least 3",
    ),
    "start": (lambda b, c: b.attention(c, HEADS, KEYS, VALUES, TABLE, -1, OUT, scale=1.0), ValueError, "start: got -1"),
    "window": (
        lambda b, c: b.attention(c, HEADS, KEYS, VALUES, TABLE, 0, OUT, scale=1.0, window=0),
        ValueError,
        "window: got 0",
    ),
    "soft cap": (
        lambda b, c: b.attention(c, HEADS, KEYS, VALUES, TABLE, 0, OUT, scale=1.0, soft_cap=0.0),
        ValueError,
        "soft_cap: got 0.0",
    ),
    "heads": (
        lambda b, c: b.attention(c, np.ones((4, 3, 8), np.float32), KEYS, VALUES, TABLE, 0, OUT, scale=1.0),
        ValueError,
        "q: got 3 heads, expected a multiple of 2",
    ),
    "value dtype": (
        lambda b, c: b.attention(c, HEADS, KEYS, VALUES.astype(np.float16), TABLE, 0, OUT, scale=1.0),
        TypeError,
        "values: got dtype float16, expected that of keys",
    ),
    "value width": (
        lambda b, c: b.attention(c, HEADS, KEYS, VALUES[..., :8].copy(), TABLE, 0, OUT, scale=1.0),
        UnsupportedError,
        "values: got heads of 8 values",
    ),
    "wide keys": (
        lambda b, c: b.append_to_cache(
            c, np.zeros((1, 1, 656, 16), np.float32), np.zeros((1, 1, 16, 16), np.float32), X, X, TABLE, 0
        ),
        UnsupportedError,
        "keys: got heads of 656 values",
    ),
    "new keys": (
        lambda b, c: b.append_to_cache(c, KEYS.copy(), VALUES.copy(), HEADS[:, :1].copy(), OUT, TABLE, 0),
        ValueError,
        "k: got shape",
    ),
    "conv state": (
        lambda b, c: b.short_conv(c, X, np.ones((16, 4), np.float32), X, X.copy()),
        ValueError,
        "state: got shape",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(cpu_backend, case):
    call, error, message = BAD_CALLS[case]
    before = [array.copy() for array in (X, HEADS, KEYS, VALUES, OUT)]
    with pytest.raises(error, match=message):
        call(cpu_backend, cpu_backend.new_context(num_threads=1))
    for array, copy in zip((X, HEADS, KEYS, VALUES, OUT), before, strict=True):
        assert_same_bits(array, copy)
