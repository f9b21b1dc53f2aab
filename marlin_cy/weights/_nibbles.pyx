"""From the layouts of checkpoints to canonical words, at the speed of memory. The GIL is released.

Each function is a line or two of NumPy in ``tests/test_formats_nibbles.py``. Arrays are contiguous, and may be
read-only; what is returned is newly allocated.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

import numpy as np

__all__ = ["transpose", "words_of_awq", "words_of_marlin"]

ctypedef fused item_t:
    uint8_t
    uint16_t
    uint32_t

cdef enum:
    # Side of the squares that are transposed. 16 words are a cache line: lines are read, and written, while they are
    # in the first-level cache, whatever the distance between rows.
    SIDE = 16
    # Words of AWQ's that are turned at once, the same operations on each: whole vectors, on every ISA.
    LANES = 16
    TILE_K = 16      # Marlin's tile of 16 rows ...
    BLOCK_N = 64     # ... by four tiles' columns,
    BLOCK_WORDS = TILE_K * BLOCK_N // 8

cdef Py_ssize_t[8] COLUMN_OF_NIBBLE = [0, 2, 4, 6, 1, 3, 5, 7]


def transpose(const item_t[:, ::1] array):
    """``array.T``, contiguous.

    Parameters
    ----------
    array : uint8, uint16 or uint32 ``[M, N]``
    """
    cdef Py_ssize_t rows = array.shape[0], columns = array.shape[1]
    out = np.empty((columns, rows), f"u{sizeof(item_t)}")
    cdef item_t[:, ::1] target = out
    if rows and columns:
        with nogil:
            transpose_squares(&array[0, 0], &target[0, 0], rows, columns)
    return out


def words_of_awq(const uint32_t[:, ::1] qweight):
    """Canonical words, uint32 ``[K/8, N]``, from AWQ's.

    Parameters
    ----------
    qweight : uint32 ``[K, N/8]``
        Bits ``4*i .. 4*i+3`` of word ``[k, c]`` are ``q[k, 8*c + (0, 2, 4, 6, 1, 3, 5, 7)[i]]``. K is a multiple of 8.
    """
    cdef Py_ssize_t blocks = qweight.shape[0] // 8, width = qweight.shape[1], block
    out = np.empty((blocks, 8 * width), np.uint32)
    cdef uint32_t[:, ::1] words = out
    if blocks and width:
        with nogil:
            for block in range(blocks):
                eight_rows_of_awq(&qweight[8 * block, 0], &words[block, 0], width)
    return out


def words_of_marlin(const uint32_t[:, ::1] packed):
    """Canonical words, uint32 ``[K/8, N]``, from Marlin's.

    Parameters
    ----------
    packed : uint32 ``[K/16, 2*N]``
        As drawn in :mod:`marlin_cy.formats.marlin`. N is a multiple of 64.
    """
    cdef Py_ssize_t tiles = packed.shape[0], n = packed.shape[1] // 2, tile, block
    out = np.empty((2 * tiles, n), np.uint32)
    cdef uint32_t[:, ::1] words = out
    if tiles and n:
        with nogil:
            for tile in range(tiles):
                for block in range(n // BLOCK_N):
                    block_of_marlin(&packed[tile, BLOCK_WORDS * block], &words[2 * tile, BLOCK_N * block], n)
    return out


cdef void transpose_squares(const item_t *array, item_t *out, Py_ssize_t rows, Py_ssize_t columns) noexcept nogil:
    cdef Py_ssize_t down, across, row, column
    for across in range((columns + SIDE - 1) // SIDE):
        for down in range((rows + SIDE - 1) // SIDE):  # so that what is written, in SIDE places, is one run in each
            for column in range(across * SIDE, min((across + 1) * SIDE, columns)):
                for row in range(down * SIDE, min((down + 1) * SIDE, rows)):
                    out[column * rows + row] = array[row * columns + column]


cdef void eight_rows_of_awq(const uint32_t *rows, uint32_t *words, Py_ssize_t width) noexcept nogil:
    """``words[8*width]`` from eight rows of ``width``: an 8 by 8 transposition of nibbles for each column."""
    cdef uint32_t w[8][LANES]
    cdef Py_ssize_t part, begin, lanes, lane, i
    for part in range((width + LANES - 1) // LANES):
        begin = part * LANES
        lanes = min(<Py_ssize_t>LANES, width - begin)
        for i in range(8):
            for lane in range(LANES):
                w[i][lane] = rows[i * width + begin + lane] if lane < lanes else 0
        # Halves of the square change places across the diagonal, then quarters, then single nibbles.
        exchange(w, 4, 0x0000FFFF)
        exchange(w, 2, 0x00FF00FF)
        exchange(w, 1, 0x0F0F0F0F)
        for lane in range(lanes):
            for i in range(8):
                words[8 * (begin + lane) + COLUMN_OF_NIBBLE[i]] = w[i][lane]


cdef inline void exchange(uint32_t (*w)[LANES], Py_ssize_t distance, uint32_t low) noexcept nogil:
    """Swap the high nibbles of row ``i`` with the low ones of row ``i + distance``, in every square of twice that."""
    cdef Py_ssize_t i, lane
    cdef uint32_t differing
    for i in range(8):
        if not i & distance:
            for lane in range(LANES):
                differing = ((w[i][lane] >> (4 * distance)) ^ w[i + distance][lane]) & low
                w[i + distance][lane] ^= differing
                w[i][lane] ^= differing << (4 * distance)


cdef void block_of_marlin(const uint32_t *block, uint32_t *words, Py_ssize_t n) noexcept nogil:
    """Two rows of 64 canonical words, ``n`` apart, from the 128 words of a block of Marlin's."""
    cdef Py_ssize_t column, tile, half, side
    cdef uint32_t a, b, c, d
    cdef int shift
    for column in range(8):
        for tile in range(4):
            a, b = block[16 * column + tile], block[16 * column + 4 + tile]
            c, d = block[16 * column + 8 + tile], block[16 * column + 12 + tile]
            for half in range(2):  # of the rows: which canonical word
                for side in range(2):  # of the tile's columns
                    shift = 4 * (half + 2 * side)
                    words[half * n + 16 * tile + 8 * side + column] = (
                        rows_of(a >> shift) | rows_of(b >> shift) << 8
                        | rows_of(c >> shift) << 16 | rows_of(d >> shift) << 24
                    )


cdef inline uint32_t rows_of(uint32_t word) noexcept nogil:
    """Two consecutive rows' codes, which Marlin keeps 16 bits apart, side by side."""
    return (word & 0xF) | (word >> 12 & 0xF0)
