"""Checks of arguments that all parts of the library share."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Collection
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["flag", "float_vector", "integer", "number", "one_of", "positive_argument", "sequence"]

T = TypeVar("T")

FLOAT_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))


def integer(name: str, value: Any) -> int:
    """``value`` as an int that fits int64.

    Raises
    ------
    TypeError
        ``value`` is not an integer; floats and bools are rejected even if integral.
    ValueError
        ``value`` does not fit int64, the type of sizes in the kernels.
    """
    if type(value) is int and -(1 << 63) <= value < 1 << 63:
        return value
    try:
        index = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        index = None
    if index is None:
        raise TypeError(f"{name}: got {value!r}, expected an int")
    if not -(1 << 63) <= index < 1 << 63:
        raise ValueError(f"{name}: got a number of {index.bit_length()} bits, expected one that fits int64")
    return index


def sequence(name: str, value: T) -> T:
    """``value``, which must have a length and be indexable."""
    if not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a sequence")
    return value


def flag(name: str, value: Any) -> bool:
    """``value``, which must be a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {value!r}, expected a bool")
    return bool(value)


def number(name: str, value: Any) -> float:
    """``value`` as a float that is finite in float32."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    magnitude: Any = abs(value)  # numbers.Real does not say that its values can be compared with a float
    if not magnitude <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name}: got {value!r}, expected a finite float32")
    return float(value)


def one_of(name: str, value: Any, known: Collection[str]) -> str:
    """``value``, which must be one of the strings ``known``."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
    return value


def float_vector(name: str, value: Any, length: int) -> npt.NDArray[np.float32]:
    """A read-only float32 copy of finite floats ``[length]``."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name}: got {type(value).__name__} ({error}), expected ({length},)") from None
    if array.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected float32, float16 or bfloat16")
    if array.shape != (length,):
        raise ValueError(f"{name}: got shape {array.shape}, expected ({length},)")
    with np.errstate(over="ignore", invalid="ignore"):  # the check below finds a signalling NaN
        vector = array.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(vector))
    if len(wrong):
        raise ValueError(f"{name}: got {array[wrong[0]]} at [{wrong[0]}], expected finite float32")
    vector.flags.writeable = False
    return vector


def positive_argument(text: str) -> int:
    """A whole number of at least 1, as the ``type`` of a command-line argument.

    Raises
    ------
    argparse.ArgumentTypeError
        ``text`` is not such a number.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        from argparse import ArgumentTypeError  # not needed to import the package

        raise ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return value
