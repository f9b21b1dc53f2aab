"""GGUF's blocks as canonical words and scales, at memory speed. The GIL is released.

``tests/test_gguf_blocks.py`` compares each type with the package ``gguf``.

A tile is 16 columns, which are 16 stored rows. Of each column, one block is decoded into the tile, whose rows are then
written as whole cache lines::

    stored rows   [N, blocks]           ┌ tile ─────────────────────┐        words, scales   [K, N]
    column c:     | block b | ...  ──── │ words[w][c], d[c], sub... │ ────── rows of 16 columns
                                        └───────────────────────────┘
"""

from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

import numpy as np

from marlin_cy.weights.code_types import code_type

__all__ = ["BLOCK_KINDS", "decode_blocks", "dequantise_blocks"]

cdef enum:
    COLUMNS = 16  # of a tile: a cache line of words
    MOST_WORDS = 64  # of a block: 256 codes of 8 bits
    MOST_GROUPS = 16

ctypedef struct tile_t:
    uint32_t words[MOST_WORDS][COLUMNS]
    uint16_t scale[COLUMNS]  # of the block
    uint16_t minimum[COLUMNS]
    uint8_t sub_scale[MOST_GROUPS][COLUMNS]  # of its groups
    uint8_t sub_minimum[MOST_GROUPS][COLUMNS]

ctypedef void (*decoder_t)(const uint8_t *block, tile_t *tile, Py_ssize_t column) noexcept nogil

cdef enum:
    # Masks of eight bytes.
    NEGATIVE = 0x8000  # the sign of a float16
    MXFP4_SHIFT = 7  # from an exponent to a bfloat16
    MXFP4_LEAST = 0x0040  # 2**-127, a subnormal bfloat16
    HIGH_BITS = 256

cdef uint64_t LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
cdef uint64_t LOW_BITS = 0x0101010101010101
cdef uint64_t LOW_PAIRS = 0x0303030303030303
cdef uint64_t SIGNS = 0x8080808080808080
cdef uint64_t SIXES_OF_16 = 0x6060606060606060  # 96 in each byte

# Eight bytes with the value 16 where a bit is set.
cdef uint64_t[HIGH_BITS] SIXTEENS
cdef int _bits, _bit
for _bits in range(HIGH_BITS):
    SIXTEENS[_bits] = 0
    for _bit in range(8):
        if _bits >> _bit & 1:
            SIXTEENS[_bits] |= <uint64_t>16 << (8 * _bit)


cdef struct kind_t:
    decoder_t decode
    Py_ssize_t nbytes
    Py_ssize_t words
    Py_ssize_t groups  # that have scales of their own; 0 where the block has the only one
    Py_ssize_t codes  # of a word
    bint signed_sub_scales
    bint has_minimum
    bint has_bfloat16
    const float *values  # of each code, the zero point subtracted


BLOCK_KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
"""The types, in the order of the numbers that :func:`decode_blocks` takes."""

# The integers from -256 to 255, and the tables of code types that have one.
cdef float[512] INTEGERS
cdef float[16] IQ4_NL
cdef float[16] E2M1
cdef int _index
for _index in range(512):
    INTEGERS[_index] = _index - 256
for _index in range(16):
    IQ4_NL[_index] = code_type("iq4_nl").values[_index]
    E2M1[_index] = code_type("e2m1").values[_index]

cdef const float[::1] FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
cdef const float[::1] BFLOAT16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)

