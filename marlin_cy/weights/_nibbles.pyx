"""Conversions from stored layouts to canonical words, at memory speed. The GIL is released.

``tests/test_formats_nibbles.py`` has a NumPy version of each function. Arguments are C-contiguous and may be
read-only; results are newly allocated.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

import numpy as np

__all__ = ["group_values_of_tiles", "transpose", "words_of_awq", "words_of_marlin", "words_of_tiles"]

cdef extern from *:
    """
    #include <stdint.h>
    typedef uint32_t *__restrict disjoint_words;
    """
    # Words that no other pointer of a function points to.
    ctypedef uint32_t *disjoint_words

ctypedef fused item_t:
    uint8_t
    uint16_t
    uint32_t

cdef enum:
    # Side of the squares in which an array is transposed. 16 words are a cache line. So the cache lines of a square are
    # read and written while they are in the first-level cache, for any distance between rows.
    SIDE = 16
    # AWQ words that are converted at once by the same operations: whole vectors on every ISA.
    LANES = 16
    # A block of Marlin's layout: 16 rows by 64 columns, which are four tiles of 16 by 16.
    TILE_K = 16
    BLOCK_N = 64
    BLOCK_WORDS = TILE_K * BLOCK_N // 8
    # The tile layout that is drawn in tile_layout.py. A line is 16 lanes of 4 bytes; a block of 8-bit codes has two.
    PACKED_TILE_N = 16
    PACKED_BLOCK_K = 8
    PACKED_LINE_BYTES = 64

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
    """Canonical words, uint32 ``[K/8, N]``, from AWQ's layout.

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
    """Canonical words, uint32 ``[K/8, N]``, from Marlin's layout.

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


def words_of_tiles(
    const uint8_t[:, ::1] tiles, Py_ssize_t header_bytes, Py_ssize_t k, Py_ssize_t n,
    const int32_t[::1] positions=None, int bits=4
):
    """Canonical words, uint32 ``[k * bits / 32, n]``, from an expert's packed tiles.

    Parameters
    ----------
    tiles : uint8 ``[ceil(n/16), bytes of a tile]``
        As drawn in :mod:`marlin_cy.weights.tile_layout`.
    header_bytes : int
        Bytes before a tile's first block.
    k, n : int
        ``k`` is a multiple of 8.
    positions : int32 ``[k]``, optional
        The packed row of each row of K; None if rows are packed in K's own order.
    bits : {4, 8}
        Of a code.

    Raises
    ------
    ValueError
        The tiles do not have all the rows and columns.
    """
    cdef Py_ssize_t blocks = k // PACKED_BLOCK_K, tile, columns, lines = bits // 4
    packed_k = (tiles.shape[1] - header_bytes) // (lines * PACKED_LINE_BYTES) * PACKED_BLOCK_K
    if k % PACKED_BLOCK_K or packed_k < k or PACKED_TILE_N * tiles.shape[0] < n:
        raise ValueError(f"tiles: got {packed_k} rows of {PACKED_TILE_N * tiles.shape[0]} columns, expected [{k}, {n}]")
    if tiles.shape[1] % 4 or header_bytes % 4:
        raise ValueError(f"tiles: got {header_bytes} and {tiles.shape[1]} bytes, expected multiples of 4")
    if blocks and n and <size_t>&tiles[0, 0] % 4:
        tiles = np.array(tiles)  # aligned, so that four bytes can be read as a word
    cdef const int32_t *places = NULL
    if positions is not None:
        if positions.shape[0] != k or not all_below(positions, packed_k):
            raise ValueError(f"positions: got {positions.shape[0]} entries, expected {k} of 0 to {packed_k - 1}")
        places = &positions[0]
    cdef const uint32_t *lanes
    out = np.empty((lines * blocks, n), np.uint32)
    cdef uint32_t[:, ::1] words = out
    if blocks and n:
        with nogil:
            for tile in range((n + PACKED_TILE_N - 1) // PACKED_TILE_N):
                lanes = <const uint32_t *>&tiles[tile, header_bytes]
                columns = min(<Py_ssize_t>PACKED_TILE_N, n - PACKED_TILE_N * tile)
                if lines == 2:
                    tile_of_bytes(lanes, &words[0, PACKED_TILE_N * tile], places, 2 * blocks, columns, n)
                elif places == NULL:
                    tile_in_order(lanes, &words[0, PACKED_TILE_N * tile], blocks, columns, n)
                else:
                    tile_out_of_order(lanes, &words[0, PACKED_TILE_N * tile], places, blocks, columns, n)
    return out


def group_values_of_tiles(
    const uint8_t[:, ::1] tiles, const int64_t[::1] places, Py_ssize_t size, const int32_t[::1] rows,
    Py_ssize_t groups, Py_ssize_t n
):
    """A part of the scale records, as bytes, uint8 ``[groups, n * size]``, from an expert's packed tiles.

    Parameters
    ----------
    tiles : uint8 ``[ceil(n/16), bytes of a tile]``
        As drawn in :mod:`marlin_cy.weights.tile_layout`.
    places : int64 ``[packed groups]``
        Where the values of each packed group begin in a tile.
    size : int
        Bytes of a value.
    rows : int32 ``[packed groups]``
        The row of the result that each packed group holds. A row that no packed group holds is 0.
    groups, n : int

    Raises
    ------
    ValueError
        The tiles do not have all the groups and columns, or a row is out of range.
    """
    cdef Py_ssize_t packed_groups = rows.shape[0], tile, group, columns
    if places.shape[0] != packed_groups:
        raise ValueError(f"places: got {places.shape[0]}, expected {packed_groups}, one for each of rows")
    end = max(places, default=0) + PACKED_TILE_N * size
    if end > tiles.shape[1] or min(places, default=0) < 0 or PACKED_TILE_N * tiles.shape[0] < n:
        raise ValueError(f"tiles: got {tiles.shape[0]} of {tiles.shape[1]} bytes, expected {n} columns and {end} bytes")
    if not all_below(rows, groups):
        raise ValueError(f"rows: got {np.min(rows)} to {np.max(rows)}, expected 0 to {groups - 1}")
    out = np.zeros((groups, n * size), np.uint8)
    cdef uint8_t[:, ::1] values = out
    if n:
        with nogil:
            for tile in range((n + PACKED_TILE_N - 1) // PACKED_TILE_N):
                columns = min(<Py_ssize_t>PACKED_TILE_N, n - PACKED_TILE_N * tile)
                for group in range(packed_groups):
                    memcpy(
                        &values[rows[group], PACKED_TILE_N * tile * size],
                        &tiles[tile, places[group]],
                        columns * size,
                    )
    return out


cdef bint all_below(const int32_t[::1] indices, Py_ssize_t end) noexcept:
    """Whether every index is in ``0 .. end - 1``."""
    cdef Py_ssize_t i
    for i in range(indices.shape[0]):
        if not 0 <= indices[i] < end:
            return False
    return True


cdef void transpose_squares(const item_t *array, item_t *out, Py_ssize_t rows, Py_ssize_t columns) noexcept nogil:
    cdef Py_ssize_t down, across, row, column
    for across in range((columns + SIDE - 1) // SIDE):
        # The inner loop goes down a column of squares, so that the SIDE rows of `out` are written sequentially.
        for down in range((rows + SIDE - 1) // SIDE):
            for column in range(across * SIDE, min((across + 1) * SIDE, columns)):
                for row in range(down * SIDE, min((down + 1) * SIDE, rows)):
                    out[column * rows + row] = array[row * columns + column]


cdef void eight_rows_of_awq(const uint32_t *rows, uint32_t *words, Py_ssize_t width) noexcept nogil:
    """``words[8*width]`` from eight rows of ``width`` words: one 8 by 8 transposition of nibbles per column."""
    cdef uint32_t w[8][LANES]
    cdef Py_ssize_t part, begin, lanes, lane, i
    for part in range((width + LANES - 1) // LANES):
        begin = part * LANES
        lanes = min(<Py_ssize_t>LANES, width - begin)
        for i in range(8):
            for lane in range(LANES):
                w[i][lane] = rows[i * width + begin + lane] if lane < lanes else 0
        # Exchange the halves of the square across its diagonal, then the quarters, then single nibbles.
        exchange(w, 4, 0x0000FFFF)
        exchange(w, 2, 0x00FF00FF)
        exchange(w, 1, 0x0F0F0F0F)
        for lane in range(lanes):
            for i in range(8):
                words[8 * (begin + lane) + COLUMN_OF_NIBBLE[i]] = w[i][lane]


cdef inline void exchange(uint32_t (*w)[LANES], Py_ssize_t distance, uint32_t low) noexcept nogil:
    """In every square of ``2 * distance`` rows, swap the high nibbles of row ``i`` with the low nibbles of row
    ``i + distance``."""
    cdef Py_ssize_t i, lane
    cdef uint32_t differing
    for i in range(8):
        if not i & distance:
            for lane in range(LANES):
                differing = ((w[i][lane] >> (4 * distance)) ^ w[i + distance][lane]) & low
                w[i + distance][lane] ^= differing
                w[i][lane] ^= differing << (4 * distance)


cdef void block_of_marlin(const uint32_t *block, uint32_t *words, Py_ssize_t n) noexcept nogil:
    """Two rows of 64 canonical words, ``n`` words apart, from the 128 words of one block of Marlin's layout."""
    cdef Py_ssize_t column, tile, half, side
    cdef uint32_t a, b, c, d
    cdef int shift
    for column in range(8):
        for tile in range(4):
            a, b = block[16 * column + tile], block[16 * column + 4 + tile]
            c, d = block[16 * column + 8 + tile], block[16 * column + 12 + tile]
            for half in range(2):  # half of the tile's rows: one canonical word each
                for side in range(2):  # half of the tile's columns
                    shift = 4 * (half + 2 * side)
                    words[half * n + 16 * tile + 8 * side + column] = (
                        rows_of(a >> shift) | rows_of(b >> shift) << 8
                        | rows_of(c >> shift) << 16 | rows_of(d >> shift) << 24
                    )


