"""Scale records and plain codes in canonical form, by the reference, against formulas written out here."""

import ml_dtypes
import numpy as np
import pytest
from asserts import assert_same_bits

from marlin_cy import reference
from marlin_cy.stacks.builder import check_weight, checked_stack_sizes
from marlin_cy.weights.canonical import CanonicalWeight, pack_words, unpack_words
from marlin_cy.weights.code_types import CODE_TYPES
from marlin_cy.weights.scale_records import SCALE_RECORDS, scale_record

K, N = 512, 24


def parts_of(rng, codes, scales, group):
    """Random parts of a weight, ``[G, N]`` and ``[B, N]``, by name."""
    row, record = CODE_TYPES[codes], SCALE_RECORDS[scales]
    parts = {}
    for name, dtype in record.group_parts(row).items():
        if name == "zero":
            parts[name] = rng.integers(0, row.max_zero + 1, (K // group, N)).astype(dtype)
        elif dtype.kind in "iu":
            low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
            parts[name] = rng.integers(low, high + 1, (K // group, N)).astype(dtype)
        else:
            parts[name] = rng.standard_normal((K // group, N)).astype(dtype)
    if not record.has_zero_points(row):
        parts.pop("zero", None)
    for name, dtype in record.block_parts().items():
        parts[name] = rng.standard_normal((K // 256, N)).astype(dtype)
    return parts


KINDS = [
    (codes, scales, group)
    for codes, row in CODE_TYPES.items()
    for scales, record in SCALE_RECORDS.items()
    for group in (row.min_group, 128)
    if row.has_zero_points or not record.has_minimum
]


@pytest.mark.sampled(30)
@pytest.mark.parametrize(("codes", "scales", "group"), KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_dequantised(rng, codes, scales, group, transposed):
    row = CODE_TYPES[codes]
    q = rng.integers(0, 2**row.bits, (K, N)).astype(np.uint8)
    parts = parts_of(rng, codes, scales, group)
    given = {name: np.ascontiguousarray(part.T) if transposed else part for name, part in parts.items()}
    weight = CanonicalWeight.from_codes(
        np.ascontiguousarray(q.T) if transposed else q, group_size=group, codes=codes, transposed=transposed, **given
    )
    check_weight(weight)
    assert (weight.k, weight.n, weight.scales) == (K, N, scales)
    np.testing.assert_array_equal(unpack_words(weight.words, row.bits), q)
    for name, part in parts.items():
        np.testing.assert_array_equal(getattr(weight, name), part)
    expected = np.empty((K, N))
    for k in range(K):
        p = {name: part[k // (256 if name.startswith("block") else group)] for name, part in parts.items()}
        p = {name: part.astype(np.float64) for name, part in p.items()}
        s, m = p["scale"] * p.get("block_scale", 1), p.get("minimum", np.zeros(N)) * p.get("block_minimum", 1)
        zero = p.get("zero", np.zeros(N) if "minimum" in p or not row.has_zero_points else row.symmetric_zero)
        expected[k] = s * (np.array(row.values)[q[k]] - zero) - m
    np.testing.assert_array_equal(reference.dequantize_weight(weight), expected)


@pytest.mark.sampled(30)
@pytest.mark.parametrize(("codes", "scales", "group"), KINDS)
@pytest.mark.parametrize(("compute_dtype", "bound"), [("int16", 1e-4), ("int8", 3e-2)])
def test_product(rng, codes, scales, group, compute_dtype, bound):
    """The bound is that of the activations' rounding, relative to the norms."""
    q = rng.integers(0, 2 ** CODE_TYPES[codes].bits, (K, N)).astype(np.uint8)
    weight = CanonicalWeight.from_codes(q, group_size=group, codes=codes, **parts_of(rng, codes, scales, group))
    x = rng.standard_normal((3, K)).astype(np.float32)
    w = reference.dequantize_weight(weight)
    result = reference.gemm_weight(x, weight, compute_dtype)
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=0)
    assert result.dtype == np.float32
    assert (np.abs(result - x.astype(np.float64) @ w) <= bound * norms).all()


def test_a_float_scale_of_another_dtype_gives_the_same_bits(rng):
    """float16 scales and the same numbers in float32."""
    q = rng.integers(0, 16, (K, N)).astype(np.uint8)
    parts = parts_of(rng, "uint4", "float16", 32)
    narrow = CanonicalWeight.from_codes(q, group_size=32, **parts)
    wide = CanonicalWeight.from_codes(q, group_size=32, **{**parts, "scale": parts["scale"].astype(np.float32)})
    x = rng.standard_normal((3, K)).astype(np.float32)
    assert_same_bits(reference.gemm_weight(x, wide), reference.gemm_weight(x, narrow))


@pytest.mark.parametrize("bits", [4, 8])
def test_words(rng, bits):
    q = rng.integers(0, 2**bits, (48, 5)).astype(np.uint8)
    words = pack_words(q, bits)
    assert words.shape == (48 * bits // 32, 5)
    np.testing.assert_array_equal(unpack_words(words, bits), q)
    assert words[0, 1] >> bits & (2**bits - 1) == q[1, 1]


@pytest.mark.parametrize("name", SCALE_RECORDS)
def test_records_by_name(name):
    assert scale_record(name).name == name


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_records_by_dtype(dtype):
    assert scale_record(dtype) == scale_record(np.dtype(dtype)) == SCALE_RECORDS[np.dtype(dtype).name]


@pytest.mark.parametrize(
    ("scales", "exception", "message"),
    [
        ("float8", ValueError, "scales: got 'float8', expected one of float16, bfloat16, float32, float16_min"),
        (np.float64, ValueError, "scales: got .*float64"),
        (3.5, TypeError, "scales: got 3.5 "),
    ],
)
def test_no_record(scales, exception, message):
    with pytest.raises(exception, match=message):
        scale_record(scales)


@pytest.mark.parametrize(
    ("q", "changes", "exception", "message"),
    [
        (np.zeros((32, 8), np.int8), {}, TypeError, "q: got int8, expected uint8"),
        ([[0] * 8] * 32, {}, TypeError, "q: got list, expected uint8"),
        (np.zeros(32, np.uint8), {"transposed": True}, ValueError, r"q: got shape \(32,\), expected \[N, K\]"),
        (np.zeros((12, 8), np.uint8), {}, ValueError, r"q: got shape \(12, 8\), expected \[K, N\] with K a multiple"),
        (np.full((32, 8), 16, np.uint8), {}, ValueError, "q: got 16, expected 0 to 15 with 'uint4' codes"),
        (np.zeros((32, 8), np.uint8), {"codes": "uint5"}, ValueError, "codes: got 'uint5'"),
    ],
)
def test_codes_that_are_refused(q, changes, exception, message):
    scale = np.ones((1, 8), np.float16)
    with pytest.raises(exception, match=message):
        CanonicalWeight.from_codes(q, scale, group_size=32, **changes)


@pytest.mark.parametrize(
    ("codes", "scales", "changes", "exception", "message"),
    [
        ("uint4", "float16", {"zero": None}, TypeError, "weight.zero: got NoneType, expected uint8"),
        ("uint8", "float16", {"zero": np.zeros((16, N), np.uint8)}, TypeError, "zero: got uint8, expected uint16"),
        (
            "uint8",
            "float16",
            {"zero": np.full((16, N), 257, np.uint16)},
            ValueError,
            "zero: got 257, expected 0 to 256",
        ),
        (
            "uint8",
            "two_level",
            {"zero": np.zeros((16, N), np.uint16)},
            TypeError,
            "weight.zero: got ndarray, expected N",
        ),
        ("iq4_nl", "float32", {"zero": np.zeros((16, N), np.uint8)}, TypeError, "weight.zero: got ndarray"),
        ("uint4", "float32_min", {"minimum": None}, TypeError, "weight.zero: got NoneType, expected uint8"),
        ("uint4", "two_level_min", {"block_minimum": None}, TypeError, "weight.scale: got uint8 with block_scale, min"),
        ("uint4", "two_level", {"block_scale": np.ones((1, N), np.float16)}, ValueError, r"block_scale: got shape \(1"),
        (
            "uint4",
            "float16_min",
            {"minimum": np.ones((16, N), np.float32)},
            TypeError,
            "minimum: got float32, expected",
        ),
    ],
)
def test_parts_that_are_refused(rng, codes, scales, changes, exception, message):
    q = rng.integers(0, 16, (K, N)).astype(np.uint8)
    parts = {**parts_of(rng, codes, scales, 32), **changes}
    weight = CanonicalWeight.from_codes(q, group_size=32, codes=codes, **parts)
    with pytest.raises(exception, match=message):
        check_weight(weight)


@pytest.mark.parametrize(
    ("k", "group_size", "g_idx", "codes", "scales", "message"),
    [
        (320, 32, None, "uint4", "two_level", "k: got 320, expected a multiple of 256 with 'two_level' scales"),
        (512, 256, None, "uint8", "two_level", "group_size: got 256, expected at most 128 with 'two_level' scales"),
        (512, 32, np.zeros(512, np.int32), "uint4", "two_level_min", "g_idx: got one, expected None"),
        (
            512,
            32,
            None,
            "e2m1",
            "float16_min",
            "scales: got 'float16_min', expected a record without minima",
        ),
    ],
)
def test_sizes_that_are_refused(k, group_size, g_idx, codes, scales, message):
    with pytest.raises(ValueError, match=message):
        checked_stack_sizes(2, k, N, group_size, g_idx, codes, scales)
