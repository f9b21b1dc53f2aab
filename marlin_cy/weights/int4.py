"""The canonical form that every checkpoint format is converted to before a backend packs it.

A weight is a matrix ``w[k, n] = scale[g, n] * (value(q[k, n]) - zero[g, n])``. Its group is ``g = g_idx[k]``, or
``g = k // group_size`` if there is no ``g_idx``. The weight's *code type*, a row of
:data:`~marlin_cy.weights.code_types.CODE_TYPES`, says what ``value(q)`` is and whether there are zero points:

=========  =========================================================================================
``codes``  ``value(q)``
=========  =========================================================================================
"uint4"    the code itself, 0 to 15
"e2m1"     a 4-bit float: 0, 0.5, 1, 1.5, 2, 3, 4, 6 for 0 to 7, and their negatives for 8 to 15; no
           zero points. Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3
=========  =========================================================================================

Codes stay packed: a 32-bit word holds eight consecutive rows of K, as in GPTQ checkpoints. Converting a GPTQ weight
therefore copies only its zero points and its ``g_idx``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Int4Weight", "pack_words", "unpack_words"]

NIBBLE_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)


@dataclass(frozen=True)
class Int4Weight:
    """The weight of one expert, or of one linear layer, in canonical form.

    Attributes
    ----------
    words : uint32 ``[K/8, N]``
        ``q[8*b + i, n]`` is bits ``4*i .. 4*i+3`` of ``words[b, n]``.
    scale : float16 or bfloat16 ``[G, N]``
        Finite.
    zero : uint8 ``[G, N]``, or None if the code type has no zero points
        0 to the code type's ``max_zero``.
    group_size : int
        Number of rows of K that share a scale: K itself if the checkpoint says -1. ``G = ceil(K / group_size)``.
    g_idx : int32 ``[K]`` or None
        The group of each row; None if that is ``k // group_size`` for every k.
    codes : str
        The name of the code type.
    """

    words: npt.NDArray[np.uint32]
    scale: npt.NDArray[Any]
    zero: npt.NDArray[np.uint8] | None
    group_size: int
    g_idx: npt.NDArray[np.int32] | None = None
    codes: str = "uint4"

    @property
    def k(self) -> int:
        """Input width."""
        return 8 * int(self.words.shape[0])

    @property
    def n(self) -> int:
        """Output width."""
        return int(self.words.shape[1])


def unpack_words(words: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """The codes ``q``, uint8 ``[K, N]`` in 0..15, from uint32 ``[K/8, N]``. Slow and obvious."""
    words = np.asarray(words).view(np.uint32)
    q = (words[:, None, :] >> NIBBLE_SHIFTS[None, :, None]) & 15
    return q.reshape(-1, words.shape[1]).astype(np.uint8)


def pack_words(q: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """uint32 ``[K/8, N]`` from ``q``, integers ``[K, N]`` in 0..15: the inverse of :func:`unpack_words`."""
    q = np.asarray(q).astype(np.uint32)
    eights = q.reshape(q.shape[0] // 8, 8, q.shape[1])
    words: npt.NDArray[np.uint32] = np.bitwise_or.reduce(eights << NIBBLE_SHIFTS[None, :, None], axis=1)
    return words
