"""GGUF's blocks as packed tiles, as canonical words and scales, or as floats, at memory speed. The GIL is released.

``block_types.h`` has the types; ``tests/test_gguf_blocks.py`` compares each with the package ``gguf``.

A tile is 16 columns, which are 16 stored rows. Of each column, one block is decoded into the tile, whose rows are then
written as whole cache lines::

    stored rows   [N, blocks]           ┌ tile ─────────────────────┐        packed tile of an expert, or
    column c:     | block b | ...  ──── │ lanes[i][c], d[c], sub... │ ────── words, scales   [K, N]
                                        └───────────────────────────┘

A lane of a packed tile (``marlin_cy/weights/tile_layout.py``) is four bytes, as is a word of the canonical form. With
codes of 8 bits they are equal; with codes of 4 bits they have another order of codes.
"""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int8_t, int64_t, uint8_t, uint16_t, uint32_t

import numpy as np

cdef extern from "lanes.h" nogil:
    enum:
        TILE_N
    void copy_columns(void *to, const void *source, int columns, int size)

cdef extern from "code_types.h" nogil:
    ctypedef struct code_type:
        int bits
        int zero_bytes
    const code_type code_types[1]

cdef extern from "block_types.h" nogil:
    enum:
        BLOCK_TYPES_COUNT
        MOST_LANES
        MOST_GROUPS

    ctypedef struct block_tile:
        uint32_t lanes[MOST_LANES][TILE_N]
        uint16_t scale[TILE_N]
        uint16_t minimum[TILE_N]
        uint8_t sub_scale[MOST_GROUPS][TILE_N]
        uint8_t sub_minimum[MOST_GROUPS][TILE_N]

    ctypedef struct block_type:
        const char *name
        void (*decode)(const uint8_t *block, block_tile *tile, int column) noexcept nogil
        int nbytes
        int lanes
        int groups
        int codes
        int signed_sub_scales
        int has_minimum
        int has_bfloat16

    ctypedef struct tile_places:
        ptrdiff_t header_bytes
        const int64_t *scale
        const int64_t *minimum
        const int64_t *sub_scale
        const int64_t *sub_minimum
        const int64_t *zero
        int zero_bytes

    const block_type block_types[1]
    void decode_block_of_tile(const block_type *type, block_tile *tile, const uint8_t *rows, ptrdiff_t row_bytes,
                              ptrdiff_t block, int columns, const uint8_t *ahead)
    uint32_t word_of_code_lane(uint32_t lane, const block_type *type)
    float value_of_code(uint32_t code, const block_type *type)
    bint pack_block_rows(const block_type *type, uint8_t *packed, const tile_places *places, int first, int columns,
                         const uint8_t *rows, ptrdiff_t row_bytes, ptrdiff_t blocks)

__all__ = ["BLOCK_KINDS", "decode_blocks", "dequantise_blocks", "pack_blocks"]

cdef int _number
BLOCK_KINDS = tuple([block_types[_number].name.decode() for _number in range(BLOCK_TYPES_COUNT)])
"""The types, in the order of the numbers that the functions of this module take."""

cdef const float[::1] FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
cdef const float[::1] BFLOAT16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)


