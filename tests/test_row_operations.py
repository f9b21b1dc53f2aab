"""The row operations of ``ukernels/operations.h``: every ISA that runs here, against float64 and against generic C.

Outputs lie between guards, and rows lie apart with NaN between them. What an operation must not use is NaN.
"""

import ml_dtypes
import numpy as np
import pytest
from asserts import assert_close, assert_same_bits, unit_roundoff
from row_operations import DTYPES, KV_BLOCK, LANES, MAX_HEAD_DIM, SCALED_DTYPES, floats, names, run_all, spaced, unset

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.cpu._dispatch import ACTIVATIONS as ACTIVATION_NUMBERS
from marlin_cy.cpu._dispatch import CONSTANTS

U = unit_roundoff(np.float32)
SMALLEST = 2.0**-149
CHUNK_K = CONSTANTS["CHUNK_K"]
ALL_FLOAT8 = np.delete(np.arange(256, dtype=np.uint8), [127, 255]).view(ml_dtypes.float8_e4m3fn)  # without NaN
WIDTHS = [1, 7, 15, 16, 17, 31, 33, 128, 1023, 1040]


def sigmoid(x):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def silu(x):
    return np.asarray(x, np.float64) * sigmoid(x)


# ---------------------------------------------------------------------------------------------
# Norms and values by themselves


def norm_error(n):
    """Relative error of a norm's factor, and of the products after it.

    A lane's sum has ``n / LANES`` roundings and the tree four; the square root halves the error. Division, addition,
    root, reciprocal and three products add one each.
    """
    return ((n / LANES + 5) / 2 + 7) * U


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("n", WIDTHS)
def test_rms_norm(rng, n, weighted):
    x, weight, eps = floats(rng, n), floats(rng, n) if weighted else None, 1e-6
    out = run_all(lambda operations, y: operations.rms_norm(y, x, weight, eps), unset(n))
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean() + eps) * (1 if weight is None else weight)
    assert_close(out, expected, norm_error(n) * np.abs(expected) + SMALLEST)
    assert_same_bits(run_all(lambda operations, y: operations.rms_norm(y, y, weight, eps), x), out)


@pytest.mark.parametrize("n", WIDTHS)
def test_gated_rms_norm(rng, n):
    x, weight, gate, eps = floats(rng, n), floats(rng, n), 9 * floats(rng, n), 1e-6
    out = run_all(lambda operations, y: operations.gated_rms_norm(y, x, weight, gate, eps), unset(n))
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean() + eps) * weight * silu(gate)
    assert_close(out, expected, (norm_error(n) + 7 * U) * np.abs(expected) + SMALLEST)
    assert_same_bits(run_all(lambda operations, y: operations.gated_rms_norm(y, y, weight, gate, eps), x), out)


@pytest.mark.parametrize("n", WIDTHS)
def test_l2_normalize(rng, n):
    x, factor = floats(rng, n), 0.25
    out = run_all(lambda operations, y: operations.l2_normalize(y, factor), x)
    wide = x.astype(np.float64)
    expected = wide * factor / np.sqrt((wide**2).sum() + 1e-6)
    assert_close(out, expected, norm_error(n) * np.abs(expected))


def test_a_norm_of_zeros_is_zero():
    zeros = np.zeros(40, np.float32)
    assert not run_all(lambda operations, y: operations.rms_norm(y, zeros, None, 1e-6), unset(40)).any()
    assert not run_all(lambda operations, y: operations.l2_normalize(y, 1.0), zeros).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_norm_of_a_row_that_is_not_finite(rng, value):
    """One NaN makes the row NaN; one infinity makes itself NaN and the rest 0."""
    x = floats(rng, 33)
    x[20] = value
    out = run_all(lambda operations, y: operations.rms_norm(y, x, None, 1e-6), unset(33))
    assert np.isnan(out[20])
    rest = np.delete(out, 20)
    assert np.isnan(rest).all() if np.isnan(value) else not rest.any()


@pytest.mark.parametrize("n", WIDTHS)
def test_add(rng, n):
    x, y = floats(rng, n), floats(rng, n)
    assert_same_bits(run_all(lambda operations, out: operations.add(out, x), y), y + x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 7, 8, 9, 32, 63])