cdef inline uint32_t rows_of(uint32_t word) noexcept nogil:
    """The codes of two consecutive rows, moved together: Marlin's layout has them 16 bits apart."""
    return (word & 0xF) | (word >> 12 & 0xF0)


cdef void tile_in_order(const uint32_t *lanes, disjoint_words words, Py_ssize_t blocks, Py_ssize_t columns,
                        Py_ssize_t n) noexcept nogil:
    """``columns`` columns of canonical words, rows ``n`` words apart, from a packed tile in K's own order."""
    cdef Py_ssize_t block, column
    if columns == PACKED_TILE_N:
        for block in range(blocks):
            for column in range(PACKED_TILE_N):  # a constant number, which compilers vectorise
                words[block * n + column] = word_of_lane(lanes[block * PACKED_TILE_N + column])
    else:
        for block in range(blocks):
            for column in range(columns):
                words[block * n + column] = word_of_lane(lanes[block * PACKED_TILE_N + column])


cdef void tile_out_of_order(const uint32_t *lanes, disjoint_words words, const int32_t *positions, Py_ssize_t blocks,
                            Py_ssize_t columns, Py_ssize_t n) noexcept nogil:
    """As :func:`tile_in_order`, for rows of K that are packed at ``positions``."""
    cdef Py_ssize_t block, column, i
    cdef const uint32_t *source[PACKED_BLOCK_K]
    cdef int shift[PACKED_BLOCK_K]
    cdef uint32_t row
    for block in range(blocks):
        for i in range(PACKED_BLOCK_K):
            row = positions[block * PACKED_BLOCK_K + i]
            source[i] = lanes + <Py_ssize_t>(row // PACKED_BLOCK_K) * PACKED_TILE_N
            shift[i] = 8 * (row % 4) + 4 * (row % PACKED_BLOCK_K // 4)
        if columns == PACKED_TILE_N:
            for column in range(PACKED_TILE_N):
                words[block * n + column] = gathered(source, shift, column)
        else:
            for column in range(columns):
                words[block * n + column] = gathered(source, shift, column)


cdef void tile_of_bytes(const uint32_t *lanes, disjoint_words words, const int32_t *positions, Py_ssize_t lines,
                        Py_ssize_t columns, Py_ssize_t n) noexcept nogil:
    """As :func:`tile_in_order`, for codes of 8 bits; a line is a row of words. ``positions`` may be NULL."""
    cdef Py_ssize_t line, column, i
    cdef uint32_t word, row
    if positions == NULL:
        for line in range(lines):
            memcpy(words + line * n, lanes + line * PACKED_TILE_N, columns * sizeof(uint32_t))
        return
    for line in range(lines):
        for column in range(columns):
            word = 0
            for i in range(4):
                row = positions[4 * line + i]
                word |= (lanes[<Py_ssize_t>(row // 4) * PACKED_TILE_N + column] >> (8 * (row % 4)) & 255) << (8 * i)
            words[line * n + column] = word


cdef inline uint32_t gathered(const uint32_t **source, const int *shift, Py_ssize_t column) noexcept nogil:
    """The word of a column whose row ``i`` begins at bit ``shift[i]`` of its lane in ``source[i]``."""
    cdef uint32_t word = 0
    cdef Py_ssize_t i
    for i in range(PACKED_BLOCK_K):
        word |= (source[i][column] >> shift[i] & 15) << (4 * i)
    return word


cdef inline uint32_t word_of_lane(uint32_t lane) noexcept nogil:
    """Rows 0 to 7, lowest first, from the four bytes of a packed column: rows ``t`` and ``t + 4`` in byte ``t``."""
    return exchange_bits(exchange_bits(lane, 0x00F000F0, 4), 0x0000FF00, 8)


cdef inline uint32_t exchange_bits(uint32_t x, uint32_t mask, int shift) noexcept nogil:
    """``x`` with the bits under ``mask`` exchanged for those ``shift`` bits higher."""
    cdef uint32_t differing = (x ^ x >> shift) & mask
    return x ^ differing ^ differing << shift
