// Packing on the device: from canonical form (marlin_cy/weights/canonical.py) to the layout drawn in common.cl.
//
// A launch writes columns [column_offset, column_offset + n) of one expert, whose first word is packed[base].
// column_offset and n are multiples of 8, so that a launch may own half of a strip's columns: half of the nibbles of
// each word. Such words are read, changed and written, so two launches for one strip must not run at the same
// time. The expert's words must be zero beforehand; padding is never written.
//
// Scales are written as ushorts and zero points as bytes. The device is little-endian.

// Moves rows 0 to 3 of a column, four nibbles, to their places in a word: nibbles 0, 4, 2, 6.
static inline uint spread(uint rows)
{
    return (rows & 0xfu) | ((rows & 0xf0u) << 12) | (rows & 0xf00u) | ((rows & 0xf000u) << 12);
}

// Eight packed rows of a column, one nibble each, from row `first` of packed K on.
//   words    [K / 8][n]
//   rows     the row of K of each packed row, -1 for padding; NULL for K's own order
static inline uint eight_rows(__global const uint *words, uint n, __global const int *rows, uint packed_k, uint first,
                              uint column)
{
    if (first >= packed_k)
        return 0;
    if (!rows)
        return words[(ulong)(first / 8) * n + column];
    uint gathered = 0;
    for (uint i = 0; i < 8; i++) {
        int row = rows[first + i];
        if (row >= 0)
            gathered |= (words[(ulong)(row / 8) * n + column] >> (4 * (row % 8)) & 15u) << (4 * i);
    }
    return gathered;
}

// Global size (32 * strips touched, k_blocks): one work-item packs one lane of a block, its four words.
//   words    [K / 8][n]
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

    uint result[4] = {0, 0, 0, 0};
    uint mine = 0; // the nibbles of a word that this launch owns
    for (uint half_strip = 0; half_strip < 2; half_strip++) {
        // A column below column_offset wraps around to a number above n.
        uint column = strip * STRIP_N + 8 * half_strip + lane / 4 - column_offset;
        if (column >= n)
            continue;
        mine |= 0x0f0f0f0fu << (4 * half_strip);
        for (uint half_block = 0; half_block < 2; half_block++) {
            uint first = BLOCK_K * block + 32 * half_block + 8 * (lane % 4);
            uint eight = eight_rows(words, n, rows, packed_k, first, column);
            result[2 * half_block] |= spread(eight) << (4 * half_strip);
            result[2 * half_block + 1] |= spread(eight >> 16) << (4 * half_strip);
        }
    }
    ulong word = base + ((ulong)strip * k_blocks + block) * BLOCK_WORDS;
    __global uint4 *place = (__global uint4 *)(packed + word) + lane;
    uint4 four = (uint4)(result[0], result[1], result[2], result[3]);
    *place = mine == 0xffffffffu ? four : four | (*place & ~mine);
}

// Global size (n, groups): one work-item packs the scale and the zero point of a column and a group.
//   scale, zero    float16 or bfloat16 as bits, and bytes: [*][n]; zero may be NULL
//   scale_rows     int32 [groups] from scale_rows_offset on: the row of scale and zero of each packed group, -1 for
//                  padding
__kernel void pack_scales(__global const ushort *restrict scale, __global const uchar *restrict zero, const uint n,
                          __global const int *restrict scale_rows, const ulong scale_rows_offset,
                          __global uint *restrict packed, const ulong scale_base, const ulong zero_base,
                          const uint column_offset)
{
    uint from = get_global_id(0), column = column_offset + from;
    uint group = get_global_id(1), groups = get_global_size(1);
    int row = scale_rows[scale_rows_offset + group];
    if (row < 0)
        return;
    ulong source = (ulong)row * n + from;
    ulong place = ((ulong)(column / STRIP_N) * groups + group) * STRIP_N + 2 * (column % 8) + column % STRIP_N / 8;
    ((__global ushort *)(packed + scale_base))[place] = scale[source];
    if (zero)
        ((__global uchar *)(packed + zero_base))[place] = zero[source];
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