cdef kind_t[11] KINDS
KINDS[0] = kind_t(q4_0, 18, 4, 0, 8, 0, 0, 0, &INTEGERS[256 - 8])
KINDS[1] = kind_t(q4_1, 20, 4, 0, 8, 0, 1, 0, &INTEGERS[256])
KINDS[2] = kind_t(q5_0, 22, 8, 0, 4, 0, 0, 0, &INTEGERS[256 - 16])
KINDS[3] = kind_t(q5_1, 24, 8, 0, 4, 0, 1, 0, &INTEGERS[256])
KINDS[4] = kind_t(q8_0, 34, 8, 0, 4, 0, 0, 0, &INTEGERS[256 - 128])
KINDS[5] = kind_t(q4_0, 18, 4, 0, 8, 0, 0, 0, &IQ4_NL[0])
KINDS[6] = kind_t(mxfp4, 17, 4, 0, 8, 0, 0, 1, &E2M1[0])
KINDS[7] = kind_t(q4_k, 144, 32, 8, 8, 0, 1, 0, &INTEGERS[256])
KINDS[8] = kind_t(q5_k, 176, 64, 8, 4, 0, 1, 0, &INTEGERS[256])
KINDS[9] = kind_t(q6_k, 210, 64, 16, 4, 1, 0, 0, &INTEGERS[256 - 128])
KINDS[10] = kind_t(iq4_xs, 136, 32, 8, 8, 1, 0, 0, &IQ4_NL[0])


def decode_blocks(
    int number, const uint8_t[:, ::1] rows, uint32_t[:, ::1] words, uint16_t[:, ::1] scale,
    uint16_t[:, ::1] minimum=None, uint8_t[:, ::1] sub_scale=None, uint8_t[:, ::1] sub_minimum=None
):
    """Write codes and scales of stored rows into arrays of the canonical form.

    Parameters
    ----------
    number : int
        The type's place in :data:`BLOCK_KINDS`.
    rows : uint8 ``[N, blocks * bytes of a block]``
    words : uint32 ``[blocks * words of a block, N]``
    scale, minimum : uint16 ``[blocks, N]``
        Of each block: bits of a float16, of MXFP4 those of a bfloat16. ``minimum`` is what is subtracted.
    sub_scale, sub_minimum : uint8 ``[blocks * groups of a block, N]``
        Only types with two levels have them.

    Raises
    ------
    ValueError
        The arrays do not fit each other.
    """
    if not 0 <= number < len(BLOCK_KINDS):
        raise ValueError(f"number: got {number}, expected 0 to {len(BLOCK_KINDS) - 1}")
    cdef kind_t kind = KINDS[number]
    cdef Py_ssize_t n = rows.shape[0], blocks = rows.shape[1] // kind.nbytes, tiles = (n + COLUMNS - 1) // COLUMNS, tile
    check("rows", rows.shape[1], blocks * kind.nbytes, n, n)
    check("words", words.shape[0], blocks * kind.words, words.shape[1], n)
    check("scale", scale.shape[0], blocks, scale.shape[1], n)
    cdef uint16_t *minima = NULL
    cdef uint8_t *sub_scales = NULL
    cdef uint8_t *sub_minima = NULL
    if n == 0 or blocks == 0:
        return
    if minimum is not None:
        check("minimum", minimum.shape[0], blocks, minimum.shape[1], n)
        minima = &minimum[0, 0]
    if (sub_scale is None) != (kind.groups == 0):
        raise ValueError(f"sub_scale: got {sub_scale}, expected it for types with two levels alone")
    if sub_scale is not None:
        check("sub_scale", sub_scale.shape[0], blocks * kind.groups, sub_scale.shape[1], n)
        sub_scales = &sub_scale[0, 0]
    if sub_minimum is not None:
        check("sub_minimum", sub_minimum.shape[0], blocks * kind.groups, sub_minimum.shape[1], n)
        sub_minima = &sub_minimum[0, 0]
    with nogil:
        for tile in range(tiles):
            decode_columns(
                kind, &rows[tile * COLUMNS, 0], rows.shape[1], blocks, n, tile * COLUMNS, &words[0, 0], &scale[0, 0],
                minima, sub_scales, sub_minima,
            )


