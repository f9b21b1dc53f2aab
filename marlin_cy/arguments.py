"""Checks of arguments that every part of the library makes alike."""

import numbers
import operator

import ml_dtypes
import numpy as np

__all__ = ["flag", "float_vector", "integer", "number", "one_of", "sequence"]

FLOAT_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))


def integer(name, value):
    """``value`` as an int that fits 64 bits with its sign.

    Raises
    ------
    TypeError
        Not an integer; a float or a bool is none, whatever its value.
    ValueError
        Too large for the 64-bit sizes that the kernels compute with.
    """
    if type(value) is int and -(1 << 63) <= value < 1 << 63:
        return value
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}: got {value!r}, expected an int")
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{name}: got a number of {number.bit_length()} bits, expected one of 64 with its sign")
    return number


def sequence(name, value):
    """``value``, if it has a length and entries."""
    if not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a sequence")
    return value


def flag(name, value):
    """``value`` as a bool; only a bool is one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {value!r}, expected a bool")
    return bool(value)


def number(name, value):
    """``value`` as a float that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    if not abs(value) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name}: got {value!r}, expected a finite float32")
    return float(value)


def one_of(name, value, known):
    """``value``, if it is one of the strings ``known``."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
    return value


def float_vector(name, value, length):
    """A read-only float32 copy of finite floats ``[length]``."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name}: got {type(value).__name__} ({error}), expected ({length},)") from None
    if array.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected float32, float16 or bfloat16")
    if array.shape != (length,):
        raise ValueError(f"{name}: got shape {array.shape}, expected ({length},)")
    with np.errstate(over="ignore", invalid="ignore"):  # a signalling NaN is found below
        vector = array.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(vector))
    if len(wrong):
        raise ValueError(f"{name}: got {array[wrong[0]]} at [{wrong[0]}], expected finite float32")
    vector.flags.writeable = False
    return vector
