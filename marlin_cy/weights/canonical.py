"""The canonical form that every checkpoint format is converted to before a backend packs it.

A weight is a matrix ``w[k, n] = s[g, n] * (value(q[k, n]) - zero[g, n]) - m[g, n]``. Its group is ``g = g_idx[k]``, or
``g = k // group_size`` if there is no ``g_idx``. The weight's *code type*, a row of
:data:`~marlin_cy.weights.code_types.CODE_TYPES`, says what ``value(q)`` is. Its *scale record*, a row of
:data:`~marlin_cy.weights.scale_records.SCALE_RECORDS`, says what ``s``, ``zero`` and ``m`` are.

Codes stay packed: a 32-bit word holds eight consecutive rows of K, or four of 8-bit codes, as in GPTQ checkpoints.
Converting a GPTQ weight therefore copies only its zero points and its ``g_idx``. :meth:`CanonicalWeight.from_codes`
packs plain codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.weights._nibbles import transpose
from marlin_cy.weights.code_types import code_type
from marlin_cy.weights.scale_records import SCALE_RECORDS, ScaleRecord

__all__ = ["CanonicalWeight", "pack_words", "unpack_words"]

WORD_BITS = 32
NIBBLE_SHIFTS = np.arange(0, WORD_BITS, 4, dtype=np.uint32)


@dataclass(frozen=True)
class CanonicalWeight:
    """The weight of one expert, or of one linear layer, in canonical form.

    ``G = ceil(K / group_size)`` is the number of groups, and ``B = ceil(K / 256)`` the number of blocks of a two-level
    record. Scales and minima are finite.

    Attributes
    ----------
    words : uint32 ``[K * bits / 32, N]``
        ``q[c*b + i, n]`` is bits ``bits*i .. bits*i + bits - 1`` of ``words[b, n]``, where a word holds ``c`` codes.
    scale : ``[G, N]``
        The scales, in the dtype of the scale record: float16, bfloat16 or float32; sub-scales: int8, or uint8 with
        minima.
    zero : uint8 or uint16 ``[G, N]``, or None
        In the code type's ``zero_dtype``, 0 to its ``max_zero``. None if the code type has no zero points, with minima,
        and with two levels.
    group_size : int
        Number of rows of K that share a scale: K itself if the checkpoint says -1.
    g_idx : int32 ``[K]`` or None
        The group of each row; None if that is ``k // group_size`` for every k. None with two levels.
    codes : str
        The name of the code type.
    minimum : ``[G, N]``, or None
        The minima, or sub-minima, in the dtype of ``scale``.
    block_scale : float16 ``[B, N]``, or None
        With two levels.
    block_minimum : float16 ``[B, N]``, or None
        With two levels and minima.
    """

    words: npt.NDArray[np.uint32]
    scale: npt.NDArray[Any]
    zero: npt.NDArray[Any] | None
    group_size: int
    g_idx: npt.NDArray[np.int32] | None = None
    codes: str = "uint4"
    minimum: npt.NDArray[Any] | None = None
    block_scale: npt.NDArray[np.float16] | None = None
    block_minimum: npt.NDArray[np.float16] | None = None

    @classmethod
    def from_codes(
        cls,
        q: npt.NDArray[np.uint8],
        scale: npt.NDArray[Any],
        *,
        group_size: int,
        codes: str = "uint4",
        zero: npt.NDArray[Any] | None = None,
        minimum: npt.NDArray[Any] | None = None,
        block_scale: npt.NDArray[np.float16] | None = None,
        block_minimum: npt.NDArray[np.float16] | None = None,
        g_idx: npt.NDArray[np.int32] | None = None,
        transposed: bool = False,
    ) -> CanonicalWeight:
        """A weight from plain codes, one byte each.

        Parameters
        ----------
        q : uint8 ``[K, N]``
            Each below ``2**bits``. K is a multiple of 8.
        scale, zero, minimum, block_scale, block_minimum, g_idx, group_size, codes
            The attributes of the class. The builder to which the weight is added checks them.
        transposed : bool
            Every array but ``g_idx`` is given transposed: ``q`` is ``[N, K]``, ``scale`` is ``[N, G]``, and so on. This
            is the faster form.

        Raises
        ------
        TypeError, ValueError
            ``q`` has another dtype or shape, or a code is too large.
        """
        row = code_type(codes)
        if not isinstance(q, np.ndarray) or q.dtype != np.uint8:
            raise TypeError(f"q: got {getattr(q, 'dtype', type(q).__name__)}, expected uint8")
        if q.ndim != 2 or q.shape[transposed] % 8:
            expected = "[N, K]" if transposed else "[K, N]"
            raise ValueError(f"q: got shape {q.shape}, expected {expected} with K a multiple of 8")
        if q.max(initial=0) >> row.bits:
            raise ValueError(f"q: got {q.max()}, expected 0 to {2**row.bits - 1} with {codes!r} codes")
        parts = {"zero": zero, "minimum": minimum, "block_scale": block_scale, "block_minimum": block_minimum}
        if transposed:
            scale = contiguous_transpose(scale)
            parts = {name: None if part is None else contiguous_transpose(part) for name, part in parts.items()}
        rows = np.ascontiguousarray(q) if transposed else transpose(np.ascontiguousarray(q))
        return cls(
            words=transpose(words_of_rows(rows, row.bits)),
            scale=scale,
            group_size=group_size,
            g_idx=g_idx,
            codes=codes,
            **parts,
        )

    @property
    def k(self) -> int:
        """Input width."""
        return code_type(self.codes).codes_per_word * int(self.words.shape[0])

    @property
    def n(self) -> int:
        """Output width."""
        return int(self.words.shape[1])

    def columns(self, columns: slice | npt.NDArray[np.int64]) -> CanonicalWeight:
        """Some columns, in a new order. Views, if they follow each other or are a slice."""
        if not isinstance(columns, slice) and (np.diff(columns) == 1).all():
            columns = slice(int(columns[0]), int(columns[-1]) + 1)
        names = "zero", "minimum", "block_scale", "block_minimum"
        others: dict[str, Any] = {name: part[:, columns] for name in names if (part := getattr(self, name)) is not None}
        return replace(self, words=self.words[:, columns], scale=self.scale[:, columns], **others)

    @property
    def scales(self) -> str:
        """The name of the scale record: the one whose parts the weight has.

        Raises
        ------
        ValueError
            No record has these parts.
        """
        parts = {name for name in ("minimum", "block_scale", "block_minimum") if getattr(self, name) is not None}
        for record in SCALE_RECORDS.values():
            if record.scale == self.scale.dtype and parts == set(optional_parts(record)):
                return record.name
        raise ValueError(
            f"scale: got {self.scale.dtype} with {', '.join(sorted(parts)) or 'no other parts'}, expected the parts of "
            f"one of {', '.join(SCALE_RECORDS)}"
        )


def optional_parts(record: ScaleRecord) -> list[str]:
    """The attributes of a weight that not every record has, except ``zero``."""
    names = ["minimum"] if record.has_minimum else []
    return [*names, *record.block_parts()]


def contiguous_transpose(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """``array.T``, contiguous, of any dtype of 1, 2 or 4 bytes."""
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    transposed: npt.NDArray[Any] = transpose(np.ascontiguousarray(array).view(unsigned)).view(array.dtype)
    return transposed


def words_of_rows(rows: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """uint32 ``[N, K * bits / 32]`` from contiguous codes, uint8 ``[N, K]``: consecutive codes, lowest bits first."""
    if bits == 8:
        return rows.view("<u4").astype(np.uint32, copy=False)
    # Each step joins neighbours: bytes to pairs of nibbles, these to four nibbles, and these to eight.
    eights = rows.view("<u8").astype(np.uint64, copy=False)
    pairs = (eights | eights >> np.uint64(4)) & np.uint64(0x00FF00FF00FF00FF)
    fours = (pairs | pairs >> np.uint64(8)) & np.uint64(0x0000FFFF0000FFFF)
    return (fours | fours >> np.uint64(16)).astype(np.uint32)


def unpack_words(words: npt.ArrayLike, bits: int = 4) -> npt.NDArray[np.uint8]:
    """The codes ``q``, uint8 ``[K, N]``, from uint32 ``[K * bits / 32, N]``. Slow and obvious."""
    words = np.asarray(words).view(np.uint32)
    shifts = np.arange(0, WORD_BITS, bits, dtype=np.uint32)
    q = (words[:, None, :] >> shifts[None, :, None]) & np.uint32(2**bits - 1)
    return q.reshape(-1, words.shape[1]).astype(np.uint8)


def pack_words(q: npt.ArrayLike, bits: int = 4) -> npt.NDArray[np.uint32]:
    """uint32 ``[K * bits / 32, N]`` from ``q``, integers ``[K, N]``: the inverse of :func:`unpack_words`."""
    q = np.asarray(q).astype(np.uint32)
    shifts = np.arange(0, WORD_BITS, bits, dtype=np.uint32)
    runs = q.reshape(q.shape[0] // len(shifts), len(shifts), q.shape[1])
    words: npt.NDArray[np.uint32] = np.bitwise_or.reduce(runs << shifts[None, :, None], axis=1)
    return words
