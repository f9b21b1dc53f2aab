"""Checks and conversions of stored tensors that several formats share."""

import numpy as np

from marlin_cy.weights.int4 import SCALE_DTYPES

__all__ = ["WORDS", "as_array", "check_finite", "symmetric_zeros", "unpack_nibbles"]

WORDS = (np.dtype(np.int32), np.dtype(np.uint32))
"""What 32-bit words may be stored as."""

SYMMETRIC_ZERO = 8
EXPONENT_BITS = dict(zip(SCALE_DTYPES, (np.uint16(0x7C00), np.uint16(0x7F80)), strict=True))


def as_array(name, value, dtypes, shape):
    """``value`` as an aligned, contiguous ndarray, copied only where it is not one already.

    Parameters
    ----------
    name : str
        For messages.
    dtypes : sequence of dtype
        Any of these, in this machine's byte order.
    shape : tuple of int

    Raises
    ------
    TypeError, ValueError
        Not an array, or another dtype or shape.
    """
    expected = f"{' or '.join(dtype.name for dtype in dtypes)} {shape}"
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {type(value).__name__} ({error}), expected an array, {expected}") from error
    if not array.dtype.isnative:
        order = {"<": "little", ">": "big"}[array.dtype.byteorder]
        raise TypeError(f"{name}: got {order}-endian dtype {array.dtype.str}, expected native byte order, {expected}")
    if array.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {array.dtype.name}, expected {expected}")
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {array.dtype.name} {shape}")
    return np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED"))


def check_finite(name, scales):
    """Refuse scales, float16 or bfloat16 ``[a, b]``, that are not all finite, with a ValueError."""
    # They are finite unless their exponent is all ones. np.isfinite takes four times as long.
    exponent = EXPONENT_BITS[scales.dtype]
    if (scales.view(np.uint16) & exponent).max() == exponent:
        a, b = np.argwhere((scales.view(np.uint16) & exponent) == exponent)[0]
        raise ValueError(f"{name}: got {scales[a, b]} at [{a}, {b}], expected finite values")


def unpack_nibbles(words, offset=0):
    """uint8 ``[M, 8*N]`` from contiguous 32-bit words ``[M, N]``, low nibble first along N, plus ``offset``."""
    pairs = words.astype("<u4", copy=False).view(np.uint8)
    codes = np.empty((pairs.shape[0], 2 * pairs.shape[1]), np.uint8)
    np.bitwise_and(pairs, 15, out=codes[:, 0::2])
    np.right_shift(pairs, 4, out=codes[:, 1::2])
    codes += np.uint8(offset)
    return codes


def symmetric_zeros(shape):
    """The zero points of a symmetric weight, 8, whose codes are integers of -8 to 7 plus 8."""
    return np.full(shape, SYMMETRIC_ZERO, np.uint8)
