"""Checks of arrays that come from a caller or from a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["WORDS", "checked_array"]

WORDS: tuple[np.dtype[Any], ...] = (np.dtype(np.int32), np.dtype(np.uint32))
"""The dtypes in which 32-bit words may be stored."""


def checked_array(
    name: str, value: npt.ArrayLike, dtypes: Sequence[np.dtype[Any]], shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    """``value`` as an aligned, C-contiguous array. It is copied only if it is not one already.

    Parameters
    ----------
    name : str
        The argument's name, for messages.
    value : array-like
    dtypes : sequence of dtype
        The dtypes that are accepted, in native byte order.
    shape : tuple of int

    Raises
    ------
    TypeError
        ``value`` cannot be converted to an array, or has another dtype or byte order.
    ValueError
        ``value`` has another shape.
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
