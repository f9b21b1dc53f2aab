"""The macros that define the code type of a ``gemm`` program (``kernels/codes.cl``)."""

from marlin_cy.weights.code_types import CODE_TYPES

__all__ = ["SUPPORTED_CODES", "SUPPORTED_SCALES", "code_macros"]

SUPPORTED_CODES = ("uint4", "e2m1")
"""The code types that ``kernels/codes.cl`` has."""

SUPPORTED_SCALES = ("float16", "bfloat16")
"""The scale records that the packer accepts. It stores float16 scales in either case."""


def code_macros(codes: str, symmetric: bool) -> dict[str, int]:
    """The macros for a code type.

    Parameters
    ----------
    codes : str
        The name of a row of :data:`~marlin_cy.weights.code_types.CODE_TYPES`.
    symmetric : bool
        Every zero point is the row's ``symmetric_zero``, or the code type has no zero points.
    """
    row = CODE_TYPES[codes]
    return {
        f"CODES_{row.name.upper()}": 1,
        "HAS_ZERO_POINTS": int(row.has_zero_points),
        "SYMMETRIC": int(symmetric or not row.has_zero_points),
        "SYMMETRIC_ZERO": row.symmetric_zero,
        "UNITS_PER_ONE": row.units_per_one,
    }
