/* Lines of a packed tile: the order of codes in a lane, and copies of some columns of a line. */
#ifndef MARLIN_CY_LANES_H
#define MARLIN_CY_LANES_H

#include <string.h>

#include "ukernel.h"

#if defined(__GNUC__) || defined(__clang__)
#define PREFETCH_LINE(address) __builtin_prefetch(address)
#else
#define PREFETCH_LINE(address) ((void)(address))
#endif

/* Exchange the bits of x under `mask` with the bits that are `shift` positions higher. */
static inline uint32_t exchange_bits(uint32_t x, uint32_t mask, int shift)
{
    const uint32_t differ = (x ^ x >> shift) & mask;
    return x ^ differ ^ differ << shift;
}

/* Reorder nibbles 0 1 2 3 4 5 6 7, lowest first, to 0 4 1 5 2 6 3 7. */
static inline uint32_t lane_of_word(uint32_t word)
{
    return exchange_bits(exchange_bits(word, 0x0000ff00, 8), 0x00f000f0, 4);
}

static inline uint32_t word_of_lane(uint32_t lane)
{
    return exchange_bits(exchange_bits(lane, 0x00f000f0, 4), 0x0000ff00, 8);
}

/* The lane of eight codes of 4 bits, one in the low nibble of each byte. The high nibbles are ignored. */
static inline uint32_t lane_of_bytes(uint64_t codes)
{
    codes &= 0x0f0f0f0f0f0f0f0f;
    return (uint32_t)(codes | codes >> 28);
}

/* Copy the scales, minima or zero points of some columns; each has `bytes` bytes. */
static inline void copy_columns(void *to, const void *source, int columns, int bytes)
{
    if (columns == TILE_N)
        memcpy(to, source, (size_t)bytes * TILE_N);
    else
        memcpy(to, source, (size_t)bytes * columns);
}

#endif
