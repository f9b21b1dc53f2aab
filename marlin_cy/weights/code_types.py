"""The code types and the scale types of weights: one row each.

A weight element is ``scale * (value(code) - zero)``. Kernels do not multiply by ``value(code)`` itself. They multiply
by small unsigned integers, the *multiplicands*, and correct for the difference in the zero point and the scale::

    multiplicand(code) = units_per_one * value(code) + offset              an integer, 0 to 24
    weight             = scale / units_per_one * (multiplicand(code) - z)

where ``z`` is the group's zero point if the code type has zero points, and ``offset`` if it has none.

To add a code type, add a row here and follow ``docs/adding-a-code-type.md``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = [
    "CODE_TYPES",
    "SCALE_TYPES",
    "CodeType",
    "ScaleType",
    "code_type",
    "scale_type",
]


@dataclass(frozen=True)
class CodeType:
    """The meaning of a weight's codes.

    Attributes
    ----------
    name : str
        The name in interfaces, in packed folders and in ``cpu/ukernels/code_types.h``. In upper case it is part of the
        macro that selects the code type in ``opencl/kernels/codes.cl``.
    bits : int
        Bits per code.
    values : tuple of float
        The value of each code, ``2**bits`` of them.
    has_zero_points : bool
        Whether each group has a zero point.
    units_per_one : int
        The factor that makes every value an integer.
    offset : int
        Added to these integers so that none is negative. 0 if the code type has zero points.
    symmetric_zero : int
        The zero point, in multiplicands, for which kernels have a cheaper form: the one that symmetric
        quantisers store, or ``offset`` if there are no zero points.
    max_zero : int
        The largest zero point; 0 if there are none.
    """

    name: str
    bits: int
    values: tuple[float, ...]
    has_zero_points: bool
    units_per_one: int
    offset: int
    symmetric_zero: int
    max_zero: int

    @property
    def multiplicands(self) -> npt.NDArray[np.uint8]:
        """The unsigned integer that kernels multiply by, uint8 ``[2**bits]``."""
        return np.array([round(self.units_per_one * value) + self.offset for value in self.values], np.uint8)

    @property
    def decode_table(self) -> npt.NDArray[np.float32]:
        """The value of each code, float32 ``[2**bits]``."""
        return np.array(self.values, np.float32)


@dataclass(frozen=True)
class ScaleType:
    """A dtype in which scales are stored.

    Attributes
    ----------
    name : str
        NumPy's name of the dtype.
    number : int
        The number in kernels: ``DTYPE_*`` in ``cpu/ukernels/ukernel.h``.
    dtype : dtype
    """

    name: str
    number: int
    dtype: np.dtype[Any]


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

CODE_TYPES: Mapping[str, CodeType] = MappingProxyType(
    {
        row.name: row
        for row in (
            CodeType(
                name="uint4",
                bits=4,
                values=tuple(map(float, range(16))),
                has_zero_points=True,
                units_per_one=1,
                offset=0,
                symmetric_zero=8,
                max_zero=16,
            ),
            # Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3.
            CodeType(
                name="e2m1",
                bits=4,
                values=_E2M1 + tuple(-value for value in _E2M1),
                has_zero_points=False,
                units_per_one=2,
                offset=12,
                symmetric_zero=12,
                max_zero=0,
            ),
        )
    }
)
"""The code types by name."""

SCALE_TYPES: Mapping[str, ScaleType] = MappingProxyType(
    {
        row.name: row
        for row in (
            ScaleType(name="float16", number=1, dtype=np.dtype(np.float16)),
            # Represents every scale of MXFP4, the powers of two from 2**-127 to 2**127.
            ScaleType(name="bfloat16", number=2, dtype=np.dtype(ml_dtypes.bfloat16)),
        )
    }
)
"""The scale types by name."""


def code_type(name: object) -> CodeType:
    """The code type of this name; a ``ValueError`` if there is none."""
    if not isinstance(name, str) or name not in CODE_TYPES:
        raise ValueError(f"codes: got {name!r}, expected one of {', '.join(CODE_TYPES)}")
    return CODE_TYPES[name]


def scale_type(dtype: npt.DTypeLike) -> ScaleType:
    """The scale type of a dtype.

    Raises
    ------
    TypeError
        ``dtype`` is not a dtype.
    ValueError
        Scales cannot be stored in this dtype.
    """
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"scale_dtype: got {dtype!r} ({error}), expected {' or '.join(SCALE_TYPES)}") from None
    for row in SCALE_TYPES.values():
        if row.dtype == found:
            return row
    raise ValueError(f"scale_dtype: got {found}, expected {' or '.join(SCALE_TYPES)}")
