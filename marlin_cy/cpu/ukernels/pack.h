/* From words as checkpoints have them, eight values of K to one, lowest first, to the lanes of a packed tile (drawn in
 * ukernel.h) and back. Plain C that compilers vectorise: what bounds it is memory.
 *
 *   lanes   the first block's first column of these; TILE_N lanes from a block to the next
 *   words   the first column; `stride` words from a row to the next
 *   rows    [BLOCK_K * blocks] the value of K at each packed position, -1 for none, packed as a code of 0;
 *           or NULL: block b is row b of words
 *
 * `columns` is at most TILE_N; nothing overlaps.
 */
#ifndef MARLIN_CY_PACK_H
#define MARLIN_CY_PACK_H

#include <string.h>

#include "ukernel.h"

/* Exchanges the bits of x under mask with those `shift` higher. */
static inline uint32_t exchange_bits(uint32_t x, uint32_t mask, int shift)
{
    const uint32_t differ = (x ^ x >> shift) & mask;
    return x ^ differ ^ differ << shift;
}

/* Nibbles 0 1 2 3 4 5 6 7, lowest first, to 0 4 1 5 2 6 3 7. */
static inline uint32_t lane_of_word(uint32_t word)
{
    return exchange_bits(exchange_bits(word, 0x0000ff00, 8), 0x00f000f0, 4);
}

static inline uint32_t word_of_lane(uint32_t lane)
{
    return exchange_bits(exchange_bits(lane, 0x00f000f0, 4), 0x0000ff00, 8);
}

/* Where value i of a block lies in a lane. */
static inline int lane_shift(int i) { return 8 * (i % 4) + 4 * (i / 4); }

/* `columns` is a constant where this is inlined, and so in the three that follow. */
static inline void pack_words(uint32_t *restrict lanes, const uint32_t *restrict words, ptrdiff_t stride,
                              int64_t blocks, int columns)
{
    for (int64_t b = 0; b < blocks; b++, lanes += TILE_N, words += stride)
        for (int c = 0; c < columns; c++)
            lanes[c] = lane_of_word(words[c]);
}

static inline void pack_rows(uint32_t *restrict lanes, const uint32_t *restrict words, ptrdiff_t stride,
                             const int32_t *restrict rows, int64_t blocks, int columns)
{
    static const uint32_t nothing[TILE_N];
    for (int64_t b = 0; b < blocks; b++, lanes += TILE_N, rows += BLOCK_K) {
        const uint32_t *source[BLOCK_K];
        int shift[BLOCK_K];
        for (int i = 0; i < BLOCK_K; i++) {
            source[i] = rows[i] < 0 ? nothing : words + rows[i] / BLOCK_K * stride;
            shift[i] = 4 * (rows[i] & 7);
        }
        for (int c = 0; c < columns; c++) {
            uint32_t lane = 0;
            for (int i = 0; i < BLOCK_K; i++)
                lane |= (source[i][c] >> shift[i] & 15) << lane_shift(i);
            lanes[c] = lane;
        }
    }
}

static inline void unpack_words(uint32_t *restrict words, ptrdiff_t stride, const uint32_t *restrict lanes,
                                int64_t blocks, int columns)
{
    for (int64_t b = 0; b < blocks; b++, lanes += TILE_N, words += stride)
        for (int c = 0; c < columns; c++)
            words[c] = word_of_lane(lanes[c]);
}

static inline void unpack_rows(uint32_t *restrict words, ptrdiff_t stride, const uint32_t *restrict lanes,
                               const int32_t *restrict rows, int64_t blocks, int columns)
{
    for (int64_t b = 0; b < blocks; b++, lanes += TILE_N, rows += BLOCK_K)
        for (int i = 0; i < BLOCK_K; i++) {
            if (rows[i] < 0)
                continue;
            uint32_t *const word = words + rows[i] / BLOCK_K * stride;
            for (int c = 0; c < columns; c++)
                word[c] |= (lanes[c] >> lane_shift(i) & 15) << 4 * (rows[i] & 7);
        }
}

/* Some columns' scales or zero points, `bytes` each. */
static inline void copy_columns(void *to, const void *source, int columns, int bytes)
{
    if (columns == TILE_N)
        memcpy(to, source, (size_t)bytes * TILE_N);
    else
        memcpy(to, source, (size_t)bytes * columns);
}

static void pack_tile(uint32_t *lanes, const uint32_t *words, ptrdiff_t stride, const int32_t *rows, int64_t blocks,
                      int columns)
{
    if (rows && columns == TILE_N)
        pack_rows(lanes, words, stride, rows, blocks, TILE_N);
    else if (rows)
        pack_rows(lanes, words, stride, rows, blocks, columns);
    else if (columns == TILE_N)
        pack_words(lanes, words, stride, blocks, TILE_N);
    else
        pack_words(lanes, words, stride, blocks, columns);
}

/* The way back; by rows, codes are or-ed into words, which the caller has set to 0. */
static void unpack_tile(uint32_t *words, ptrdiff_t stride, const uint32_t *lanes, const int32_t *rows, int64_t blocks,
                        int columns)
{
    if (rows && columns == TILE_N)
        unpack_rows(words, stride, lanes, rows, blocks, TILE_N);
    else if (rows)
        unpack_rows(words, stride, lanes, rows, blocks, columns);
    else if (columns == TILE_N)
        unpack_words(words, stride, lanes, blocks, TILE_N);
    else
        unpack_words(words, stride, lanes, blocks, columns);
}

#endif
