"""Codes of GGUF's blocks as canonical words, at memory speed. The GIL is released.

``tests/test_gguf_blocks.py`` compares each function with the package ``gguf``. Arguments are C-contiguous and may be
read-only; results are newly allocated.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

import numpy as np

__all__ = ["words_of_nibbles"]

cdef enum:
    # Columns whose words are written together: a cache line.
    COLUMNS = 16
    # Codes of a block, its bytes of codes, and its canonical words.
    BLOCK = 32
    NIBBLE_BYTES = BLOCK // 2
    BLOCK_WORDS = BLOCK // 8


def words_of_nibbles(const uint8_t[:, ::1] rows, Py_ssize_t block_bytes, Py_ssize_t offset):
    """Canonical words, uint32 ``[K/8, N]``, of blocks of 32 codes of 4 bits.

    Parameters
    ----------
    rows : uint8 ``[N, K/32 * block_bytes]``
        The low nibble of byte ``i`` of a block's codes is code ``i``, the high nibble code ``i + 16``.
    block_bytes, offset : int
        Size of a block, and the place of its 16 bytes of codes.

    Raises
    ------
    ValueError
        A row is not made of whole blocks.
    """
    cdef Py_ssize_t n = rows.shape[0], blocks, tile, begin
    if block_bytes < 1 or not 0 <= offset <= block_bytes - NIBBLE_BYTES or rows.shape[1] % block_bytes:
        raise ValueError(f"rows: got {rows.shape[1]} bytes, expected blocks of {block_bytes}, codes at {offset}")
    blocks = rows.shape[1] // block_bytes
    out = np.empty((BLOCK_WORDS * blocks, n), np.uint32)
    cdef uint32_t[:, ::1] words = out
    if blocks and n:
        with nogil:
            for tile in range((n + COLUMNS - 1) // COLUMNS):
                begin = tile * COLUMNS
                nibbles_of_columns(
                    &rows[begin, offset], rows.shape[1], &words[0, begin], n, blocks, block_bytes,
                    min(<Py_ssize_t>COLUMNS, n - begin),
                )
    return out


cdef void nibbles_of_columns(
    const uint8_t *rows, Py_ssize_t row_bytes, uint32_t *words, Py_ssize_t n, Py_ssize_t blocks, Py_ssize_t block_bytes,
    Py_ssize_t columns
) noexcept nogil:
    """The words of some columns; a column is a stored row."""
    cdef Py_ssize_t block, column
    cdef const uint8_t *codes
    cdef uint64_t first, second
    for block in range(blocks):
        for column in range(columns):
            codes = rows + column * row_bytes + block * block_bytes
            memcpy(&first, codes, 8)
            memcpy(&second, codes + 8, 8)
            words[column] = low_nibbles(first)
            words[n + column] = low_nibbles(second)
            words[2 * n + column] = low_nibbles(first >> 4)
            words[3 * n + column] = low_nibbles(second >> 4)
        words += BLOCK_WORDS * n


cdef inline uint32_t low_nibbles(uint64_t codes) noexcept nogil:
    """The low nibbles of eight bytes, next to each other."""
    codes &= <uint64_t>0x0F0F0F0F0F0F0F0F
    codes = (codes | codes >> 4) & <uint64_t>0x00FF00FF00FF00FF
    codes = (codes | codes >> 8) & <uint64_t>0x0000FFFF0000FFFF
    return <uint32_t>(codes | codes >> 16)