def test_rope(rng, pairs, interleaved):
    """Values behind the pairs are left as they are."""
    x, angle = floats(rng, 2 * pairs + 5), rng.uniform(-9, 9, pairs)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    out = run_all(lambda operations, y: operations.rope(y, cos, sin, interleaved), x)
    index = np.arange(pairs)
    first, second = (2 * index, 2 * index + 1) if interleaved else (index, index + pairs)
    a, b = x[first].astype(np.float64), x[second].astype(np.float64)
    expected = x.astype(np.float64)
    expected[first], expected[second] = a * cos - b * sin, b * cos + a * sin
    bound = np.zeros_like(expected)
    bound[first], bound[second] = U * (2 * abs(a * cos) + 3 * abs(b * sin)), U * (2 * abs(b * cos) + 3 * abs(a * sin))
    assert_close(out, expected, bound + SMALLEST)


@pytest.mark.parametrize("n", WIDTHS)
def test_sigmoid_gate(rng, n):
    x, gate = floats(rng, n), 30 * floats(rng, n)
    out = run_all(lambda operations, y: operations.sigmoid_gate(y, gate), x)
    expected = x * sigmoid(gate)
    tiny = 2.0**-126 * np.abs(x)  # a sigmoid below the smallest normal float may be 0
    assert_close(out, expected, 8 * U * np.abs(expected) + tiny + SMALLEST)


def test_sigmoid_gate_of_nan():
    gate = np.array([np.nan, np.inf, -np.inf], np.float32)
    out = run_all(lambda operations, y: operations.sigmoid_gate(y, gate), np.full(3, 2, np.float32))
    assert_same_bits(out, np.array([np.nan, 2, 0], np.float32))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_glu_rows(rng, n, activation):
    gate, up, number = 5 * floats(rng, n), floats(rng, n), ACTIVATION_NUMBERS[activation]
    out = run_all(lambda operations, y: operations.glu_rows(y, gate, up, number), unset(n))
    expected = ACTIVATIONS[activation].reference(gate.astype(np.float64), up.astype(np.float64))
    bound = 6 * U * np.abs(gate) * (1 + np.abs(up)) + (1 + np.abs(up)) * SMALLEST
    assert_close(out, expected, bound)
    assert_same_bits(run_all(lambda operations, y: operations.glu_rows(y, y, up, number), gate), out)
    assert_same_bits(run_all(lambda operations, y: operations.glu_rows(y, gate, y, number), up), out)


# ---------------------------------------------------------------------------------------------
# Dense products


def dense_bound(x, w, bias=0.0):
    """How far a product may lie from that of float64: the roundings of a lane, the tree, the chunks and the bias."""
    k = x.shape[1]
    roundings = min(k, CHUNK_K) / LANES + 5 + k / CHUNK_K
    return (
        1.01 * U * roundings * (np.abs(x.astype(np.float64)) @ np.abs(w.astype(np.float64)).T + np.abs(bias)) + SMALLEST
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=names(DTYPES))
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (3, 15), (5, 16), (9, 17), (17, 512), (7, 529), (11, 1024), (8, 1025), (6, 2090)]
)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 63, 65])
def test_dense(rng, m, n, k, dtype):
    x, w, bias = spaced(floats(rng, m, k)), spaced(floats(rng, n, k).astype(dtype)), floats(rng, n)
    out = run_all(lambda operations, y: operations.dense(y, x, w, bias), unset(m, n))
    assert_close(out, x.astype(np.float64) @ w.astype(np.float64).T + bias, dense_bound(x, w, bias))
    without = run_all(lambda operations, y: operations.dense(y, x, w), unset(m, n))
    assert_same_bits(without + bias, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=names(DTYPES))
def test_a_row_of_a_dense_product_does_not_depend_on_the_others(rng, dtype):
    m, n, k = 70, 19, 1100
    x, w = floats(rng, m, k), floats(rng, n, k).astype(dtype)
    whole = run_all(lambda operations, y: operations.dense(y, x, w), unset(m, n))
    for rows in (1, 2, 3, 4, 7):
        part = run_all(lambda operations, y, rows=rows: operations.dense(y, x[:rows], w), unset(rows, n))
        assert_same_bits(part, whole[:rows])
    columns = run_all(lambda operations, y: operations.dense(y, x, w[5:6]), unset(m, 1))
    assert_same_bits(columns, np.ascontiguousarray(whole[:, 5:6]))


