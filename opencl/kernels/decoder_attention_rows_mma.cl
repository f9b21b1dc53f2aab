#include "decoder_attention_mma.cl"

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

#ifndef HEAD_DIM
#define HEAD_DIM 128
#define VALUE_DIM 128
#define HEADS 8
#define WAVES 8
#endif

#define ITEMS (LANES * WAVES)
#define STEPS (HEAD_DIM / 16)
#define HEAD_SETS ((HEADS + 7) / 8)
#define ALL_HEADS (8 * HEAD_SETS)
#define COLUMN_SETS (VALUE_DIM / 64)
#define ROOM_WIDTH (VALUE_DIM + 4) // the lanes of four heads use different banks
#define VALUES_EARLY (HEAD_DIM + VALUE_DIM <= 256) // otherwise registers do not suffice for keys and values
#define QUADS (VALUE_DIM / 4)

// Two pairs of float16 of one number each: the lower, or the higher, halves of two words.
static inline uint low_halves(uint a, uint b) { return (a & 0xffffu) | b << 16; }
static inline uint high_halves(uint a, uint b) { return a >> 16 | (b & 0xffff0000u); }

// The weight of sums whose maximum is `high` beside others.
static inline float beside(float high, float highest) { return high == -INFINITY ? 0 : native_exp2(high - highest); }

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
    const uint q_head_stride, __global const CACHE *restrict keys, __global const CACHE *restrict values,
    const uint num_heads, const uint num_kv_heads, const uint key_head, const uint value_head, const float scale,
    const float soft_cap, const int window, __global const float *restrict sinks, const uint gate_offset,
    __global OUTPUT *restrict output, __global float *partial, __global float2 *stats, __global uint *arrived)
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
    int page = first_page + (int)split * run + (int)wave;
    __global const CACHE *my_keys = keys + (ulong)kv_head * key_head + (PAGE_TOKENS * t + g / 2 + 4 * (g % 2)) * CHUNK;
    __global const CACHE *my_values = values + (ulong)kv_head * value_head + (PAGE_TOKENS * g + t) * CHUNK;

    uint number = page < my_end ? table[page] : 0;
    __global const float *row_q = q + (ulong)row * q_row_stride + first_head * q_head_stride;
    const float factor = soft_cap > 0 ? scale / soft_cap : scale * LOG2_E;
    uint4 queries[STEPS];
    UNROLLED for (uint j = 0; j < STEPS / 2; j++)
    {
        const uint at = CHUNK * (4 * j + t);
        const float8 x = g < HEADS ? vload8(0, row_q + g * q_head_stride + at) * factor : (float8)(0);
        const float8 y = 8 + g < HEADS ? vload8(0, row_q + (8 + g) * q_head_stride + at) * factor : (float8)(0);
        queries[2 * j] = (uint4)(PAIR(x.s01), PAIR(y.s01), PAIR(x.s23), PAIR(y.s23));
        queries[2 * j + 1] = (uint4)(PAIR(x.s45), PAIR(y.s45), PAIR(x.s67), PAIR(y.s67));
    }
    float4 sums[HEAD_SETS][4 * COLUMN_SETS];
    float high[HEAD_SETS], total[HEAD_SETS]; // of head 8 * set + g
    UNROLLED for (uint set = 0; set < HEAD_SETS; set++)
    {
        high[set] = -INFINITY;
        total[set] = 0;
        UNROLLED for (uint v = 0; v < 4 * COLUMN_SETS; v++) sums[set][v] = (float4)(0);
    }

    for (; page < my_end; page += WAVES) {
        __global const CACHE *page_keys = my_keys + (ulong)number * num_kv_heads * key_head;
        __global const CACHE *page_values = my_values + (ulong)number * num_kv_heads * value_head;
        uint4 key[STEPS / 2][2], value[COLUMN_SETS][4];
        UNROLLED for (uint j = 0; j < STEPS / 2; j++) UNROLLED for (uint n = 0; n < 2; n++) key[j][n] =
            load_once((__global const uint4 *)(page_keys + (4 * PAGE_TOKENS * j + 8 * n) * CHUNK));
#define READ_VALUES                                                                                     \
    UNROLLED for (uint u = 0; u < COLUMN_SETS; u++) UNROLLED for (uint n = 0; n < 4; n++) value[u][n] = \
        load_once((__global const uint4 *)(page_values + (8 * PAGE_TOKENS * u + 4 * n) * CHUNK));
        if (VALUES_EARLY)
            READ_VALUES
        if (page + WAVES < my_end)
            number = table[page + WAVES];
        issue_loads();

        float4 score[2];
        UNROLLED for (uint n = 0; n < 2; n++)
        {
            score[n] = (float4)(0);
            UNROLLED for (uint j = 0; j < STEPS / 2; j++)
            {
                score[n] = MMA(queries[2 * j], key[j][n].x, key[j][n].y, score[n]);
                score[n] = MMA(queries[2 * j + 1], key[j][n].z, key[j][n].w, score[n]);
            }
            if (soft_cap > 0)
                score[n] = (float4)(capped(score[n].x, soft_cap), capped(score[n].y, soft_cap),
                                    capped(score[n].z, soft_cap), capped(score[n].w, soft_cap));
        }
        if (!VALUES_EARLY)
            READ_VALUES
        const int before =
            newest - (PAGE_TOKENS * page + (int)t); // positions from the lane's first one to the row's own
        if (PAGE_TOKENS * (page + 1) > newest || newest - PAGE_TOKENS * page >= seen) {
            UNROLLED for (int n = 0; n < 2; n++)
            {
                const bool even = before - 8 * n >= 0 && before - 8 * n < seen;
                const bool odd = before - 8 * n - 4 >= 0 && before - 8 * n - 4 < seen;
                score[n] = (float4)(even ? score[n].x : -INFINITY, odd ? score[n].y : -INFINITY,
                                    even ? score[n].z : -INFINITY, odd ? score[n].w : -INFINITY);
            }
            // Values behind the end may be NaN, and a weight of 0 times a NaN would be a NaN.
            UNROLLED for (int n = 0; n < 4; n++) UNROLLED for (uint u = 0; u < COLUMN_SETS; u++) value[u][n] =
                before - 4 * n >= 0 ? value[u][n] : (uint4)(0);
        }

        uint2 weights[HEAD_SETS];
        UNROLLED for (uint set = 0; set < HEAD_SETS; set++)
        {
            const float4 x = set ? (float4)(score[0].zw, score[1].zw) : (float4)(score[0].xy, score[1].xy);
            float highest = fmax(high[set], fmax(fmax(x.x, x.y), fmax(x.z, x.w)));
            highest = fmax(highest, exchange(highest, 1));
            highest = fmax(highest, exchange(highest, 2));
            // A NaN is never the maximum, but its exponential is a NaN.
            const float zero = highest == -INFINITY ? 0 : highest;
            const float past = native_exp2(high[set] - zero);
            high[set] = highest;
            const float4 weight = (float4)(native_exp2(x.x - zero), native_exp2(x.y - zero), native_exp2(x.z - zero),
                                           native_exp2(x.w - zero));
            total[set] = fma(total[set], past, weight.x + weight.y + (weight.z + weight.w));
            weights[set] = (uint2)(PAIR(weight.xy), PAIR(weight.zw));
            if (ballot(past != 1)) {
                // The lane's columns of sums are heads 2t and 2t + 1.
                const float even = from_lane(past, 8 * t), odd = from_lane(past, 8 * t + 4);
                UNROLLED for (uint v = 0; v < 4 * COLUMN_SETS; v++) sums[set][v] *= (float4)(even, odd, even, odd);
            }
        }
#define VALUE_PRODUCT(u, i, word)                                                                                     \
    {                                                                                                                 \
        const uint4 columns =                                                                                         \
            (uint4)(low_halves(value[u][0].word, value[u][1].word), high_halves(value[u][0].word, value[u][1].word),  \
                    low_halves(value[u][2].word, value[u][3].word), high_halves(value[u][2].word, value[u][3].word)); \
        UNROLLED for (uint set = 0; set < HEAD_SETS; set++) sums[set][4 * (u) + (i)] =                                \
            MMA(columns, weights[set].x, weights[set].y, sums[set][4 * (u) + (i)]);                                   \
    }
        UNROLLED for (uint u = 0; u < COLUMN_SETS; u++)
        {
            VALUE_PRODUCT(u, 0, x)
            VALUE_PRODUCT(u, 1, y)
            VALUE_PRODUCT(u, 2, z)
            VALUE_PRODUCT(u, 3, w)
        }
    }

    // The waves' sums to local memory.
    UNROLLED for (uint set = 0; set < HEAD_SETS; set++)
    {
        total[set] += exchange(total[set], 1);
        total[set] += exchange(total[set], 2);
        if (t == 0)
            wave_stats[wave * ALL_HEADS + 8 * set + g] = (float2)(high[set], total[set]);
        UNROLLED for (uint u = 0; u < COLUMN_SETS; u++)
        {
            const float4 a = sums[set][4 * u], b = sums[set][4 * u + 1], c = sums[set][4 * u + 2];
            const float4 d = sums[set][4 * u + 3];
            const uint at = ((wave * ALL_HEADS + 8 * set + 2 * t) * ROOM_WIDTH + 64 * u + 8 * g) / 4;
            room4[at] = (float4)(a.x, a.z, b.x, b.z);
            room4[at + 1] = (float4)(c.x, c.z, d.x, d.z);
            room4[at + ROOM_WIDTH / 4] = (float4)(a.y, a.w, b.y, b.w);
            room4[at + ROOM_WIDTH / 4 + 1] = (float4)(c.y, c.w, d.y, d.w);
        }
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    const ulong out = (ulong)row * num_heads + first_head, part = get_group_id(1) * (ulong)num_heads + first_head;
    for (uint index = item; index < HEADS * QUADS; index += ITEMS) {
        const uint head = index / QUADS, column = 4 * (index % QUADS);
        float highest = -INFINITY, sum = 0;
        UNROLLED for (uint w = 0; w < WAVES; w++) highest = fmax(highest, wave_stats[w * ALL_HEADS + head].x);
        float4 value = (float4)(0);
        UNROLLED for (uint w = 0; w < WAVES; w++)
        {
            const float2 its = wave_stats[w * ALL_HEADS + head];
            const float weight = beside(its.x, highest);
            sum = fma(its.y, weight, sum);
            value += weight * room4[((w * ALL_HEADS + head) * ROOM_WIDTH + column) / 4];
        }
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
