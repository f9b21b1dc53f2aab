"""Checks of arguments that every part of the library makes alike."""

import operator

__all__ = ["integer", "sequence"]


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