def dequantise_blocks(int number, const uint8_t[:, ::1] rows, float[:, ::1] values):
    """Write the float32 values of stored rows, rounded as the package ``gguf`` rounds them.

    Parameters
    ----------
    number : int
        The type's place in :data:`BLOCK_KINDS`.
    rows : uint8 ``[N, blocks * bytes of a block]``
    values : float32 ``[N, blocks * values of a block]``

    Raises
    ------
    ValueError
        The arrays do not fit each other.
    """
    if not 0 <= number < len(BLOCK_KINDS):
        raise ValueError(f"number: got {number}, expected 0 to {len(BLOCK_KINDS) - 1}")
    cdef kind_t kind = KINDS[number]
    cdef Py_ssize_t n = rows.shape[0], blocks = rows.shape[1] // kind.nbytes, size = kind.words * kind.codes, row, block
    cdef const float *floats = &BFLOAT16[0] if kind.has_bfloat16 else &FLOAT16[0]
    cdef tile_t tile
    check("rows", rows.shape[1], blocks * kind.nbytes, n, n)
    check("values", values.shape[1], blocks * size, values.shape[0], n)
    with nogil:
        for row in range(n):
            for block in range(blocks):
                kind.decode(&rows[row, block * kind.nbytes], &tile, 0)
                values_of_column(kind, &tile, floats, &values[row, block * size])


cdef void values_of_column(kind_t kind, const tile_t *tile, const float *floats, float *out) noexcept nogil:
    """The values of a tile's first column."""
    cdef Py_ssize_t groups = max(<Py_ssize_t>1, kind.groups), words = kind.words // groups, group, word, code
    cdef int bits = 32 // kind.codes
    cdef uint32_t mask = (<uint32_t>1 << bits) - 1, packed
    cdef float scale, minimum, d = floats[tile.scale[0]], m = floats[tile.minimum[0]] if kind.has_minimum else 0
    for group in range(groups):
        scale, minimum = d, m
        if kind.groups and kind.signed_sub_scales:
            scale *= <int8_t>tile.sub_scale[group][0]
        elif kind.groups:
            scale *= tile.sub_scale[group][0]
            minimum *= tile.sub_minimum[group][0]
        for word in range(words):
            packed = tile.words[group * words + word][0]
            for code in range(kind.codes):
                out[code] = scale * kind.values[packed >> (bits * code) & mask] - minimum
            out += kind.codes


cdef int check(name, Py_ssize_t got, Py_ssize_t expected, Py_ssize_t columns, Py_ssize_t n) except -1:
    if got != expected or columns != n:
        raise ValueError(f"{name}: got [{got}, {columns}], expected [{expected}, {n}]")
    return 0


cdef void decode_columns(
    kind_t kind, const uint8_t *rows, Py_ssize_t row_bytes, Py_ssize_t blocks, Py_ssize_t n, Py_ssize_t first,
    uint32_t *words, uint16_t *scale, uint16_t *minimum, uint8_t *sub_scale, uint8_t *sub_minimum
) noexcept nogil:
    """The columns of one tile, from the column ``first`` on."""
    cdef tile_t tile
    cdef Py_ssize_t columns = min(<Py_ssize_t>COLUMNS, n - first), block, column, row
    for block in range(blocks):
        for column in range(columns):
            kind.decode(rows + column * row_bytes + block * kind.nbytes, &tile, column)
        for row in range(kind.words):
            memcpy(words + (block * kind.words + row) * n + first, &tile.words[row][0], 4 * columns)
        memcpy(scale + block * n + first, &tile.scale[0], 2 * columns)
        if minimum is not NULL:
            memcpy(minimum + block * n + first, &tile.minimum[0], 2 * columns)
        for row in range(kind.groups):
            memcpy(sub_scale + (block * kind.groups + row) * n + first, &tile.sub_scale[row][0], columns)
            if sub_minimum is not NULL:
                memcpy(sub_minimum + (block * kind.groups + row) * n + first, &tile.sub_minimum[row][0], columns)


# ---------------------------------------------------------------------------------------------
# Types. Each function decodes one block into a column of a tile.


cdef void q4_0(const uint8_t *block, tile_t *tile, Py_ssize_t column) noexcept nogil:
    memcpy(&tile.scale[column], block, 2)
    nibbles_of_16(block + 2, tile, column, 0)


