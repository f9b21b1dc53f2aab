"""GGUF's quantised types as canonical weights: one row each.

A stored row is a column of the canonical weight. Its values are cut into blocks, each with its own scale::

    Q4_0    32 values, 18 bytes: float16 d, 16 bytes of codes                     d * (q - 8)
    MXFP4   32 values, 17 bytes: exponent e, 16 bytes of codes                    2**(e - 127) * E2M1(q)

In both, the low nibble of byte ``i`` is code ``i``, and the high nibble code ``i + 16``. Source: ggml,
``ggml-common.h``, ``ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.gguf._blocks import words_of_nibbles
from marlin_cy.formats.arrays import check_finite, symmetric_zeros
from marlin_cy.formats.mxfp4 import scales_of_exponents
from marlin_cy.weights._nibbles import transpose
from marlin_cy.weights.int4 import Int4Weight

__all__ = ["BLOCK_TYPES", "BlockType"]

Bytes = npt.NDArray[np.uint8]
BLOCK = 32
NIBBLE_BYTES = BLOCK // 2


@dataclass(frozen=True)
class BlockType:
    """A quantised type.

    Attributes
    ----------
    name : str
        ggml's name.
    codes : str
        The name of the code type.
    group_size : int
        Number of values that share a scale.
    scale_dtype : dtype
    decode : callable
        ``decode(rows)`` is the weight of blocks uint8 ``[N, bytes of a row]``. A scale that is not finite is a
        ``ValueError``.
    """

    name: str
    codes: str
    group_size: int
    scale_dtype: np.dtype[Any]
    decode: Callable[[Bytes], Int4Weight]

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the symmetric one, or there are no zero points."""
        return True


def _q4_0(rows: Bytes) -> Int4Weight:
    scale = transpose(_headers(rows, NIBBLE_BYTES + 2, 2)).view(np.float16)
    check_finite("scales", scale)
    return Int4Weight(
        words=words_of_nibbles(rows, NIBBLE_BYTES + 2, 2),
        scale=scale,
        zero=symmetric_zeros(scale.shape),
        group_size=BLOCK,
    )


def _mxfp4(rows: Bytes) -> Int4Weight:
    return Int4Weight(
        words=words_of_nibbles(rows, NIBBLE_BYTES + 1, 1),
        scale=scales_of_exponents("scales", _headers(rows, NIBBLE_BYTES + 1, 1)),
        zero=None,
        group_size=BLOCK,
        codes="e2m1",
    )


def _headers(rows: Bytes, block_bytes: int, size: int) -> Any:
    """The first bytes of each block: an unsigned integer of ``size`` bytes, ``[N, blocks of a row]``."""
    first = rows.reshape(rows.shape[0], -1, block_bytes)[..., :size]
    return np.ascontiguousarray(first).view(f"<u{size}")[..., 0].astype(f"=u{size}", copy=False)


BLOCK_TYPES: Mapping[str, BlockType] = {
    row.name: row
    for row in (
        BlockType("Q4_0", "uint4", BLOCK, np.dtype(np.float16), _q4_0),
        BlockType("MXFP4", "e2m1", BLOCK, np.dtype(ml_dtypes.bfloat16), _mxfp4),
    )
}
"""The types that linear layers and experts may have, by ggml's name."""
