/* GGUF's quantised types: one row each, with a function that decodes a block into a column of a tile.
 *
 * A stored row is a column of the weight, and consists of blocks. blocks.py says what a block holds and what a value is.
 * Source: ggml, ggml-common.h and ggml-quants.c.
 */
#ifndef MARLIN_CY_BLOCK_TYPES_H
#define MARLIN_CY_BLOCK_TYPES_H

#include "lanes.h"

enum {
    MOST_LANES = 64, /* of a column of a block: 256 codes of 8 bits */
    MOST_GROUPS = 16,
};

/* A block of 16 columns. A lane is that of a packed tile: eight codes of 4 bits, or four of 8 bits. */
typedef struct {
    uint32_t lanes[MOST_LANES][TILE_N];
    uint16_t scale[TILE_N]; /* of the block: a float16, or a bfloat16 */
    uint16_t minimum[TILE_N];
    uint8_t sub_scale[MOST_GROUPS][TILE_N]; /* of its groups */
    uint8_t sub_minimum[MOST_GROUPS][TILE_N];
} block_tile;

typedef struct {
    const char *name;
    void (*decode)(const uint8_t *block, block_tile *tile, int column);
    int nbytes; /* of a block */
    int lanes;  /* of a column of a block */
    int groups; /* that have scales of their own; 0: the block has the only one */
    int codes;  /* the code type */
    int zero;   /* a value is a multiplicand minus this, times a scale */
    int signed_sub_scales;
    int has_minimum;
    int has_bfloat16;
} block_type;

/* ---------------------------------------------------------------------------------------------
 * Parts of blocks. Eight bytes are handled as one integer. */

#define LOW_NIBBLES 0x0f0f0f0f0f0f0f0fu

