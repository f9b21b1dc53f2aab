/* Convert words, as checkpoints store them (eight values of K per word, or four of 8 bits, lowest bits first), to the
 * lanes of a packed tile (drawn in ukernel.h). Plain C that compilers vectorise; memory bandwidth bounds it.
 *
 *   lanes      first block, first column to convert; the next block is TILE_N lanes further, or twice that with 8 bits
 *   words      first block, first column to convert; the next block is `stride` words further, or twice that
 *   rows       [LANE_K * blocks] row of K at each packed position, -1 for padding (packed as code 0); NULL for the order
 *              of K itself
 *
 * `columns` is at most TILE_N. The memory areas do not overlap.
 */
#ifndef MARLIN_CY_PACK_H
#define MARLIN_CY_PACK_H

#include <string.h>

#include "lanes.h"

/* Bit position of value i of a block, in a word and in a lane. */
static inline int shift_in_word(int i) { return 4 * i; }

static inline int shift_in_lane(int i) { return 8 * (i % 4) + 4 * (i / 4); }

/* Convert and reorder. `columns` is a constant where this is inlined. */
static inline void gather_blocks(uint32_t *restrict lanes, const uint32_t *restrict words, ptrdiff_t stride,
                                 const int32_t *restrict rows, int64_t blocks, int columns)
{
    static const uint32_t nothing[TILE_N];
    for (int64_t b = 0; b < blocks; b++, lanes += TILE_N, rows += LANE_K) {
        const uint32_t *source[LANE_K];
        int shift[LANE_K];
        for (int i = 0; i < LANE_K; i++) {
            source[i] = rows[i] < 0 ? nothing : words + rows[i] / LANE_K * stride;
            shift[i] = shift_in_word(rows[i] & (LANE_K - 1));
        }
        for (int c = 0; c < columns; c++) {
            uint32_t block = 0;
            for (int i = 0; i < LANE_K; i++)
                block |= (source[i][c] >> shift[i] & 15) << shift_in_lane(i);
            lanes[c] = block;
        }
    }
}

/* `columns` is a constant where this is inlined. */
static inline void pack_columns(uint32_t *restrict lanes, const uint32_t *restrict words, ptrdiff_t stride,
                                const int32_t *rows, int64_t blocks, int columns)
{
    if (rows) {
        gather_blocks(lanes, words, stride, rows, blocks, columns);
        return;
    }
    for (int64_t b = 0; b < blocks; b++, lanes += TILE_N, words += stride)
        for (int c = 0; c < columns; c++)
            lanes[c] = lane_of_word(words[c]);
}

/* Codes of 8 bits: a lane is a word. `lines` is the number of rows of words. */
static inline void pack_bytes(uint32_t *restrict lanes, const uint32_t *restrict words, ptrdiff_t stride,
                              const int32_t *rows, int64_t lines, int columns)
{
    enum { WORD_K = 4 };
    for (int64_t line = 0; line < lines; line++, lanes += TILE_N) {
        if (!rows) {
            memcpy(lanes, words + line * stride, sizeof *lanes * (size_t)columns);
            continue;
        }
        for (int c = 0; c < columns; c++) {
            uint32_t lane = 0;
            for (int i = 0; i < WORD_K; i++) {
                const int32_t row = rows[WORD_K * line + i];
                if (row >= 0)
                    lane |= (words[row / WORD_K * stride + c] >> (8 * (row % WORD_K)) & 255) << (8 * i);
            }
            lanes[c] = lane;
        }
    }
}

static void pack_tile(uint32_t *lanes, const uint32_t *words, ptrdiff_t stride, const int32_t *rows, int64_t blocks,
                      int columns, int bits)
{
    if (bits == 8)
        pack_bytes(lanes, words, stride, rows, 2 * blocks, columns);
    else if (columns == TILE_N)
        pack_columns(lanes, words, stride, rows, blocks, TILE_N);
    else
        pack_columns(lanes, words, stride, rows, blocks, columns);
}

#endif
