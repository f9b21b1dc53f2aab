"""GGUF's quantised types as canonical weights: one row each.

A stored row is a column of the canonical weight, and is cut into blocks:

=======  ======  =====  ============================================================  ==================================
type     values  bytes  stored                                                        a value
=======  ======  =====  ============================================================  ==================================
Q4_0     32      18     float16 d, 16 bytes of codes                                  ``d * (q - 8)``
Q4_1     32      20     float16 d, float16 m, 16 bytes of codes                       ``d * q + m``
Q5_0     32      22     float16 d, 4 bytes of high bits, 16 of codes                  ``d * (q - 16)``
Q5_1     32      24     float16 d, float16 m, 4 bytes of high bits, 16 of codes       ``d * q + m``
Q8_0     32      34     float16 d, 32 int8 codes                                      ``d * q``
IQ4_NL   32      18     as Q4_0                                                       ``d * table[q]``
MXFP4    32      17     exponent e, 16 bytes of codes                                 ``2**(e - 127) * E2M1(q)``
Q4_K     256     144    float16 d and dmin, 8 pairs of 6-bit sc and mc, codes         ``(d * sc) * q - (dmin * mc)``
Q5_K     256     176    as Q4_K, with 32 bytes of high bits before the codes          ``(d * sc) * q - (dmin * mc)``
Q6_K     256     210    128 bytes of low nibbles, 64 of high bits, 16 int8 sc, d      ``(d * sc) * (q - 32)``
IQ4_XS   256     136    float16 d, 8 sc of 6 bits, codes                              ``(d * (sc - 32)) * table[q]``
=======  ======  =====  ============================================================  ==================================

In blocks of 32, the low nibble of byte ``i`` is code ``i``, and the high nibble is code ``i + 16``. ``_blocks.pyx`` has
the order in blocks of 256. Source: ggml, ``ggml-common.h``, ``ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.gguf._blocks import BLOCK_KINDS, decode_blocks, dequantise_blocks, pack_blocks
from marlin_cy.formats.arrays import check_finite
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.code_types import code_type
from marlin_cy.weights.scale_records import ScaleRecord, scale_record
from marlin_cy.weights.stored import StoredWeight
from marlin_cy.weights.tile_layout import TileLayout

__all__ = ["BLOCK_TYPES", "BlockType", "StoredBlocks", "one_level"]

Bytes: TypeAlias = npt.NDArray[np.uint8]
Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class BlockType:
    """A quantised type.

    Attributes
    ----------
    name, number : str, int
        ggml's.
    block, nbytes : int
        Values that are stored together, and their bytes.
    codes : str
        The name of the code type.
    scales : str
        The name of the scale record.
    group_size : int
        Number of values that share a scale.
    zero : int or None
        The zero point of all groups; None if the record has none of its own.
    """

    name: str
    number: int
    block: int
    nbytes: int
    codes: str
    scales: str
    group_size: int
    zero: int | None = None

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the symmetric one, or there are no zero points and no minima."""
        return not self.record.has_minimum and self.zero in (None, code_type(self.codes).symmetric_zero)

    @cached_property
    def record(self) -> ScaleRecord:
        """The scale record."""
        return scale_record(self.scales)

    def arrays(self, k: int, n: int) -> dict[str, npt.NDArray[Any]]:
        """Arrays for a weight ``[k, n]``, to be filled by :meth:`decode`."""
        groups, record = k // self.group_size, self.record
        arrays: dict[str, npt.NDArray[Any]] = {
            "words": np.empty((k // code_type(self.codes).codes_per_word, n), np.uint32),
            "scale": np.empty((groups, n), record.scale),
        }
        if record.has_minimum:
            arrays["minimum"] = np.empty((groups, n), record.scale)
        for name, dtype in record.block_parts().items():
            arrays[name] = np.empty((k // self.block, n), dtype)
        return arrays

    def decode(self, rows: Bytes, arrays: Arrays) -> CanonicalWeight:
        """The weight of stored rows.

        Parameters
        ----------
        rows : uint8 ``[n, bytes of a row]``
            C-contiguous.
        arrays : mapping
            From :meth:`arrays`. The weight consists of them.

        Raises
        ------
        ValueError
            A scale is not finite.
        """
        block_parts = ("block_scale", "block_minimum") if self.record.has_blocks else ("scale", "minimum")
        words = [arrays[name].view(np.uint16) if name in arrays else None for name in block_parts]
        scale, minimum = words
        assert scale is not None
        subs: list[Bytes | None] = [None, None]
        if self.record.has_blocks:
            subs = [arrays[name].view(np.uint8) if name in arrays else None for name in ("scale", "minimum")]
        decode_blocks(BLOCK_KINDS.index(self.name), rows, arrays["words"], scale, minimum, *subs)
        for name in block_parts:
            if name in arrays:
                check_finite(name, arrays[name])
        zero = None if self.zero is None else _zeros(arrays["scale"].shape, self.zero, self.codes)
        return CanonicalWeight(**arrays, zero=zero, group_size=self.group_size, codes=self.codes)

    def values(self, rows: Bytes) -> npt.NDArray[np.float32]:
        """The values of stored rows, float32 ``[n, k]``, to the last bit those of the package ``gguf``."""
        k = rows.shape[1] // self.nbytes * self.block
        values = np.empty((rows.shape[0], k), np.float32)
        dequantise_blocks(BLOCK_KINDS.index(self.name), rows, values)
        return values

    def in_common(self, other: BlockType) -> BlockType | None:
        """A form that columns of both types can have in one stack, exactly; None if there is none."""
        if self.forms == other.forms:
            return self
        if not {self.codes, other.codes} <= {NARROW, WIDE}:
            return None
        if self.forms[1:] == other.forms[1:]:
            return self if self.codes == WIDE else other
        return GENERAL

    @property
    def forms(self) -> tuple[str, str, int]:
        """What the columns of a stack share."""
        return self.codes, self.scales, self.group_size

    def converted(self, weight: CanonicalWeight) -> CanonicalWeight:
        """A weight of another type in this form, which :meth:`in_common` gave."""
        if weight.codes != self.codes:
            weight = widened(weight)
        return weight if weight.scales == self.scales else general(weight)


class StoredBlocks(StoredWeight):
    """Stored rows as the columns of a weight.

    Parameters
    ----------
    kind : BlockType
    rows : uint8 ``[n, bytes of a row]``
        C-contiguous.
    arrays : callable, optional
        ``arrays(kind, k, n)`` gives the arrays of the canonical form. By default they are new.
    """

    def __init__(self, kind: BlockType, rows: Bytes, arrays: Callable[[BlockType, int, int], Arrays] | None = None):
        self._kind, self._rows, self._arrays = kind, rows, arrays or BlockType.arrays
        self.n, self.k = len(rows), rows.shape[1] // kind.nbytes * kind.block
        self.codes, self.scales, self.group_size = kind.forms

    def part(self, begin: int, n: int) -> StoredBlocks:
        """At most ``n`` columns, from the column ``begin`` on."""
        return StoredBlocks(self._kind, self._rows[begin : begin + n], self._arrays)

    def canonical(self) -> CanonicalWeight:
        return self._kind.decode(self._rows, self._arrays(self._kind, self.k, self.n))

    def write_tiles(self, expert: Bytes, column: int, layout: TileLayout) -> None:
        kind, parts = self._kind, ["scale", "minimum"]
        own = [*kind.record.block_parts(), *kind.record.group_parts(code_type(kind.codes))]
        names = ["block_scale", "block_minimum", *parts] if kind.record.has_blocks else [*parts, "", ""]
        places = [layout.part_places(name)[0] if name in own else None for name in [*names, "zero"]]
        if not pack_blocks(BLOCK_KINDS.index(kind.name), self._rows, expert, column, layout, places):
            self.canonical()  # names the scale
            raise AssertionError(f"{kind.name}: a scale is not finite")


NARROW, WIDE = "uint4", "uint8"
NIBBLES_OF_BYTES = np.uint32(0x0F0F0F0F)

GENERAL = BlockType("", -1, 16, 0, WIDE, "float32_min", 16)
"""A form for all types whose codes are integers."""


def widened(weight: CanonicalWeight) -> CanonicalWeight:
    """A weight with codes of 8 bits in place of 4."""
    nibbles = np.stack([weight.words >> np.uint32(shift) & NIBBLES_OF_BYTES for shift in (0, 4)], axis=1)
    # Bytes of the two arrays alternate: codes 0, 2, 4, 6 and 1, 3, 5, 7 of a word.
    pairs = nibbles.view(np.uint8).reshape(*nibbles.shape, 4).transpose(0, 3, 1, 2)
    codes = np.ascontiguousarray(pairs.reshape(-1, 2, 4, weight.n).transpose(0, 1, 3, 2))
    words = codes.view("<u4")[..., 0].reshape(-1, weight.n).astype(np.uint32, copy=False)
    zero = None if weight.zero is None else weight.zero.astype(code_type(WIDE).zero_dtype)
    return replace(weight, words=words, zero=zero, codes=WIDE)


def general(weight: CanonicalWeight) -> CanonicalWeight:
    """A weight with 8-bit codes in the form :data:`GENERAL`.

    Zero points become minima. They are powers of two in all types, so that the product with a scale is exact.
    """
    flat = one_level(weight)
    scale = flat.scale.astype(np.float32)
    if flat.minimum is not None:
        minimum = flat.minimum.astype(np.float32)
    else:
        assert flat.zero is not None
        minimum = scale * flat.zero.astype(np.float32)
    times = flat.group_size // GENERAL.group_size
    return replace(
        flat,
        scale=np.repeat(scale, times, axis=0),
        minimum=np.repeat(minimum, times, axis=0),
        zero=None,
        group_size=GENERAL.group_size,
    )


def one_level(weight: CanonicalWeight) -> CanonicalWeight:
    """A weight with float32 scales and minima in place of two levels; the products are exact."""
    if weight.block_scale is None:
        return weight
    row, groups = code_type(weight.codes), weight.scale.shape[0] // weight.block_scale.shape[0]

    def product(block: npt.NDArray[np.float16], sub: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        return np.repeat(block.astype(np.float32), groups, axis=0) * sub.astype(np.float32)

    minimum = zero = None
    if weight.block_minimum is not None and weight.minimum is not None:
        minimum = product(weight.block_minimum, weight.minimum)
    elif row.has_zero_points:
        zero = np.full(weight.scale.shape, row.symmetric_zero, row.zero_dtype)
    return replace(
        weight,
        scale=product(weight.block_scale, weight.scale),
        minimum=minimum,
        zero=zero,
        block_scale=None,
        block_minimum=None,
    )


@lru_cache(maxsize=8)
def _zeros(shape: tuple[int, int], zero: int, codes: str) -> npt.NDArray[Any]:
    """Zero points that all weights of a shape share: read-only."""
    zeros = np.full(shape, zero, code_type(codes).zero_dtype)
    zeros.flags.writeable = False
    return zeros


BLOCK_TYPES: Mapping[str, BlockType] = {
    row.name: row
    for row in (
        BlockType("Q4_0", 2, 32, 18, "uint4", "float16", 32, zero=8),
        BlockType("Q4_1", 3, 32, 20, "uint4", "float16_min", 32),
        BlockType("Q5_0", 6, 32, 22, "uint8", "float16", 32, zero=16),
        BlockType("Q5_1", 7, 32, 24, "uint8", "float16_min", 32),
        BlockType("Q8_0", 8, 32, 34, "uint8", "float16", 32, zero=128),
        BlockType("IQ4_NL", 20, 32, 18, "iq4_nl", "float16", 32),
        BlockType("MXFP4", 39, 32, 17, "e2m1", "bfloat16", 32),
        BlockType("Q4_K", 12, 256, 144, "uint4", "two_level_min", 32),
        BlockType("Q5_K", 13, 256, 176, "uint8", "two_level_min", 32),
        BlockType("Q6_K", 14, 256, 210, "uint8", "two_level", 16),
        BlockType("IQ4_XS", 23, 256, 136, "iq4_nl", "two_level", 32),
    )
}
"""The types that linear layers and experts may have, by ggml's name."""
