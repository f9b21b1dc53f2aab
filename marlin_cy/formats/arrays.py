"""Checks and conversions of stored tensors that several formats share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.code_types import CODE_TYPES
from marlin_cy.weights.scale_records import SCALE_RECORDS

__all__ = ["SCALES", "check_finite", "symmetric_zeros", "unpack_nibbles"]

SCALES: tuple[np.dtype[Any], ...] = tuple(SCALE_RECORDS[name].scale for name in ("float16", "bfloat16"))
"""The dtypes in which float scales may be stored."""

EXPONENT_BITS = {dtype: np.array(np.inf, dtype).view(f"u{dtype.itemsize}") for dtype in SCALES}
"""The bits of infinity: an exponent of all ones."""

SYMMETRIC_ZERO = CODE_TYPES["uint4"].symmetric_zero


def check_finite(name: str, scales: npt.NDArray[Any]) -> None:
    """Refuse scales, of a dtype of :data:`SCALES` and ``[a, b]``, that are not all finite, with a ``ValueError``."""
    # A number is finite unless its exponent is all ones. This test takes a quarter of the time of np.isfinite.
    exponent = EXPONENT_BITS[scales.dtype]
    bits = scales.view(exponent.dtype)
    if (bits & exponent).max() == exponent:
        a, b = np.argwhere((bits & exponent) == exponent)[0]
        raise ValueError(f"{name}: got {scales[a, b]} at [{a}, {b}], expected finite values")


def unpack_nibbles(words: npt.NDArray[Any], offset: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 ``[M, 8*N]`` from contiguous 32-bit words ``[M, N]``, low nibble first along N, plus ``offset``."""
    pairs = words.astype("<u4", copy=False).view(np.uint8)
    codes = np.empty((pairs.shape[0], 2 * pairs.shape[1]), np.uint8)
    np.bitwise_and(pairs, 15, out=codes[:, 0::2])
    np.right_shift(pairs, 4, out=codes[:, 1::2])
    codes += np.uint8(offset)
    return codes


def symmetric_zeros(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The zero points of a symmetric weight. All are 8: codes are integers from -8 to 7, stored with 8 added."""
    return np.full(shape, SYMMETRIC_ZERO, np.uint8)
