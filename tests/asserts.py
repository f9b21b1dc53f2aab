"""Comparisons that cannot pass by accident, and outputs that notice what is written beside them."""

import numpy as np

from marlin_cy import reference

GUARD_BYTES = 512
GUARD = 0xC3  # as float32, float16 and bfloat16: finite, and no likely result


def assert_close(actual, expected, bound):
    """Every element of ``actual`` within ``bound`` (of the same shape) of ``expected``; a NaN never is."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    bound = np.broadcast_to(bound, actual.shape)
    assert np.isfinite(bound).all(), "a bound that bounds nothing"
    with np.errstate(invalid="ignore"):
        error = np.abs(actual - expected)
        wrong = np.argwhere(~(error <= bound))
    if len(wrong):
        at = tuple(map(int, wrong[0]))
        raise AssertionError(
            f"{len(wrong)} of {actual.size} elements beyond their bounds, the first at {list(at)}: got {actual[at]}, "
            f"expected {expected[at]} within {bound[at]}"
        )


def assert_same_bits(actual, expected):
    """Equal dtypes, shapes and bits; where one is NaN, the other is."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    word = f"u{actual.dtype.itemsize}"
    same = np.ascontiguousarray(actual).view(word) == np.ascontiguousarray(expected).view(word)
    if actual.dtype.kind not in "iu":
        same |= np.isnan(actual) & np.isnan(expected)
    wrong = np.argwhere(~same)
    if len(wrong):
        at = tuple(map(int, wrong[0]))
        raise AssertionError(
            f"{len(wrong)} of {actual.size} elements differ, the first at {list(at)}: got {actual[at]!r}, "
            f"expected {expected[at]!r}"
        )


def relative_error(actual, expected):
    """Frobenius norm of the difference over that of ``expected``, which is float64."""
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def unit_roundoff(dtype):
    """Relative error of rounding to a floating-point type: half the gap after 1."""
    return 2.0 ** {"float32": -24, "float16": -11, "bfloat16": -8, "float64": -53}[np.dtype(dtype).name]


def gemm_bound(x, w, out_dtype=np.float32, compute_dtype="int16"):
    """How far ``x @ w`` may lie from the float64 product, ``[M, N]``.

    Each activation is off by at most half a step of its group's grid, ``amax / qmax / 2`` (and by the
    rounding of two float32 operations, less than a fiftieth of that); sums in float32 add one roundoff
    for each group at most, and there are no more than ``K / 32`` groups; then the output is rounded.
    """
    x, w = np.abs(np.asarray(x, np.float64)), np.abs(w)
    step = x.max(axis=1, keepdims=True, initial=0) / reference.QMAX[compute_dtype]
    quantisation = 0.51 * step * w.sum(axis=0)
    magnitude = x @ w
    sums = (4 + x.shape[1] / 32) * unit_roundoff(np.float32) * magnitude
    return quantisation + sums + unit_roundoff(out_dtype) * (magnitude + quantisation) + 2.0**-24


class GuardedArray:
    """An array carved out of a larger allocation, all of it filled with ``GUARD``.

    It is aligned to its dtype and to nothing more.
    """

    def __init__(self, shape, dtype):
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        begin = GUARD_BYTES + dtype.itemsize
        self._memory = np.full(begin + nbytes + GUARD_BYTES, GUARD, np.uint8)
        self._body = self._memory[begin : begin + nbytes]
        self._outside = self._memory[:begin], self._memory[begin + nbytes :]
        self.array = self._body.view(dtype).reshape(shape)

    def assert_guards(self):
        """Nothing outside the array was written."""
        for outside in self._outside:
            assert (outside == GUARD).all(), "written outside the array"

    def assert_untouched(self, rows=None):
        """The guards, and ``rows`` of the array (all unless given), are as they were made."""
        self.assert_guards()
        body = self._body if rows is None else self._body.reshape(len(self.array), -1)[rows]
        assert (body == GUARD).all(), "written where nothing should be"
