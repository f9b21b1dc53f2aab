"""The scale records of weights: one row each.

A scale record says what a group of rows of K stores beside its codes, for each column, and how that becomes a float32
scale ``s`` and a float32 minimum ``m``::

    weight = s * (value(code) - zero) - m

=================  =================================================================  ==========================
record             stored                                                             ``s``, ``zero`` and ``m``
=================  =================================================================  ==========================
"float16",         a scale of that dtype; a zero point if the code type has zero      as stored; ``m = 0``
"bfloat16",        points
"float32"
"float16_min",     a scale and a minimum, both of that dtype                          as stored; ``zero = 0``
"float32_min"
"two_level"        an int8 sub-scale; a float16 block scale ``d`` for every 256 rows  ``s = d * sub-scale``, ``m = 0``,
                                                                                      the symmetric zero point
"two_level_min"    a uint8 sub-scale and a uint8 sub-minimum; a float16 ``d`` and a   ``s = d * sub-scale``,
                   float16 ``dmin`` for every 256 rows                                ``m = dmin * sub-minimum``,
                                                                                      ``zero = 0``
=================  =================================================================  ==========================

The products ``d * sub-scale`` and ``dmin * sub-minimum`` are exact in float32: 11 bits times 8 bits. The two-level
records are those of GGUF's K-quants. Source: ggml, ``ggml-common.h``, ``block_q4_K`` and ``block_q6_K``.

Packed tiles store a record as drawn in :mod:`marlin_cy.weights.packed_tiles`. To add a record, add a row here, and the
row of the same name in ``cpu/ukernels/scale_records.h``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from marlin_cy.weights.code_types import CodeType

__all__ = ["BLOCK_ROWS", "SCALE_RECORDS", "ScaleRecord", "scale_record"]

BLOCK_ROWS = 256
"""Rows of K that share the block scale of a two-level record."""

FLOAT16: np.dtype[Any] = np.dtype(np.float16)
BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
FLOAT32: np.dtype[Any] = np.dtype(np.float32)
INT8: np.dtype[Any] = np.dtype(np.int8)
UINT8: np.dtype[Any] = np.dtype(np.uint8)


@dataclass(frozen=True)
class ScaleRecord:
    """What a group stores beside its codes.

    Attributes
    ----------
    name : str
        The name in interfaces, in packed folders and in ``cpu/ukernels/scale_records.h``.
    scale : dtype
        Of a group's scale, or of its sub-scale.
    has_minimum : bool
        Whether a group has a minimum, or a sub-minimum, instead of a zero point. It has the scale's dtype.
    block : dtype or None
        Of the block scales, and of the block minima if there are minima; None for a record of one level.
    """

    name: str
    scale: np.dtype[Any]
    has_minimum: bool = False
    block: np.dtype[Any] | None = None

    @property
    def has_blocks(self) -> bool:
        """Whether the record has two levels."""
        return self.block is not None

    def has_zero_points(self, codes: CodeType) -> bool:
        """Whether weights of this code type have zero points. Without them, :meth:`constant_zero` is the zero point."""
        return codes.has_zero_points and not self.has_minimum and not self.has_blocks

    def constant_zero(self, codes: CodeType) -> int:
        """The zero point, in multiplicands, of every group of a weight that has no zero points."""
        return 0 if self.has_minimum else codes.symmetric_zero

    def group_parts(self, codes: CodeType) -> dict[str, np.dtype[Any]]:
        """The values that a group stores for each column, in the order of a packed tile: dtypes by name.

        The names are attributes of :class:`~marlin_cy.weights.canonical.CanonicalWeight`. A record of one level without
        minima always stores zero points in a packed tile, those of :meth:`constant_zero` if the weight has none.
        """
        parts = {"scale": self.scale}
        if self.has_minimum:
            parts["minimum"] = self.scale
        elif not self.has_blocks:
            parts["zero"] = codes.zero_dtype
        return parts

    def block_parts(self) -> dict[str, np.dtype[Any]]:
        """The values that a block of 256 rows stores for each column, as in :meth:`group_parts`."""
        if self.block is None:
            return {}
        return dict.fromkeys(("block_scale", "block_minimum")[: 1 + self.has_minimum], self.block)


SCALE_RECORDS: Mapping[str, ScaleRecord] = MappingProxyType(
    {
        row.name: row
        for row in (
            ScaleRecord("float16", FLOAT16),
            # Represents every scale of MXFP4, the powers of two from 2**-127 to 2**127.
            ScaleRecord("bfloat16", BFLOAT16),
            ScaleRecord("float32", FLOAT32),
            ScaleRecord("float16_min", FLOAT16, has_minimum=True),
            ScaleRecord("float32_min", FLOAT32, has_minimum=True),
            ScaleRecord("two_level", INT8, block=FLOAT16),
            ScaleRecord("two_level_min", UINT8, has_minimum=True, block=FLOAT16),
        )
    }
)
"""The scale records by name. A record of a float scale and a zero point has the name of the scale's dtype."""


def scale_record(scales: str | npt.DTypeLike) -> ScaleRecord:
    """The scale record of this name.

    Parameters
    ----------
    scales : str or dtype
        The name of a record, or a dtype: the record of scales of this dtype with zero points.

    Raises
    ------
    TypeError
        ``scales`` is neither a string nor a dtype.
    ValueError
        There is no such record.
    """
    name = scales
    if not isinstance(name, str):
        try:
            name = np.dtype(scales).name
        except TypeError as error:
            raise TypeError(f"scales: got {scales!r} ({error}), expected one of {', '.join(SCALE_RECORDS)}") from None
    if name not in SCALE_RECORDS:
        raise ValueError(f"scales: got {scales!r}, expected one of {', '.join(SCALE_RECORDS)}")
    return SCALE_RECORDS[name]