cdef void q4_1(const uint8_t *block, tile_t *tile, Py_ssize_t column) noexcept nogil:
    scale_and_minimum(block, tile, column)
    nibbles_of_16(block + 4, tile, column, 0)


cdef void mxfp4(const uint8_t *block, tile_t *tile, Py_ssize_t column) noexcept nogil:
    tile.scale[column] = <uint16_t>block[0] << MXFP4_SHIFT if block[0] else MXFP4_LEAST
    nibbles_of_16(block + 1, tile, column, 0)


cdef void q5_0(const uint8_t *block, tile_t *tile, Py_ssize_t column) noexcept nogil:
    memcpy(&tile.scale[column], block, 2)
    fives_of_16(block + 2, tile, column)


cdef void q5_1(const uint8_t *block, tile_t *tile, Py_ssize_t column) noexcept nogil:
    scale_and_minimum(block, tile, column)
    fives_of_16(block + 4, tile, column)


cdef void q8_0(const uint8_t *block, tile_t *tile, Py_ssize_t column) noexcept nogil:
    cdef int i
    memcpy(&tile.scale[column], block, 2)
    for i in range(4):
        put_bytes(tile, column, 2 * i, load(block + 2 + 8 * i) ^ SIGNS)


cdef void q4_k(const uint8_t *block, tile_t *tile, Py_ssize_t column) noexcept nogil:
    cdef int i
    cdef uint64_t codes
    sub_scales_of_k(block, tile, column)
    for i in range(16):
        # 32 bytes have a group of 32 codes in their low nibbles, and the next one in their high nibbles.
        codes = load(block + 16 + 8 * i)
        tile.words[8 * (i // 4) + i % 4][column] = low_nibbles(codes)
        tile.words[8 * (i // 4) + i % 4 + 4][column] = low_nibbles(codes >> 4)


cdef void q5_k(const uint8_t *block, tile_t *tile, Py_ssize_t column) noexcept nogil:
    cdef int i, part
    cdef uint64_t codes, high
    sub_scales_of_k(block, tile, column)
    for i in range(4):
        # Bit g of a byte is the high bit of a code of group g.
        high = load(block + 16 + 8 * i)
        for part in range(4):
            codes = load(block + 48 + 32 * part + 8 * i)
            put_bytes(
                tile, column, 16 * part + 2 * i, codes & LOW_NIBBLES | (high >> (2 * part) & LOW_BITS) << 4)
            put_bytes(
                tile, column, 16 * part + 2 * i + 8,
                codes >> 4 & LOW_NIBBLES | (high >> (2 * part + 1) & LOW_BITS) << 4)


cdef void q6_k(const uint8_t *block, tile_t *tile, Py_ssize_t column) noexcept nogil:
    cdef int i, half, group
    cdef uint64_t first, second, high
    memcpy(&tile.scale[column], block + 208, 2)
    for group in range(16):
        tile.sub_scale[group][column] = block[192 + group]
    for half in range(2):
        for i in range(4):
            first, second = load(block + 64 * half + 8 * i), load(block + 64 * half + 32 + 8 * i)
            high = load(block + 128 + 32 * half + 8 * i)
            put_sixes(tile, column, 32 * half + 2 * i, first, high)
            put_sixes(tile, column, 32 * half + 2 * i + 8, second, high >> 2)
            put_sixes(tile, column, 32 * half + 2 * i + 16, first >> 4, high >> 4)
            put_sixes(tile, column, 32 * half + 2 * i + 24, second >> 4, high >> 6)


cdef void iq4_xs(const uint8_t *block, tile_t *tile, Py_ssize_t column) noexcept nogil:
    cdef int group
    cdef uint16_t high
    memcpy(&tile.scale[column], block, 2)
    memcpy(&high, block + 2, 2)
    for group in range(8):
        tile.sub_scale[group][column] = <uint8_t>(
            ((block[4 + group // 2] >> (4 * (group % 2)) & 15) | (high >> (2 * group) & 3) << 4) - 32)
        nibbles_of_16(block + 8 + 16 * group, tile, column, 4 * group)


# ---------------------------------------------------------------------------------------------
# Parts of blocks


cdef inline uint64_t load(const uint8_t *place) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, place, 8)
    return value


cdef inline void scale_and_minimum(const uint8_t *block, tile_t *tile, Py_ssize_t column) noexcept nogil:
    """A scale, and a minimum that is stored as what is added."""
    memcpy(&tile.scale[column], block, 2)
    memcpy(&tile.minimum[column], block + 2, 2)
    tile.minimum[column] ^= NEGATIVE


cdef inline void nibbles_of_16(const uint8_t *codes, tile_t *tile, Py_ssize_t column, Py_ssize_t word) noexcept nogil:
    """32 codes: the low nibbles of 16 bytes, then the high ones."""
    cdef uint64_t first = load(codes), second = load(codes + 8)
    tile.words[word][column] = low_nibbles(first)
    tile.words[word + 1][column] = low_nibbles(second)
    tile.words[word + 2][column] = low_nibbles(first >> 4)
    tile.words[word + 3][column] = low_nibbles(second >> 4)


cdef inline void fives_of_16(const uint8_t *codes, tile_t *tile, Py_ssize_t column) noexcept nogil:
    """32 codes of 5 bits: 4 bytes of high bits, then the nibbles of 16 bytes."""
    cdef uint64_t first = load(codes + 4), second = load(codes + 12)
    put_bytes(tile, column, 0, first & LOW_NIBBLES | SIXTEENS[codes[0]])
    put_bytes(tile, column, 2, second & LOW_NIBBLES | SIXTEENS[codes[1]])
    put_bytes(tile, column, 4, first >> 4 & LOW_NIBBLES | SIXTEENS[codes[2]])
    put_bytes(tile, column, 6, second >> 4 & LOW_NIBBLES | SIXTEENS[codes[3]])


cdef inline void put_sixes(
    tile_t *tile, Py_ssize_t column, Py_ssize_t word, uint64_t nibbles, uint64_t high
) noexcept nogil:
    """Eight codes of 6 bits, plus 96: a zero point of 128 is then one of 32."""
    put_bytes(tile, column, word, (nibbles & LOW_NIBBLES | (high & LOW_PAIRS) << 4) + SIXES_OF_16)


cdef inline void put_bytes(tile_t *tile, Py_ssize_t column, Py_ssize_t word, uint64_t codes) noexcept nogil:
    """Eight codes of 8 bits."""
    tile.words[word][column] = <uint32_t>codes
    tile.words[word + 1][column] = <uint32_t>(codes >> 32)


cdef inline uint32_t low_nibbles(uint64_t codes) noexcept nogil:
    """The low nibbles of eight bytes, next to each other."""
    codes &= LOW_NIBBLES
    codes = (codes | codes >> 4) & <uint64_t>0x00FF00FF00FF00FF
    codes = (codes | codes >> 8) & <uint64_t>0x0000FFFF0000FFFF
    return <uint32_t>(codes | codes >> 16)


cdef inline void sub_scales_of_k(const uint8_t *block, tile_t *tile, Py_ssize_t column) noexcept nogil:
    """Scale and minimum of a block of Q4_K or Q5_K, and those of its groups: 6 bits each, in 12 bytes."""
    cdef const uint8_t *packed = block + 4
    cdef int group
    memcpy(&tile.scale[column], block, 2)
    memcpy(&tile.minimum[column], block + 2, 2)
    for group in range(4):
        tile.sub_scale[group][column] = packed[group] & 63
        tile.sub_minimum[group][column] = packed[group + 4] & 63
        tile.sub_scale[group + 4][column] = packed[group + 8] & 15 | packed[group] >> 6 << 4
        tile.sub_minimum[group + 4][column] = packed[group + 8] >> 4 | packed[group + 4] >> 6 << 4
