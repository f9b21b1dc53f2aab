"""The asserters fail when they should."""

import ml_dtypes
import numpy as np
import pytest
from asserts import GuardedArray, assert_close, assert_same_bits, gemm_bound, relative_error


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def test_close_accepts():
    assert_close(X, X.astype(np.float64) + 0.5e-3, 1e-3)
    assert_close(np.empty((0, 4)), np.empty((0, 4)), 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0])
def test_close_refuses(value):
    wrong = changed(X, (1, 2), value)
    for actual, expected in ((wrong, X), (X, wrong)):
        with pytest.raises(AssertionError, match=r"1 of 12 elements .* \[1, 2\]"):
            assert_close(actual, expected, 1e-3)


def test_close_refuses_nan_on_both_sides():
    wrong = changed(X, (1, 2), np.nan)
    with pytest.raises(AssertionError):
        assert_close(wrong, wrong, 1e-3)


@pytest.mark.parametrize("bound", [np.nan, np.inf])
def test_close_refuses_a_bound_that_bounds_nothing(bound):
    with pytest.raises(AssertionError, match="bounds nothing"):
        assert_close(X, X, bound)


def test_close_refuses_another_shape():
    with pytest.raises(AssertionError):
        assert_close(X, X[:1], 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32])
def test_same_bits(dtype):
    x = X.astype(dtype)
    assert_same_bits(x, x.copy())
    with pytest.raises(AssertionError, match=r"1 of 12 elements .* \[2, 0\]"):
        assert_same_bits(x, changed(x, (2, 0), 7))
    with pytest.raises(AssertionError):
        assert_same_bits(x, x.reshape(4, 3))
    with pytest.raises(AssertionError):
        assert_same_bits(x, x.astype(np.float64))


def test_same_bits_of_nan_and_zero():
    nan = changed(X, (0, 0), np.nan)
    assert_same_bits(nan, changed(nan, (0, 0), -np.float32(np.nan)))
    for actual, expected in ((nan, X), (X, nan), (changed(X, 0, 0.0), changed(X, 0, -0.0))):
        with pytest.raises(AssertionError):
            assert_same_bits(actual, expected)


def test_relative_error():
    expected = np.full((4, 4), 2.0)
    assert relative_error(expected * 1.01, expected) == pytest.approx(0.01)
    assert np.isnan(relative_error(changed(expected, (0, 0), np.nan), expected))


@pytest.mark.parametrize("compute_dtype", ["int16", "int8"])
def test_bound_is_neither_loose_nor_tight(compute_dtype):
    """Rounding all activations down by half a step stays within it; by five steps does not."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 64)), rng.standard_normal((64, 5))
    bound = gemm_bound(x, w, compute_dtype=compute_dtype)
    step = np.abs(x).max(axis=1, keepdims=True) / {"int16": 32639, "int8": 127}[compute_dtype]
    assert_close((x - step / 2) @ w, x @ w, bound)
    with pytest.raises(AssertionError):
        assert_close((x - 5 * step * np.sign(w[:, 0])) @ w, x @ w, bound)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_guards(dtype):
    guarded = GuardedArray((3, 5), dtype)
    assert guarded.array.flags.aligned
    assert np.isfinite(guarded.array.astype(np.float32)).all()
    guarded.assert_untouched()
    guarded.array[1] = 0
    guarded.assert_guards()
    guarded.assert_untouched(rows=[0, 2])
    with pytest.raises(AssertionError, match="where nothing should be"):
        guarded.assert_untouched()
    for outside in guarded._outside:
        for at in (0, -1):
            outside[at] += 1
            with pytest.raises(AssertionError, match="outside"):
                guarded.assert_guards()
            outside[at] -= 1