def pack_blocks(int number, const uint8_t[:, ::1] rows, uint8_t[::1] expert, Py_ssize_t column, layout, places):
    """Write stored rows to the packed tiles of an expert. Returns whether all scales and minima are finite.

    Several threads may write different columns at once.

    Parameters
    ----------
    number : int
        The type's place in :data:`BLOCK_KINDS`.
    rows : uint8 ``[N, blocks * bytes of a block]``
    expert : uint8 ``[layout.expert_stride]``
    column : int
        The column of the expert that the first of the rows is.
    layout : TileLayout
    places : sequence of five int64 ``[blocks or groups]`` or None
        Where the parts are in a tile: scales and minima of blocks, sub-scales and sub-minima of groups, zero points.

    Raises
    ------
    ValueError
        The arguments do not fit each other.
    """
    cdef const block_type *kind = type_of(number)
    cdef ptrdiff_t n = rows.shape[0], blocks = rows.shape[1] // kind.nbytes, done = 0, at
    cdef ptrdiff_t tile_stride = layout.tile_stride
    cdef int bits = code_types[kind.codes].bits, columns
    cdef bint finite = True
    cdef const int64_t[::1] scale, minimum, sub_scale, sub_minimum, zero
    cdef tile_places to
    check("rows", rows.shape[1], blocks * kind.nbytes, n, n)
    check("layout", layout.packed_k, blocks * kind.lanes * 32 // bits, n, n)
    check("expert", expert.shape[0], layout.expert_stride, n, n)
    if column < 0 or column + n > layout.n:
        raise ValueError(f"column: got columns {column} to {column + n}, expected a part of 0 to {layout.n}")
    scale, minimum, sub_scale, sub_minimum, zero = places
    to.header_bytes = layout.header_bytes
    to.scale = first_place("scale", scale, blocks)
    to.minimum = first_place("minimum", minimum, blocks if kind.has_minimum else 0)
    to.sub_scale = first_place("sub_scale", sub_scale, blocks * kind.groups)
    to.sub_minimum = first_place("sub_minimum", sub_minimum, blocks * kind.groups if kind.has_minimum else 0)
    to.zero = first_place("zero", zero, 0 if kind.has_minimum or kind.groups else blocks)
    to.zero_bytes = 0 if to.zero is NULL else code_types[kind.codes].zero_bytes
    if blocks == 0:
        return True
    with nogil:
        while done < n:
            at = column + done
            columns = <int>min(TILE_N - at % TILE_N, n - done)
            finite &= pack_block_rows(
                kind, &expert[at // TILE_N * tile_stride], &to, at % TILE_N, columns, &rows[done, 0], rows.shape[1],
                blocks,
            )
            done += columns
    return finite


cdef const int64_t *first_place(name, const int64_t[::1] places, ptrdiff_t expected) except? NULL:
    """A pointer to the places, after a check of their number; NULL if there are none."""
    cdef ptrdiff_t got = 0 if places is None else places.shape[0]
    if got != expected:
        raise ValueError(f"places: got {got} of {name}, expected {expected}")
    return &places[0] if got else NULL


cdef const block_type *type_of(int number) except NULL:
    if not 0 <= number < BLOCK_TYPES_COUNT:
        raise ValueError(f"number: got {number}, expected 0 to {BLOCK_TYPES_COUNT - 1}")
    return &block_types[number]


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
    cdef const block_type *kind = type_of(number)
    cdef ptrdiff_t n = rows.shape[0], blocks = rows.shape[1] // kind.nbytes, first = 0
    check("rows", rows.shape[1], blocks * kind.nbytes, n, n)
    check("words", words.shape[0], blocks * kind.lanes, words.shape[1], n)
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
        while first < n:
            decode_columns(
                kind, &rows[first, 0], rows.shape[1], blocks, n, first, &words[0, 0], &scale[0, 0], minima, sub_scales,
                sub_minima,
            )
            first += TILE_N


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
    cdef const block_type *kind = type_of(number)
    cdef ptrdiff_t n = rows.shape[0], blocks = rows.shape[1] // kind.nbytes, row, block
    cdef int size = kind.lanes * 32 // code_types[kind.codes].bits
    cdef const float *floats = &BFLOAT16[0] if kind.has_bfloat16 else &FLOAT16[0]
    cdef block_tile tile
    check("rows", rows.shape[1], blocks * kind.nbytes, n, n)
    check("values", values.shape[1], blocks * size, values.shape[0], n)
    with nogil:
        for row in range(n):
            for block in range(blocks):
                kind.decode(&rows[row, block * kind.nbytes], &tile, 0)
                values_of_column(kind, &tile, floats, &values[row, block * size])


cdef void values_of_column(const block_type *kind, const block_tile *tile, const float *floats, float *out) noexcept nogil:
    """The values of a tile's first column."""
    cdef int groups = max(1, kind.groups), lanes = kind.lanes // groups, bits = code_types[kind.codes].bits
    cdef int group, lane, code
    cdef uint32_t mask = (<uint32_t>1 << bits) - 1, word
    cdef float scale, minimum, d = floats[tile.scale[0]], m = floats[tile.minimum[0]] if kind.has_minimum else 0
    for group in range(groups):
        scale, minimum = d, m
        if kind.groups and kind.signed_sub_scales:
            scale *= <int8_t>tile.sub_scale[group][0]
        elif kind.groups:
            scale *= tile.sub_scale[group][0]
            minimum *= tile.sub_minimum[group][0]
        for lane in range(group * lanes, (group + 1) * lanes):
            word = word_of_code_lane(tile.lanes[lane][0], kind)
            for code in range(32 // bits):
                out[code] = scale * value_of_code(word >> (bits * code) & mask, kind) - minimum
            out += 32 // bits


cdef int check(name, Py_ssize_t got, Py_ssize_t expected, Py_ssize_t columns, Py_ssize_t n) except -1:
    if got != expected or columns != n:
        raise ValueError(f"{name}: got [{got}, {columns}], expected [{expected}, {n}]")
    return 0


cdef void decode_columns(
    const block_type *kind, const uint8_t *rows, ptrdiff_t row_bytes, ptrdiff_t blocks, ptrdiff_t n, ptrdiff_t first,
    uint32_t *words, uint16_t *scale, uint16_t *minimum, uint8_t *sub_scale, uint8_t *sub_minimum
) noexcept nogil:
    """The columns of one tile in canonical form, from the column ``first`` on."""
    cdef block_tile tile
    cdef ptrdiff_t block, at
    cdef int columns = <int>min(TILE_N, n - first), lane, column, group
    for block in range(blocks):
        decode_block_of_tile(kind, &tile, rows, row_bytes, block, columns, rows + TILE_N * row_bytes)
        for lane in range(kind.lanes):
            at = (block * kind.lanes + lane) * n + first
            for column in range(columns):
                words[at + column] = word_of_code_lane(tile.lanes[lane][column], kind)
        at = block * n + first
        copy_columns(scale + at, &tile.scale[0], columns, 2)
        if minimum is not NULL:
            copy_columns(minimum + at, &tile.minimum[0], columns, 2)
        for group in range(kind.groups):
            at = (block * kind.groups + group) * n + first
            copy_columns(sub_scale + at, &tile.sub_scale[group][0], columns, 1)
            if sub_minimum is not NULL:
                copy_columns(sub_minimum + at, &tile.sub_minimum[group][0], columns, 1)
