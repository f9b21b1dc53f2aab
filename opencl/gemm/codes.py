"""The macros that define the weights of a ``gemm`` program: their code type and their scale record.

The files that use them are ``kernels/codes.cl`` and ``kernels/records.cl``.
"""

from marlin_cy.opencl.layout import stored_scales
from marlin_cy.weights.code_types import CODE_TYPES
from marlin_cy.weights.scale_records import SCALE_RECORDS

__all__ = ["SUPPORTED_CODES", "SUPPORTED_SCALES", "code_macros"]

SUPPORTED_CODES = ("uint4", "e2m1", "iq4_nl", "uint8")
"""The code types that ``kernels/codes.cl`` has."""

SUPPORTED_SCALES = tuple(SCALE_RECORDS)
"""The scale records that the packer accepts."""


def code_macros(codes: str, symmetric: bool, scales: str = "float16", group_shift: int = 7) -> dict[str, int]:
    """The macros for a code type and a scale record.

    Parameters
    ----------
    codes : str
        The name of a row of :data:`~marlin_cy.weights.code_types.CODE_TYPES`.
    symmetric : bool
        Every zero point is the one of symmetric quantisers, or the weights have no zero points.
    scales : str
        The name of a row of :data:`~marlin_cy.weights.scale_records.SCALE_RECORDS`.
    group_shift : int
        Binary logarithm of the rows in a packed group.
    """
    row, record = CODE_TYPES[codes], SCALE_RECORDS[stored_scales(scales)]
    return {
        f"CODES_{row.name.upper()}": 1,
        "CODE_BITS": row.bits,
        "HAS_ZERO_POINTS": int(row.has_zero_points),
        "SYMMETRIC": int(symmetric or not record.has_zero_points(row)),
        "SYMMETRIC_ZERO": record.constant_zero(row),
        "UNITS_PER_ONE": row.units_per_one,
        "SCALE_BITS": 8 * record.scale.itemsize,
        "MINIMA": int(record.has_minimum),
        "GROUP_16": int(group_shift == 4),
    }