static inline uint64_t load_bytes(const uint8_t *from)
{
    uint64_t bytes;
    memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

static inline uint16_t load_half(const uint8_t *from)
{
    uint16_t half;
    memcpy(&half, from, sizeof half);
    return half;
}

/* Eight codes of 8 bits. */
static inline void put_bytes(block_tile *tile, int column, int lane, uint64_t codes)
{
    tile->lanes[lane][column] = (uint32_t)codes;
    tile->lanes[lane + 1][column] = (uint32_t)(codes >> 32);
}

/* 32 codes of 4 bits: the low nibbles of 16 bytes, then the high ones. */
static inline void put_nibbles_of_16(block_tile *tile, int column, int lane, const uint8_t *codes)
{
    const uint64_t first = load_bytes(codes), second = load_bytes(codes + 8);
    tile->lanes[lane][column] = lane_of_bytes(first);
    tile->lanes[lane + 1][column] = lane_of_bytes(second);
    tile->lanes[lane + 2][column] = lane_of_bytes(first >> 4);
    tile->lanes[lane + 3][column] = lane_of_bytes(second >> 4);
}

/* Eight bytes with the value 16 where a bit is set. */
static inline uint64_t sixteens(uint8_t bits)
{
    const uint64_t set = (bits * 0x0101010101010101u) & 0x8040201008040201u;
    return ((set + 0x7f7f7f7f7f7f7f7fu) & 0x8080808080808080u) >> 3;
}

/* 32 codes of 5 bits: 4 bytes of high bits, then the nibbles of 16 bytes. */
static inline void put_fives_of_16(block_tile *tile, int column, const uint8_t *codes)
{
    const uint64_t first = load_bytes(codes + 4), second = load_bytes(codes + 12);
    put_bytes(tile, column, 0, (first & LOW_NIBBLES) | sixteens(codes[0]));
    put_bytes(tile, column, 2, (second & LOW_NIBBLES) | sixteens(codes[1]));
    put_bytes(tile, column, 4, (first >> 4 & LOW_NIBBLES) | sixteens(codes[2]));
    put_bytes(tile, column, 6, (second >> 4 & LOW_NIBBLES) | sixteens(codes[3]));
}

/* Eight codes of 6 bits, plus 96: a zero point of 128 is then one of 32. */
static inline void put_sixes(block_tile *tile, int column, int lane, uint64_t nibbles, uint64_t high)
{
    const uint64_t codes = (nibbles & LOW_NIBBLES) | (high & 0x0303030303030303u) << 4;
    put_bytes(tile, column, lane, codes + 0x6060606060606060u);
}

/* A scale, and a minimum that is stored as the number that is added. */
static inline void put_scale_and_minimum(block_tile *tile, int column, const uint8_t *block)
{
    enum { SIGN = 0x8000 };
    tile->scale[column] = load_half(block);
    tile->minimum[column] = load_half(block + 2) ^ SIGN;
}

/* Scale and minimum of a block of Q4_K or Q5_K, and those of its groups: 6 bits each, in 12 bytes. */
static inline void put_scales_of_k(block_tile *tile, int column, const uint8_t *block)
{
    const uint8_t *const packed = block + 4;
    tile->scale[column] = load_half(block);
    tile->minimum[column] = load_half(block + 2);
    for (int group = 0; group < 4; group++) {
        tile->sub_scale[group][column] = packed[group] & 63;
        tile->sub_minimum[group][column] = packed[group + 4] & 63;
        tile->sub_scale[group + 4][column] = (uint8_t)((packed[group + 8] & 15) | packed[group] >> 6 << 4);
        tile->sub_minimum[group + 4][column] = (uint8_t)(packed[group + 8] >> 4 | packed[group + 4] >> 6 << 4);
    }
}

/* ---------------------------------------------------------------------------------------------
 * Types. Each function decodes one block into a column of a tile. */

static void decode_q4_0(const uint8_t *block, block_tile *tile, int column)
{
    tile->scale[column] = load_half(block);
    put_nibbles_of_16(tile, column, 0, block + 2);
}

static void decode_q4_1(const uint8_t *block, block_tile *tile, int column)
{
    put_scale_and_minimum(tile, column, block);
    put_nibbles_of_16(tile, column, 0, block + 4);
}

static void decode_mxfp4(const uint8_t *block, block_tile *tile, int column)
{
    enum { SHIFT = 7, LEAST = 0x0040 }; /* from an exponent to a bfloat16; 2^-127, a subnormal bfloat16 */
    tile->scale[column] = block[0] ? (uint16_t)(block[0] << SHIFT) : LEAST;
    put_nibbles_of_16(tile, column, 0, block + 1);
}

static void decode_q5_0(const uint8_t *block, block_tile *tile, int column)
{
    tile->scale[column] = load_half(block);
    put_fives_of_16(tile, column, block + 2);
}

static void decode_q5_1(const uint8_t *block, block_tile *tile, int column)
{
    put_scale_and_minimum(tile, column, block);
    put_fives_of_16(tile, column, block + 4);
}

static void decode_q8_0(const uint8_t *block, block_tile *tile, int column)
{
    tile->scale[column] = load_half(block);
    for (int i = 0; i < 4; i++)
        put_bytes(tile, column, 2 * i, load_bytes(block + 2 + 8 * i) ^ 0x8080808080808080u);
}

static void decode_q4_k(const uint8_t *block, block_tile *tile, int column)
{
    put_scales_of_k(tile, column, block);
    for (int part = 0; part < 4; part++)
        for (int i = 0; i < 4; i++) {
            /* 32 bytes hold a group of 32 codes in their low nibbles, and the next group in their high nibbles. */
            const uint64_t codes = load_bytes(block + 16 + 32 * part + 8 * i);
            tile->lanes[8 * part + i][column] = lane_of_bytes(codes);
            tile->lanes[8 * part + i + 4][column] = lane_of_bytes(codes >> 4);
        }
}

static void decode_q5_k(const uint8_t *block, block_tile *tile, int column)
{
    const uint64_t low_bits = 0x0101010101010101u;
    put_scales_of_k(tile, column, block);
    for (int i = 0; i < 4; i++) {
        /* Bit g of a byte is the high bit of a code of group g. */
        const uint64_t high = load_bytes(block + 16 + 8 * i);
        for (int part = 0; part < 4; part++) {
            const uint64_t codes = load_bytes(block + 48 + 32 * part + 8 * i);
            put_bytes(tile, column, 16 * part + 2 * i, (codes & LOW_NIBBLES) | (high >> (2 * part) & low_bits) << 4);
            put_bytes(tile, column, 16 * part + 2 * i + 8,
                      (codes >> 4 & LOW_NIBBLES) | (high >> (2 * part + 1) & low_bits) << 4);
        }
    }
}

static void decode_q6_k(const uint8_t *block, block_tile *tile, int column)
{
    tile->scale[column] = load_half(block + 208);
    for (int group = 0; group < 16; group++)
        tile->sub_scale[group][column] = block[192 + group];
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 4; i++) {
            const uint64_t first = load_bytes(block + 64 * half + 8 * i);
            const uint64_t second = load_bytes(block + 64 * half + 32 + 8 * i);
            const uint64_t high = load_bytes(block + 128 + 32 * half + 8 * i);
            put_sixes(tile, column, 32 * half + 2 * i, first, high);
            put_sixes(tile, column, 32 * half + 2 * i + 8, second, high >> 2);
            put_sixes(tile, column, 32 * half + 2 * i + 16, first >> 4, high >> 4);
            put_sixes(tile, column, 32 * half + 2 * i + 24, second >> 4, high >> 6);
        }
}

