// Packing on the device: from canonical form (marlin_cy/weights/canonical.py) to the layout drawn in common.cl.
//
// A launch writes columns [column_offset, column_offset + n) of one expert, whose first word is packed[base].
// column_offset and n are multiples of 8, so that a launch may own half of a strip's columns: half of the bits of
// each word. Such words are read, changed and written, so two launches for one strip must not run at the same
// time. The expert's words must be zero beforehand; padding is never written.
//
// Build options
//   CODE_BITS   4 or 8 (4)
//   GROUP_16    1: groups of 16 rows, which lie as common.cl says (0)

#ifndef CODE_BITS
#define CODE_BITS 4
#endif
#ifndef GROUP_16
#define GROUP_16 0
#endif
#define WORD_ROWS (32 / CODE_BITS) // rows in a canonical word
#define CODE_MASK ((1u << CODE_BITS) - 1)
#define LANE_WORDS (4 * CODE_BITS / 4) // of a block

#if CODE_BITS == 4
// Moves rows 0 to 3 of a column, four nibbles, to their places in a word: nibbles 0, 4, 2, 6.
static inline uint spread(uint rows)
{
    return (rows & 0xfu) | ((rows & 0xf0u) << 12) | (rows & 0xf00u) | ((rows & 0xf000u) << 12);
}

#define OWN_COLUMN 0x0f0f0f0fu // the bits of column g in a word; those of column g + 8 are CODE_BITS higher
#else
#define OWN_COLUMN 0x00ff00ffu
#endif

// Four packed rows of a column, from row `first` of packed K on, a multiple of 4; the first row in the lowest bits.
//   words    [K / WORD_ROWS][n]
//   rows     the row of K of each packed row, -1 for padding; NULL for K's own order
static inline uint four_rows(__global const uint *words, uint n, __global const int *rows, uint packed_k, uint first,
                             uint column)
{
    if (first >= packed_k)
        return 0;
    if (!rows)
        return words[(ulong)(first / WORD_ROWS) * n + column] >> CODE_BITS * (first % WORD_ROWS);
    uint gathered = 0;
    for (uint i = 0; i < 4; i++) {
        const int row = rows[first + i];
        if (row >= 0)
            gathered |= (words[(ulong)(row / WORD_ROWS) * n + column] >> CODE_BITS * (row % WORD_ROWS) & CODE_MASK)
                        << (CODE_BITS * i);
    }
    return gathered;
}

// The first of a lane's four rows of a step, in packed K.
static inline uint rows_of_step(uint block, uint step, uint t)
{
    const uint of_half = GROUP_16 ? 16 * (step % 2) + 4 * t : 8 * t + 4 * (step % 2);
    return BLOCK_K * block + 32 * (step / 2) + of_half;
}

// Global size (32 * strips touched, k_blocks): one work-item packs one lane of a block, its words.
//   words    [K / WORD_ROWS][n]
//   rows     [packed_k] from rows_offset on, or NULL
__kernel void pack_words(__global const uint *restrict words, const uint n, __global const int *restrict rows,
                         const ulong rows_offset, const uint packed_k, __global uint *restrict packed, const ulong base,
                         const uint column_offset)
{
    uint lane = get_global_id(0) % 32;
    uint strip = column_offset / STRIP_N + get_global_id(0) / 32;
    uint block = get_global_id(1), k_blocks = get_global_size(1);
    if (rows)
        rows += rows_offset;

    uint result[LANE_WORDS];
    for (uint i = 0; i < LANE_WORDS; i++)
        result[i] = 0;
    uint mine = 0; // the bits of a word that this launch owns
    for (uint half_strip = 0; half_strip < 2; half_strip++) {
        // A column below column_offset wraps around to a number above n.
        uint column = strip * STRIP_N + 8 * half_strip + lane / 4 - column_offset;
        if (column >= n)
            continue;
        mine |= OWN_COLUMN << (CODE_BITS * half_strip);
        for (uint step = 0; step < 4; step++) {
            const uint four = four_rows(words, n, rows, packed_k, rows_of_step(block, step, lane % 4), column);
#if CODE_BITS == 4
            result[step] |= spread(four) << (4 * half_strip);
#else
            result[2 * step] |= ((four & 0xffu) | (four & 0xff00u) << 8) << (8 * half_strip);
            result[2 * step + 1] |= ((four >> 16 & 0xffu) | (four >> 8 & 0xff0000u)) << (8 * half_strip);
#endif
        }
    }
    ulong word = base + ((ulong)strip * k_blocks + block) * (BLOCK_WORDS * CODE_BITS / 4);
    __global uint4 *place = (__global uint4 *)(packed + word) + lane;
    for (uint i = 0; i < LANE_WORDS / 4; i++) {
        const uint4 four = vload4(i, result);
        place[32 * i] = mine == 0xffffffffu ? four : four | (place[32 * i] & ~mine);
    }
}

// Global size (n, packed rows of the part): one work-item packs a value of a scale record. A packed row is a group, or a
// block of 256 rows.
//   values         bytes [*][n][size]; size: 1, 2 or 4
//   from_rows      int32 [packed rows] from from_offset on: the row of values of each packed row, -1 for padding
//   base           bytes from the start of packed to the value of column 0 of the expert
//   record_bytes   bytes from one pair of columns to the next
__kernel void pack_values(__global const uchar *restrict values, const uint size, const uint n,
                          __global const int *restrict from_rows, const ulong from_offset,
                          __global uint *restrict packed, const ulong base, const uint record_bytes,
                          const uint column_offset)
{
    const uint from = get_global_id(0), column = column_offset + from;
    const uint to_row = get_global_id(1), to_rows = get_global_size(1);
    const int row = from_rows[from_offset + to_row];
    if (row < 0)
        return;
    const ulong source = (ulong)row * n + from;
    const ulong pair = ((ulong)(column / STRIP_N) * to_rows + to_row) * 8 + column % 8;
    __global uchar *to = (__global uchar *)packed + base + pair * record_bytes + column % STRIP_N / 8 * size;
    if (size == 1)
        *to = values[source];
    else if (size == 2)
        *(__global ushort *)to = ((__global const ushort *)values)[source];
    else
        *(__global uint *)to = ((__global const uint *)values)[source];
}

// A bfloat16 times 2^exponent, computed from integers, as a device may flush small floats to zero.
static inline float scaled_bfloat16(ushort bits, int exponent)
{
    const int field = bits >> 7 & 0xff, digits = (bits & 0x7f) | (field ? 0x80 : 0);
    return ldexp((bits & 0x8000 ? -1.0f : 1.0f) * digits, max(field, 1) - 134 + exponent);
}

// Global size (scales of an expert, experts): multiplies the scales of all experts of a part by 2^exponent, and stores
// them as float16.
//   scale_base   uints from an expert's first word to its scales
//   bfloat16     1: the scales are bfloat16 before; 0: float16
__kernel void rescale(__global uint *restrict packed, const ulong expert_words, const ulong scale_base,
                      const int exponent, const int bfloat16)
{
    __global half *scales = (__global half *)(packed + get_global_id(1) * expert_words + scale_base);
    const size_t i = get_global_id(0);
    const float scaled = bfloat16 ? scaled_bfloat16(((__global const ushort *)scales)[i], exponent)
                                  : ldexp(vload_half(i, scales), exponent);
    vstore_half_rte(scaled, i, scales);
}
