"""The code types of weights: one row each.

A weight element is ``scale * (value(code) - zero)``, or ``scale * value(code) - minimum``:
:mod:`marlin_cy.weights.scale_records` has the scales. Kernels do not multiply by ``value(code)`` itself. They multiply
by small unsigned integers, the *multiplicands*, and correct for the difference in the zero point and the scale::

    multiplicand(code) = units_per_one * value(code) + offset              an integer, 0 to 255
    weight             = scale / units_per_one * (multiplicand(code) - z)

where ``z`` is the group's zero point if the code type has zero points, and ``offset`` if it has none.

==========  =================================================================================================
code type   ``value(code)``
==========  =================================================================================================
"uint4"     the code itself, 0 to 15
"e2m1"      a 4-bit float: 0, 0.5, 1, 1.5, 2, 3, 4, 6 for 0 to 7, and their negatives for 8 to 15; no zero
            points
"iq4_nl"    an entry of a table of 16 integers from -127 to 113; no zero points
"uint8"     the code itself, 0 to 255
==========  =================================================================================================

To add a code type, add a row here and follow ``docs/adding-a-code-type.md``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CODE_TYPES", "CodeType", "code_type"]


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
    min_group : int
        The smallest supported group size.
    """

    name: str
    bits: int
    values: tuple[float, ...]
    has_zero_points: bool
    units_per_one: int
    offset: int
    symmetric_zero: int
    max_zero: int
    min_group: int = 32

    @property
    def codes_per_word(self) -> int:
        """Codes of a canonical word."""
        return 32 // self.bits

    @property
    def zero_dtype(self) -> np.dtype[Any]:
        """The dtype of zero points: the smallest that holds ``max_zero`` and ``symmetric_zero``."""
        return np.min_scalar_type(max(self.max_zero, self.symmetric_zero))

    @property
    def multiplicands(self) -> npt.NDArray[np.uint8]:
        """The unsigned integer that kernels multiply by, uint8 ``[2**bits]``."""
        return np.array([round(self.units_per_one * value) + self.offset for value in self.values], np.uint8)

    @property
    def decode_table(self) -> npt.NDArray[np.float32]:
        """The value of each code, float32 ``[2**bits]``."""
        return np.array(self.values, np.float32)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

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
            # Source: ggml, ggml-common.h, kvalues_iq4nl.
            CodeType(
                name="iq4_nl",
                bits=4,
                values=tuple(map(float, _IQ4_NL)),
                has_zero_points=False,
                units_per_one=1,
                offset=127,
                symmetric_zero=127,
                max_zero=0,
            ),
            # Groups of 16 are those of GGUF's Q6_K.
            CodeType(
                name="uint8",
                bits=8,
                values=tuple(map(float, range(256))),
                has_zero_points=True,
                units_per_one=1,
                offset=0,
                symmetric_zero=128,
                max_zero=256,
                min_group=16,
            ),
        )
    }
)
"""The code types by name."""


def code_type(name: object) -> CodeType:
    """The code type of this name; a ``ValueError`` if there is none."""
    if not isinstance(name, str) or name not in CODE_TYPES:
        raise ValueError(f"codes: got {name!r}, expected one of {', '.join(CODE_TYPES)}")
    return CODE_TYPES[name]