static void decode_iq4_xs(const uint8_t *block, block_tile *tile, int column)
{
    const uint16_t high = load_half(block + 2);
    tile->scale[column] = load_half(block);
    for (int group = 0; group < 8; group++) {
        const int low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
        tile->sub_scale[group][column] = (uint8_t)((low | (high >> (2 * group) & 3) << 4) - 32);
        put_nibbles_of_16(tile, column, 4 * group, block + 8 + 16 * group);
    }
}

enum { BLOCK_TYPES_COUNT = 11 };

static const block_type block_types[BLOCK_TYPES_COUNT] = {
    {"Q4_0", decode_q4_0, 18, 4, .codes = CODES_UINT4, .zero = 8},
    {"Q4_1", decode_q4_1, 20, 4, .codes = CODES_UINT4, .has_minimum = 1},
    {"Q5_0", decode_q5_0, 22, 8, .codes = CODES_UINT8, .zero = 16},
    {"Q5_1", decode_q5_1, 24, 8, .codes = CODES_UINT8, .has_minimum = 1},
    {"Q8_0", decode_q8_0, 34, 8, .codes = CODES_UINT8, .zero = 128},
    {"IQ4_NL", decode_q4_0, 18, 4, .codes = CODES_IQ4_NL, .zero = 127},
    {"MXFP4", decode_mxfp4, 17, 4, .codes = CODES_E2M1, .zero = 12, .has_bfloat16 = 1},
    {"Q4_K", decode_q4_k, 144, 32, 8, .codes = CODES_UINT4, .has_minimum = 1},
    {"Q5_K", decode_q5_k, 176, 64, 8, .codes = CODES_UINT8, .has_minimum = 1},
    {"Q6_K", decode_q6_k, 210, 64, 16, .codes = CODES_UINT8, .zero = 128, .signed_sub_scales = 1},
    {"IQ4_XS", decode_iq4_xs, 136, 32, 8, .codes = CODES_IQ4_NL, .zero = 127, .signed_sub_scales = 1},
};

/* Decode one block of each column, and prefetch as many bytes of the 16 columns that follow. The columns are 16 streams
 * of memory, too many and too short for a processor to foresee: without this, a decoder waits for memory most of the
 * time. `ahead` is where the following columns begin. */
