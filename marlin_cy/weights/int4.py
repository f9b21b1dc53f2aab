"""The one form that every checkpoint format is brought to before a backend packs it.

A weight is a matrix ``w[k, n] = scale[g, n] * (value(q[k, n]) - zero[g, n])`` with ``g = g_idx[k]``,
or ``g = k // group_size`` when there is no ``g_idx``. What a 4-bit code ``q`` stands for:

=========  ==========================================================================================
``codes``  ``value(q)``
=========  ==========================================================================================
"uint4"    the code itself, 0 to 15
"e2m1"     a 4-bit float: 0, 0.5, 1, 1.5, 2, 3, 4, 6 for 0 to 7, and their negatives for 8 to 15; there
           are no zero points. Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3
=========  ==========================================================================================

The codes stay packed: eight values of K to a 32-bit word, as GPTQ checkpoints already have them, so
bringing one of those here copies nothing but its zero points.
"""

from dataclasses import dataclass

import numpy as np

from marlin_cy.weights.code_types import CODE_TYPES, SCALE_TYPES

__all__ = ["CODES", "E2M1_VALUES", "SCALE_DTYPES", "Int4Weight", "pack_words", "unpack_words"]

NIBBLE_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)

CODES = tuple(CODE_TYPES)
"""What 4-bit codes may stand for."""

SCALE_DTYPES = tuple(row.dtype for row in SCALE_TYPES.values())
"""What scales may be stored in. A power of two of MXFP4, 2**-127 to 2**127, is a bfloat16."""

E2M1_VALUES = CODE_TYPES["e2m1"].decode_table
"""The value of each 4-bit float."""


@dataclass(frozen=True)
class Int4Weight:
    """One expert's (or one linear layer's) 4-bit weight in canonical form.

    Attributes
    ----------
    words : uint32 ``[K/8, N]``
        ``q[8*b + i, n]`` is bits ``4*i .. 4*i+3`` of ``words[b, n]``.
    scale : float16 or bfloat16 ``[G, N]``
        Finite.
    zero : uint8 ``[G, N]``, or None with ``codes="e2m1"``
        0 to 16.
    group_size : int
        Rows of K that share a scale; K itself when the checkpoint says -1. ``G = ceil(K / group_size)``.
    g_idx : int32 ``[K]`` or None
        The group of each row; None when that is ``k // group_size`` for every k.
    codes : {"uint4", "e2m1"}
        What a code stands for.
    """

    words: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    group_size: int
    g_idx: np.ndarray | None = None
    codes: str = "uint4"

    @property
    def k(self):
        """Input width."""
        return 8 * self.words.shape[0]

    @property
    def n(self):
        """Output width."""
        return self.words.shape[1]


def unpack_words(words):
    """``q``, uint8 ``[K, N]`` in 0..15, from uint32 ``[K/8, N]``. Slow and obvious."""
    words = np.asarray(words).view(np.uint32)
    q = (words[:, None, :] >> NIBBLE_SHIFTS[None, :, None]) & 15
    return q.reshape(-1, words.shape[1]).astype(np.uint8)


def pack_words(q):
    """uint32 ``[K/8, N]`` from ``q``, integers ``[K, N]`` in 0..15: the inverse of :func:`unpack_words`."""
    q = np.asarray(q).astype(np.uint32)
    eights = q.reshape(q.shape[0] // 8, 8, q.shape[1])
    return np.bitwise_or.reduce(eights << NIBBLE_SHIFTS[None, :, None], axis=1)
