#include "decoder_attention_pages_mma.cl"
#include "attention_share.cl"

// attend_rows: attention of single rows over the paged cache by tensor cores, at the speed of memory.
//
// A work-group has a row, up to 16 heads of it that read the same head of keys and values, and a run of pages: that of
// its split. Its waves take the run's pages in turn. A wave reads a page of keys and of values from memory right into the
// operands of products, has a running maximum of its own, and keeps its sums in registers:
//
//   scores    m16n8k16: 16 heads, 8 positions, 16 of HEAD_DIM       operands: queries, keys
//   values    m16n8k16: 16 columns, 8 heads, 16 positions           operands: values, weights
//
// 16 bytes are eight values of a position. Lane 4g + t has of keys chunk 4j + t of position g / 2 + 4 * (g % 2), and
// eight more than that: operands of two products each, as in decoder_attention_tiles_mma.cl. So column 2t of the first product
// is position t, and column 2t + 1 is position t + 4: of values the lane reads chunk 8u + g of positions t, t + 4, t + 8 and
// t + 12, and pairs of these four are the rows of the second product: rows g and g + 8 of product 4u + i are values
// 2i and 2i + 1 of the chunk. The sums of the first product are in the order of the second operand of the second one.
//
// The sums of the waves are joined in local memory. With several splits the work-group that arrives last joins those.
//
// Build options
//   HEAD_DIM     a multiple of 32
//   VALUE_DIM    a multiple of 64
//   HEADS        at most 16
//   WAVES
//   CACHE_TYPE   1 or 2

static inline void store_quad(float4 value, __global const float *gate, __global OUTPUT *output, ulong at)
{
    store_pair(gate ? gated(value.xy, gate) : value.xy, output, at);
    store_pair(gate ? gated(value.zw, gate + 2) : value.zw, output, at + 2);
}