static inline void decode_block_of_tile(const block_type *type, block_tile *tile, const uint8_t *rows,
                                        ptrdiff_t row_bytes, ptrdiff_t block, int columns, const uint8_t *ahead)
{
    const ptrdiff_t bytes = (ptrdiff_t)TILE_N * type->nbytes;
    const uint8_t *const end = ahead + (block + 1) * bytes;
    for (const uint8_t *line = ahead + block * bytes; line < end; line += LINE_BYTES)
        PREFETCH_LINE(line);
    for (int column = 0; column < columns; column++)
        type->decode(rows + column * row_bytes + block * type->nbytes, tile, column);
}

/* The canonical word of a lane. */
static inline uint32_t word_of_code_lane(uint32_t lane, const block_type *type)
{
    return code_types[type->codes].bits == 4 ? word_of_lane(lane) : lane;
}

/* The value of a code before it is scaled. */
static inline float value_of_code(uint32_t code, const block_type *type)
{
    const code_type *const codes = &code_types[type->codes];
    const int multiplicand = codes->is_identity ? (int)code : codes->multiplicands[code];
    return (float)(multiplicand - type->zero) / (float)codes->units_per_one;
}

/* ---------------------------------------------------------------------------------------------
 * Packed tiles */

/* Where the parts of a packed tile are, in bytes. */
typedef struct {
    ptrdiff_t header_bytes;
    const int64_t *scale; /* of each block */
    const int64_t *minimum;
    const int64_t *sub_scale; /* of each group */
    const int64_t *sub_minimum;
    const int64_t *zero; /* of each block */
    int zero_bytes;      /* of a zero point; 0 if no zero points are stored */
} tile_places;

/* Whether any of some floats of 16 bits is infinite or NaN. */
static inline int has_not_finite(const uint16_t *bits, int columns, const block_type *type)
{
    const uint16_t exponent = type->has_bfloat16 ? 0x7f80 : 0x7c00;
    int found = 0;
    for (int c = 0; c < columns; c++)
        found |= (bits[c] & exponent) == exponent;
    return found;
}

/* Write stored rows to the columns of a packed tile that begin with `first`. Returns whether all scales and minima are
 * finite. */
static int pack_block_rows(const block_type *type, uint8_t *packed, const tile_places *places, int first, int columns,
                           const uint8_t *rows, ptrdiff_t row_bytes, ptrdiff_t blocks)
{
    block_tile tile;
    uint8_t *line = packed + places->header_bytes + first * sizeof(uint32_t);
    uint16_t wide_zeros[TILE_N];
    uint8_t zeros[TILE_N];
    int not_finite = 0;
    for (int c = 0; c < TILE_N; c++) {
        wide_zeros[c] = (uint16_t)type->zero;
        zeros[c] = (uint8_t)type->zero;
    }
    for (ptrdiff_t block = 0; block < blocks; block++) {
        decode_block_of_tile(type, &tile, rows, row_bytes, block, columns, rows + TILE_N * row_bytes);
        for (int i = 0; i < type->lanes; i++, line += LINE_BYTES)
            copy_columns(line, tile.lanes[i], columns, sizeof(uint32_t));
        copy_columns(packed + places->scale[block] + 2 * first, tile.scale, columns, 2);
        not_finite |= has_not_finite(tile.scale, columns, type);
        if (type->has_minimum) {
            copy_columns(packed + places->minimum[block] + 2 * first, tile.minimum, columns, 2);
            not_finite |= has_not_finite(tile.minimum, columns, type);
        }
        for (int group = 0; group < type->groups; group++) {
            const ptrdiff_t index = block * type->groups + group;
            copy_columns(packed + places->sub_scale[index] + first, tile.sub_scale[group], columns, 1);
            if (type->has_minimum)
                copy_columns(packed + places->sub_minimum[index] + first, tile.sub_minimum[group], columns, 1);
        }
        if (places->zero_bytes)
            copy_columns(packed + places->zero[block] + places->zero_bytes * first,
                         places->zero_bytes == 2 ? (const void *)wide_zeros : zeros, columns, places->zero_bytes);
    }
    return !not_finite;
}

#endif