@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=names(SCALED_DTYPES))
@pytest.mark.parametrize(
    ("n", "k", "scale_k"),
    [(1, 1, 1), (5, 17, 17), (9, 47, 16), (17, 512, 128), (7, 2090, 128), (11, 1100, 48), (4, 40, 64)],
)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 65])
def test_dense_products_of_8_bits(rng, m, n, k, scale_k, dtype):
    """The bits of a product by the float32 matrix, on every ISA."""
    x, bias = spaced(floats(rng, m, k)), floats(rng, n)
    elements = np.arange(-127, 128, dtype=np.int8) if dtype == np.int8 else ALL_FLOAT8
    w = spaced(rng.choice(elements, (n, k)))
    scales = spaced((rng.choice([-1, 1], (n, -(-k // scale_k))) * 2.0 ** rng.uniform(-20, 20)).astype(np.float32))
    matrix = w.astype(np.float32) * np.repeat(scales, scale_k, axis=1)[:, :k]
    out = run_all(lambda operations, y: operations.dense(y, x, w, bias, scales, scale_k), unset(m, n))
    assert_same_bits(out, run_all(lambda operations, y: operations.dense(y, x, matrix, bias), unset(m, n)))


def test_every_number_of_8_bits(rng):
    """Each E4M3 number times 1, and times the smallest and the largest scales."""
    x, w = np.eye(len(ALL_FLOAT8), dtype=np.float32), ALL_FLOAT8[None]
    for scale in (1.0, -(2.0**-126), 2.0**-149, 2.0**119):
        scales = np.full((1, 1), scale, np.float32)
        out = run_all(
            lambda operations, y, scales=scales: operations.dense(y, x, w, None, scales, w.size), unset(w.size, 1)
        )
        np.testing.assert_array_equal(out[:, 0], w[0].astype(np.float32) * scales[0])


def test_dense_writes_only_its_columns(rng):
    x, w = floats(rng, 5, 40), floats(rng, 6, 40)
    initial = np.full((5, 10), 7, np.float32)
    out = run_all(lambda operations, y: operations.dense(y[:, 2:8], x, w), initial)
    assert (out[:, :2] == 7).all()
    assert (out[:, 8:] == 7).all()
    assert_same_bits(
        np.ascontiguousarray(out[:, 2:8]), run_all(lambda operations, y: operations.dense(y, x, w), unset(5, 6))
    )


def test_dense_sums_in_the_order_of_the_contract(rng):
    """Exactly, in NumPy: products of small integers and powers of two are exact, so a fused step rounds once."""
    k = CHUNK_K + 40
    x = (rng.integers(-8, 8, (2, k)) * 2.0 ** rng.integers(-9, 9, (2, k))).astype(np.float32)
    w = (rng.integers(-8, 8, (3, k)) * 2.0 ** rng.integers(-9, 9, (3, k))).astype(np.float32)
    out = run_all(lambda operations, y: operations.dense(y, x, w), unset(2, 3))
    for r in range(2):
        for c in range(3):
            total = None
            for begin in range(0, k, CHUNK_K):
                products = (x[r] * w[c])[begin : begin + CHUNK_K]
                products = np.append(products, np.zeros(-len(products) % LANES, np.float32))
                lanes = np.zeros(LANES, np.float32)
                for step in products.reshape(-1, LANES):
                    lanes = lanes + step
                for width in (8, 4, 2, 1):
                    lanes = lanes[:width] + lanes[width:]
                total = lanes[0] if total is None else total + lanes[0]
            assert out[r, c] == total


# ---------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("dtype", DTYPES, ids=names(DTYPES))
@pytest.mark.parametrize("d", [1, 2, 15, 64, MAX_HEAD_DIM])
def test_store_keys(rng, d, dtype):
    """Keys are rounded as by ``narrow``; the other positions are neither read nor written."""
    k = floats(rng, d)
    k[0] = 1e-42 if d > 1 else k[0]
    page = np.full((d, KV_BLOCK), np.nan, dtype)
    for position in (0, 7, KV_BLOCK - 1):
        out = run_all(lambda operations, y, at=position: operations.store_keys(y, k, at), page)
        narrowed = run_all(lambda operations, y: operations.narrow(y, k), np.empty(d, dtype))
        assert_same_bits(np.ascontiguousarray(out[:, position]), narrowed)
        assert_same_bits(narrowed, k.astype(dtype))
        assert np.isnan(np.delete(out, position, axis=1).astype(np.float32)).all()
