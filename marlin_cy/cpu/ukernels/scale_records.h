/* The scale records on the CPU: one row each. The Python side of a row is in marlin_cy/weights/scale_records.py, which
 * has the formulas; tests/test_constants.py compares the two. The numbers are defined here only: Python code finds a
 * number by the row's name.
 *
 * A group of a packed tile has a record of 16 scales, and then 16 minima or 16 zero points. A record of two levels has
 * sub-scales and sub-minima instead, of one byte each, and no zero points. It also has a float16 block scale, and a
 * float16 block minimum if there are minima, for every 256 rows of K. The header of a tile:
 *
 *   one level    | group 0 | group 1 | ...
 *   two levels   | block 0: 16 scales, 16 minima | group 0 | group 1 | .. | block 1 | the groups of block 1 | ...
 */
#ifndef MARLIN_CY_SCALE_RECORDS_H
#define MARLIN_CY_SCALE_RECORDS_H

#include <stddef.h>
#include <stdint.h>

#include "code_types.h"

enum {
    SCALES_F16 = 0,
    SCALES_BF16 = 1,
    SCALES_F32 = 2,
    SCALES_F16_MIN = 3,
    SCALES_F32_MIN = 4,
    SCALES_TWO_LEVEL = 5,
    SCALES_TWO_LEVEL_MIN = 6,
    SCALES_COUNT = 7
};

enum {
    SCALE_BLOCK_K = 256,  /* rows of K that share a block scale */
    BLOCK_SCALE_BYTES = 2 /* float16 */
};

typedef struct {
    const char *name;   /* of the row in Python */
    int8_t scale_bytes; /* of a scale or a sub-scale */
    int8_t has_minimum;
    int8_t has_blocks; /* two levels */
} scale_record;

static const scale_record scale_records[SCALES_COUNT] = {
    [SCALES_F16] = {.name = "float16", .scale_bytes = 2},
    [SCALES_BF16] = {.name = "bfloat16", .scale_bytes = 2},
    [SCALES_F32] = {.name = "float32", .scale_bytes = 4},
    [SCALES_F16_MIN] = {.name = "float16_min", .scale_bytes = 2, .has_minimum = 1},
    [SCALES_F32_MIN] = {.name = "float32_min", .scale_bytes = 4, .has_minimum = 1},
    [SCALES_TWO_LEVEL] = {.name = "two_level", .scale_bytes = 1, .has_blocks = 1},
    [SCALES_TWO_LEVEL_MIN] = {.name = "two_level_min", .scale_bytes = 1, .has_minimum = 1, .has_blocks = 1},
};

/* Whether a group stores zero points. If not, every zero point is constant_zero. */
static inline int stores_zeros(int scales)
{
    return !scale_records[scales].has_minimum && !scale_records[scales].has_blocks;
}

static inline int constant_zero(int scales, int codes)
{
    return scale_records[scales].has_minimum ? 0 : code_types[codes].symmetric_zero;
}

/* The places of records in a tile's header, in bytes. */
typedef struct {
    int group_bytes;    /* of a group's record */
    int minimum_offset; /* of the minima, or the zero points, in a group's record */
    int block_bytes;    /* of the block scales and minima of 256 rows; 0: one level */
    int block_shift;    /* with two levels, a block has 2^block_shift groups */
} header_layout;

/* `group_k` is the number of rows in a packed group. */
static inline header_layout layout_of_header(int scales, int codes, int group_k)
{
    const scale_record *const record = &scale_records[scales];
    header_layout layout = {
        .group_bytes = TILE_N * record->scale_bytes,
        .minimum_offset = TILE_N * record->scale_bytes,
        .block_bytes = record->has_blocks * TILE_N * BLOCK_SCALE_BYTES * (1 + record->has_minimum),
    };
    if (record->has_minimum)
        layout.group_bytes += TILE_N * record->scale_bytes;
    else if (stores_zeros(scales))
        layout.group_bytes += TILE_N * code_types[codes].zero_bytes;
    if (record->has_blocks)
        for (int groups = SCALE_BLOCK_K / group_k; groups > 1; groups /= 2)
            layout.block_shift++;
    return layout;
}

/* Where the record of a group is in memory. */
typedef struct {
    const uint8_t *scale;   /* 16 scales or sub-scales */
    const uint8_t *minimum; /* 16 minima, sub-minima or zero points, if the record has them */
    const uint8_t *block;   /* with two levels, 16 block scales and 16 block minima */
} group_record;

/* Record `g` of a header, whose record 0 begins a block if there are two levels. */
static inline group_record record_of(const uint8_t *header, const header_layout *layout, ptrdiff_t g)
{
    const uint8_t *scale = header + g * layout->group_bytes, *block = NULL;
    if (layout->block_bytes) {
        const ptrdiff_t blocks = g >> layout->block_shift;
        block = header + blocks * (layout->block_bytes + ((ptrdiff_t)layout->group_bytes << layout->block_shift));
        scale += (blocks + 1) * layout->block_bytes;
    }
    return (group_record){scale, scale + layout->minimum_offset, block};
}

#endif
