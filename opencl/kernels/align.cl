#include "align_few.cl"

// align: groups (token, choice) pairs by expert, in blocks.
//
// Build options
//   ALIGN_ITEMS   work-items in a work-group of `align`: a power of two

#ifndef ALIGN_ITEMS
#define ALIGN_ITEMS 256
#endif

// Pairs that are marked at a time, with one bit each in local memory.
#define TILE_WORDS (4 * ALIGN_ITEMS)
#define TILE_PAIRS (32 * TILE_WORDS)

// (sum over the work-items before this one, sum over all). `sums` may be reused on return.
//
// always_inline: PoCL 3.0 crashes if its own compiler passes inline a static function with barriers.
__attribute__((always_inline)) static inline uint2 sums_over_group(uint value, __local uint *sums)
{
    uint me = get_local_id(0);
    sums[me] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint distance = 1; distance < ALIGN_ITEMS; distance *= 2) {
        uint before = me >= distance ? sums[me - distance] : 0;
        barrier(CLK_LOCAL_MEM_FENCE);
        sums[me] += before;
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    uint2 result = (uint2)(sums[me] - value, sums[ALIGN_ITEMS - 1]);
    barrier(CLK_LOCAL_MEM_FENCE);
    return result;
}

// vLLM's moe_align_block_size. Slots from *past on are not written.
//
// There is a work-group for each expert. It counts the pairs of all experts, which gives the first slot of its expert.
// It marks the pairs of its expert, one bit each, and writes them in ascending order. Work-groups exchange no data, so
// one launch is enough.
//   ids          int32 [pairs]; an id outside 0 to num_experts - 1 is ignored
//   sorted_ids   int32 [pairs + num_experts * (block_size - 1)]; padding is `pairs`
//   expert_ids   int32 [length of sorted_ids / block_size]
//   past         int32 [1]: slots in use
//   counts       local uint [num_experts]
// The number of slots is below 2^31.
#define ALIGN_ARGS                                                                                      \
    __global const int *restrict ids, const ulong ids_offset, const uint pairs, const uint num_experts, \
        const uint block_size, __global int *restrict sorted_ids, const ulong sorted_offset,            \
        __global int *restrict expert_ids, const ulong expert_offset, __global int *restrict past,      \
        const ulong past_offset, __local uint *restrict counts
// The arguments of ALIGN_ARGS that align_expert takes.
#define ALIGN_NAMES                                                                                           \
    ids + ids_offset, pairs, num_experts, block_size, sorted_ids + sorted_offset, expert_ids + expert_offset, \
        past + past_offset, counts

// Aligns the pairs of one expert; called by a whole work-group.
//   marks         local uint [TILE_WORDS]
//   sums          local uint [ALIGN_ITEMS]
//   first_block   local uint [1]
__attribute__((always_inline)) static inline void align_expert(uint expert, __global const int *ids, uint pairs,
                                                               uint num_experts, uint block_size,
                                                               __global int *sorted_ids, __global int *expert_ids,
                                                               __global int *past, __local uint *counts,
                                                               __local uint *marks, __local uint *sums,
                                                               __local uint *first_block)
{
    const uint me = get_local_id(0);
    for (uint e = me; e < num_experts; e += ALIGN_ITEMS)
        counts[e] = 0;
    if (me == 0)
        *first_block = 0;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint pair = me; pair < pairs; pair += 4 * ALIGN_ITEMS) {
        uint e[4];
        load_experts(e, ids, pair, pairs, ALIGN_ITEMS);
        for (uint i = 0; i < 4; i++)
            if (e[i] < num_experts)
                atomic_inc(&counts[e[i]]);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    uint before = 0;
    for (uint e = me; e < expert; e += ALIGN_ITEMS)
        before += (counts[e] + block_size - 1) / block_size;
    if (before)
        atomic_add(first_block, before);
    barrier(CLK_LOCAL_MEM_FENCE);
    const uint first = *first_block, count = counts[expert], blocks = (count + block_size - 1) / block_size;
    __global int *slots = sorted_ids + (ulong)first * block_size;

    for (uint begin = 0, written = 0; written < count; begin += TILE_PAIRS) {
        for (uint i = 4 * me; i < 4 * me + 4; i++) // words that no other work-item reads
            marks[i] = 0;
        barrier(CLK_LOCAL_MEM_FENCE);
        uint end = min(pairs - begin, (uint)TILE_PAIRS);
        for (uint i = me; i < end; i += 4 * ALIGN_ITEMS) {
            uint e[4];
            load_experts(e, ids + begin, i, end, ALIGN_ITEMS);
            for (uint j = 0; j < 4; j++)
                if (e[j] == expert)
                    atomic_or(&marks[(i + j * ALIGN_ITEMS) / 32], 1u << (i + j * ALIGN_ITEMS) % 32);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        uint own = 0;
        for (uint i = 4 * me; i < 4 * me + 4; i++)
            own += popcount(marks[i]);
        uint2 marked = sums_over_group(own, sums);
        uint slot = written + marked.x;
        for (uint i = 4 * me; i < 4 * me + 4; i++)
            for (uint left = marks[i]; left != 0; left &= left - 1)
                slots[slot++] = (int)(begin + 32 * i + 31 - clz(left & -left));
        written += marked.y;
    }
    for (uint slot = count + me; slot < blocks * block_size; slot += ALIGN_ITEMS)
        slots[slot] = (int)pairs;
    for (uint block = me; block < blocks; block += ALIGN_ITEMS)
        expert_ids[first + block] = (int)expert;
    if (expert == num_experts - 1 && me == 0)
        *past = (int)((first + blocks) * block_size);
}

__attribute__((reqd_work_group_size(ALIGN_ITEMS, 1, 1))) __kernel void align(ALIGN_ARGS)
{
    __local uint marks[TILE_WORDS], sums[ALIGN_ITEMS], first_block;
    align_expert(get_group_id(0), ALIGN_NAMES, marks, sums, &first_block);
}
