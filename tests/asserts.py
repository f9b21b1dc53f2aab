"""Comparisons that cannot pass by accident, and outputs with guards that detect writes out of bounds."""

import numpy as np

from marlin_cy import reference
from marlin_cy.backends import BUILT_IN

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


# A sum of n rounding errors, each as likely up as down and at most u, exceeds LIKELY * sqrt(n) * u once in 10^7
# (Hoeffding's inequality; Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019).
LIKELY = 6


def product_bound(backend, x, w, out_dtype=np.float32):
    """How far a backend's ``x @ w`` may lie from the float64 product, ``[M, N]``.

    The CPU, and OpenCL's "subgroup" tier where it multiplies integers, quantise activations: see
    :func:`gemm_bound`. Otherwise products are summed in float32, in an order of the kernel's own: K
    roundings of at most the whole sum's magnitude, which act as independent ones. "mma" rounds activations
    and weights to float16 before, two more independent errors a product; and tensor cores cut off
    what float32 cannot hold, once for 16 rows of K, always towards zero.
    """
    if arithmetic_of(backend) == "planes":
        return gemm_bound(x, w, out_dtype)
    x, w = np.abs(np.asarray(x, np.float64)), np.abs(w)
    magnitude, k = x @ w, x.shape[1]
    off = (4 + min(k, LIKELY * k**0.5)) * unit_roundoff(np.float32) * magnitude
    if arithmetic_of(backend) == "float16":
        off += LIKELY * 2**0.5 * unit_roundoff(np.float16) * np.sqrt(x**2 @ w**2)
        off += k / 16 * 2 * unit_roundoff(np.float32) * magnitude
    return off + unit_roundoff(out_dtype) * (magnitude + off) + 2.0**-24


def arithmetic_of(backend):
    """The form of a backend's operands: "planes" (activations as 16-bit integers), "float32" or "float16"."""
    if backend.name == "cpu":
        return "planes"
    if backend.name not in BUILT_IN:
        return "float32"
    prepared_type = backend.tier.inputs(backend.runtime.capabilities).prepared_type
    return ("float32", "float16", "planes")[prepared_type]


def assert_agree(backend, actual, expected, bound):
    """Compare two ways to compute the same: equal bits on the CPU, and within ``bound`` on other backends."""
    if backend.name == "cpu":
        assert_same_bits(actual, expected)
    else:
        assert actual.dtype == expected.dtype
        assert_close(actual, expected, 2 * bound)


class GuardedArray:
    """An array carved out of a larger allocation, all of it filled with ``GUARD``.

    It is aligned to its dtype and not further.
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
        """The guards, and ``rows`` of the array (all by default), are unchanged."""
        self.assert_guards()
        body = self._body if rows is None else self._body.reshape(len(self.array), -1)[rows]
        assert (body == GUARD).all(), "written where nothing should be"


class GuardedBuffer:
    """A :class:`GuardedArray` as a backend's buffer, with its guards around it on the device, too.

    Attributes
    ----------
    buffer
        For the backend's calls.
    """

    def __init__(self, backend, shape, dtype):
        self._backend, self._host = backend, GuardedArray(shape, dtype)
        if isinstance(backend.empty((1,), dtype), np.ndarray):
            self._memory, self.buffer = None, self._host.array
            return
        from pyopencl.array import Array

        self._memory = backend.from_host(self._host._memory)
        self.buffer = Array(
            self._memory.queue,
            self._host.array.shape,
            self._host.array.dtype,
            data=self._memory.base_data,
            offset=len(self._host._outside[0]),
            events=self._memory.events,
        )

    def result(self):
        """The contents of the buffer, on the host; fails if anything outside it was written."""
        if self._memory is not None:
            self._host._memory[:] = self._backend.to_host(self._memory)
        self._host.assert_guards()
        return self._host.array

    def assert_untouched(self, rows=None):
        """As :meth:`GuardedArray.assert_untouched`."""
        self.result()
        self._host.assert_untouched(rows)