// Arguments as of `attend` in decoder_attention.cl, and
//   arrived    uint [tiles][heads' blocks], zeros before and after a launch: work-groups that have written their split
// Groups: heads' blocks, tiles, splits.
WAVE_OF_32 __attribute__((reqd_work_group_size(ITEMS, 1, 1))) __kernel void attend_rows(
    __global const int *restrict batch, const uint tiles, __global const float *restrict q, const uint q_row_stride,
    const uint q_head_stride, CACHE_ARGS(const CACHE), const uint num_heads, const uint num_kv_heads,
    const uint key_head, const uint value_head, const float scale, const float soft_cap, const int window,
    __global const float *restrict sinks, const uint gate_offset, __global OUTPUT *restrict output,
    __global float *partial, __global float2 *stats, __global uint *arrived)
{
    __local float4 room4[WAVES * ALL_HEADS * ROOM_WIDTH / 4];
    __local float *room = (__local float *)room4;
    __local float2 wave_stats[WAVES * ALL_HEADS];
    __local uint is_last;
    const uint item = get_local_id(0), lane = item % LANES, wave = item / LANES, g = lane / 4, t = lane % 4;
    const uint split = get_group_id(2), splits = get_num_groups(2);
    const uint heads_per_kv = num_heads / num_kv_heads, blocks = heads_per_kv / HEADS;
    const uint kv_head = get_group_id(0) / blocks;
    const uint first_head = kv_head * heads_per_kv + get_group_id(0) % blocks * HEADS;
    const uint row = batch[tiles + 4 * get_group_id(1)];
    const int4 record = STEP_ROW(batch, row);
    __global const int *table = batch + record.z;
    const int newest = record.y, seen = window ? window : INT_MAX;
    const int first_page = newest >= seen ? (newest - seen + 1) / PAGE_TOKENS : 0;
    const int end_page = newest / PAGE_TOKENS + 1;
    const int run = (end_page - first_page + (int)splits - 1) / (int)splits;
    const int my_end = min(end_page, first_page + ((int)split + 1) * run);
    const int page = first_page + (int)split * run + (int)wave;
    const Pages my_keys = KEYS_FROM((ulong)kv_head * key_head + (PAGE_TOKENS * t + g / 2 + 4 * (g % 2)) * CHUNK);
    const Pages my_values = VALUES_FROM((ulong)kv_head * value_head + (PAGE_TOKENS * g + t) * CHUNK);
    __global const float *row_q = q + (ulong)row * q_row_stride + first_head * q_head_stride;
    const float factor = soft_cap > 0 ? scale / soft_cap : scale * LOG2_E;
    uint4 queries[STEPS];
#define ROW_Q(head, at) vload8(0, row_q + (head) * q_head_stride + (at))
    READ_QUERIES(queries, ROW_Q)
    attend_pages(queries, table, page < my_end ? table[page] : 0, page, my_end, my_keys, my_values,
                 (ulong)num_kv_heads * key_head, (ulong)num_kv_heads * value_head, newest, seen, soft_cap, room4,
                 wave_stats);
    barrier(CLK_LOCAL_MEM_FENCE);
    const ulong out = (ulong)row * num_heads + first_head, part = get_group_id(1) * (ulong)num_heads + first_head;
    for (uint index = item; index < HEADS * QUADS; index += ITEMS) {
        const uint head = index / QUADS, column = 4 * (index % QUADS);
        float highest, sum;
        const float4 value = join_waves(head, column, &highest, &sum, room4, wave_stats);
        if (splits == 1) {
            const float share = share_of(highest, sum, sinks ? sinks[first_head + head] * LOG2_E : -INFINITY);
            __global const float *gate = gate_offset ? row_q + head * q_head_stride + gate_offset + column : 0;
            store_quad(value * share, gate, output, (out + head) * VALUE_DIM + column);
        } else {
            const ulong place = (part + head) * splits + split;
            *(__global float4 *)(partial + place * VALUE_DIM + column) = value;
            if (column == 0)
                stats[place] = (float2)(highest, sum);
        }
    }
    if (splits == 1)
        return;

    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE); // the split is written before the work-group is counted
    __global uint *counter = arrived + get_group_id(1) * get_num_groups(0) + get_group_id(0);
    if (item == 0)
        is_last = arrive(counter) == splits - 1;
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    if (!is_last)
        return;
    if (item == 0)
        *counter = 0;
    // The factor of each split, in local memory; `room` holds HEADS * splits floats.
    for (uint head = wave; head < HEADS; head += WAVES) {
        __global const float2 *its = stats + (part + head) * splits;
        float highest = -INFINITY, sum = 0;
        for (uint s = lane; s < splits; s += LANES)
            highest = fmax(highest, its[s].x);
        UNROLLED for (uint mask = 1; mask < LANES; mask *= 2) highest = fmax(highest, exchange(highest, mask));
        for (uint s = lane; s < splits; s += LANES)
            sum = fma(its[s].y, beside(its[s].x, highest), sum);
        UNROLLED for (uint mask = 1; mask < LANES; mask *= 2) sum += exchange(sum, mask);
        const float share = share_of(highest, sum, sinks ? sinks[first_head + head] * LOG2_E : -INFINITY);
        for (uint s = lane; s < splits; s += LANES)
            room[head * splits + s] = beside(its[s].x, highest) * share;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint index = item; index < HEADS * QUADS; index += ITEMS) {
        const uint head = index / QUADS, column = 4 * (index % QUADS);
        __global const float *from = partial + (part + head) * splits * VALUE_DIM + column;
        float4 value = (float4)(0);
#pragma unroll 8
        for (uint s = 0; s < splits; s++)
            value += room[head * splits + s] * *(__global const float4 *)(from + s * VALUE_DIM);
        __global const float *gate = gate_offset ? row_q + head * q_head_stride + gate_offset + column : 0;
        store_quad(value, gate, output, (out + head) * VALUE_DIM + column);
    }
}
