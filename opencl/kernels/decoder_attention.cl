#include "decoder.cl"

// Attention over the paged cache, with a running maximum (Milakov and Gimelshein, "Online normalizer calculation for
// softmax", 2018; Dao et al., "FlashAttention", 2022).
//
// A work-group has QUERIES queries: HEADS heads of each of the rows of a tile, all of which read the same head of keys
// and values. It goes through the positions that its rows see, KEYS of them at a time:
//
//   scores     a work-item has one set of queries and every SCORE_LANES-th position      to local memory
//   weights    TEAM work-items for each query: maximum, exponentials, sum
//   values     a work-item has one set of queries, eight columns, and every KEY_SETS-th position
//
//                 positions                                           columns, eight at a time
//              +-----------------+                                  +-----------------+
//   query set  | lane 0 1 2 ...  |  scores            query set     | column lane     |  sums in registers,
//   0 .. SETS-1|                 |                    0 .. SETS-1   | 0 1 2 ...       |  KEY_SETS of them, added at the end
//              +-----------------+                                  +-----------------+
//
// For few tiles there are many splits: each has a run of the positions, and `merge_splits` joins their results.
//
// Build options
//   ATTEND_ITEMS               work-items of a work-group
//   HEAD_DIM, VALUE_DIM        multiples of 8
//   QUERIES, HEADS             QUERIES is a multiple of HEADS and of QUERY_SETS
//   QUERY_SETS, KEY_SETS       VALUE_DIM / 8 * QUERY_SETS * KEY_SETS is at most ATTEND_ITEMS
//   KEYS                       a multiple of SCORE_LANES

#ifndef ATTEND_ITEMS
#define ATTEND_ITEMS 128
#endif
#ifndef HEAD_DIM
#define HEAD_DIM 128
#define VALUE_DIM 128
#define QUERIES 8
#define HEADS 8
#define QUERY_SETS 1
#define KEY_SETS 8
#define KEYS 128
#endif

#define SET_QUERIES (QUERIES / QUERY_SETS)
#define SCORE_LANES (ATTEND_ITEMS / QUERY_SETS)
#define COLUMN_LANES (VALUE_DIM / CHUNK)
#define TEAM (ATTEND_ITEMS / QUERIES)
#define TILE_ROWS (QUERIES / HEADS)
#define ROOM (QUERIES * HEAD_DIM > ATTEND_ITEMS * CHUNK ? QUERIES * HEAD_DIM : ATTEND_ITEMS * CHUNK)
#define MAX_MERGE_ITEMS 64

static inline float dot8(float8 a, float8 b)
{
    const float4 sum = fma(a.lo, b.lo, a.hi * b.hi);
    return sum.x + sum.y + (sum.z + sum.w);
}

// An output value, from the sum of weighted values.
//   sink    -INFINITY without one
//   gated   a pointer to the gate, or NULL
static inline float finished(float value, float high, float total, float sink, __global const float *gated)
{
    if (sink > high) {
        const float factor = exp(high - sink);
        value *= factor;
        total = fma(total, factor, 1.0f);
    } else if (sink > -INFINITY) {
        total += exp(sink - high);
    }
    value = total == 0 ? 0 : value / total;
    return gated ? value / (1 + exp(-*gated)) : value;
}

// Arguments. Offsets and strides are in elements
//   tiles                        where the step has the tiles
//   q, q_row_stride, q_head_stride
//   CACHE_ARGS                   as in decoder_heads.cl: a page has num_kv_heads heads, key_head or value_head elements each
//   soft_cap, window             0: none
//   sinks                        float [heads] or NULL
//   gate_offset                  0, or where a head's gate begins, from its query on
//   output                       OUTPUT [rows][num_heads][VALUE_DIM]
//   partial, stats               float [tiles][TILE_ROWS][num_heads][splits][VALUE_DIM], float2 [tiles][TILE_ROWS][num_heads]
//                                [splits] (maximum and sum of the weights), if there is more than one split
__attribute__((reqd_work_group_size(ATTEND_ITEMS, 1, 1))) __kernel void attend(
    __global const int *restrict batch, const uint tiles, __global const float *restrict q, const uint q_row_stride,
    const uint q_head_stride, CACHE_ARGS(const CACHE), const uint num_heads, const uint num_kv_heads,
    const uint key_head, const uint value_head, const float scale, const float soft_cap, const int window,
    __global const float *restrict sinks, const uint gate_offset, __global OUTPUT *restrict output,
    __global float *restrict partial, __global float2 *restrict stats)
{
    __local float room[ROOM];
    __local float scores[QUERIES * KEYS];
    __local float part[ATTEND_ITEMS];
    __local float factors[QUERIES], highs[QUERIES], totals[QUERIES];
    __local int last[TILE_ROWS];
    const uint item = get_local_id(0), split = get_group_id(2), splits = get_num_groups(2);
    const uint heads_per_kv = num_heads / num_kv_heads, blocks = heads_per_kv / HEADS;
    const uint kv_head = get_group_id(1) / blocks;
    const uint first_head = kv_head * heads_per_kv + get_group_id(1) % blocks * HEADS;
    const int4 tile = vload4(get_group_id(0), batch + tiles);
    const uint first_row = tile.x, rows = tile.y;

    for (uint i = item; i < QUERIES * HEAD_DIM; i += ATTEND_ITEMS) {
        const uint m = i / HEAD_DIM, row = min(m / HEADS, rows - 1);
        room[i] = scale *
                  q[(ulong)(first_row + row) * q_row_stride + (first_head + m % HEADS) * q_head_stride + i % HEAD_DIM];
    }
    for (uint row = item; row < TILE_ROWS; row += ATTEND_ITEMS)
        last[row] = STEP_ROW(batch, first_row + min(row, rows - 1)).y;
    barrier(CLK_LOCAL_MEM_FENCE);

    __global const int *table = batch + STEP_ROW(batch, first_row).z;
    const int seen = window ? window : INT_MAX;
    const int lowest = last[0] >= seen ? last[0] - seen + 1 : 0, end = last[TILE_ROWS - 1] + 1;
    const int run = ((end - lowest + (int)splits - 1) / (int)splits + PAGE_TOKENS - 1) / PAGE_TOKENS * PAGE_TOKENS;
    const int my_begin = lowest + (int)split * run, my_end = min(end, my_begin + run);

    // What a work-item does in each of the three parts.
    const uint score_lane = item % SCORE_LANES, score_set = min(item / SCORE_LANES, (uint)QUERY_SETS - 1);
    const bool scores_keys = item < SCORE_LANES * QUERY_SETS;
    const uint weighed = item / TEAM, mate = item % TEAM;
    const uint key_set = item % KEY_SETS, column_lane = item / KEY_SETS % COLUMN_LANES;
    // Work-items that are left over repeat another's: with a condition around the sums, Intel's CPU runtime (2026.2)
    // computes them wrongly from the second round of KEYS positions on.
    const uint value_set = min(item / (KEY_SETS * COLUMN_LANES), (uint)QUERY_SETS - 1);

    float8 sums[SET_QUERIES];
    for (uint i = 0; i < SET_QUERIES; i++)
        sums[i] = (float8)(0.0f);
    float high = -INFINITY, total = 0; // of query `weighed`

    for (int base = my_begin; base < my_end; base += KEYS) {
        const int count = min(my_end - base, KEYS);
        if (scores_keys)
            for (uint n = score_lane; n < KEYS; n += SCORE_LANES) {
                const int p = base + (int)n;
                float dots[SET_QUERIES];
                for (uint i = 0; i < SET_QUERIES; i++)
                    dots[i] = 0;
                if (n < (uint)count) {
                    const ulong page = (uint)table[p / PAGE_TOKENS];
                    __global const CACHE *key = KEYS_OF(page) +
                                                ((ulong)IN_SEGMENT(page) * num_kv_heads + kv_head) * key_head +
                                                p % PAGE_TOKENS * CHUNK;
                    for (uint c = 0; c < HEAD_DIM / CHUNK; c++) {
                        const float8 chunk = load8_cache(key, c * CHUNK_STRIDE);
                        for (uint i = 0; i < SET_QUERIES; i++)
                            dots[i] +=
                                dot8(vload8(0, room + (score_set * SET_QUERIES + i) * HEAD_DIM + c * CHUNK), chunk);
                    }
                }
                for (uint i = 0; i < SET_QUERIES; i++) {
                    const uint m = score_set * SET_QUERIES + i;
                    const int newest = last[m / HEADS];
                    const float score = soft_cap > 0 ? soft_cap * tanh(dots[i] / soft_cap) : dots[i];
                    scores[m * KEYS + n] = n < (uint)count && p <= newest && newest - p < seen ? score : -INFINITY;
                }
            }
        barrier(CLK_LOCAL_MEM_FENCE);
        // A NaN is never the maximum, but its exponential is a NaN.
        float highest = -INFINITY;
        if (weighed < QUERIES)
            for (uint n = mate; n < KEYS; n += TEAM)
                highest = fmax(highest, scores[weighed * KEYS + n]);
        part[item] = highest;
        barrier(CLK_LOCAL_MEM_FENCE);
        if (weighed < QUERIES) {
            highest = high;
            for (uint other = 0; other < TEAM; other++)
                highest = fmax(highest, part[weighed * TEAM + other]);
            const float factor = high == -INFINITY ? 0 : exp(high - highest);
            total *= factor;
            for (uint n = mate; n < KEYS; n += TEAM) {
                const float score = scores[weighed * KEYS + n];
                const float weight = score == -INFINITY ? 0 : exp(score - highest);
                scores[weighed * KEYS + n] = weight;
                total += weight;
            }
            high = highest;
            if (mate == 0)
                factors[weighed] = factor;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint i = 0; i < SET_QUERIES; i++)
            sums[i] *= factors[value_set * SET_QUERIES + i];
        for (int n = key_set; n < count; n += KEY_SETS) {
            const int p = base + n;
            const ulong page = (uint)table[p / PAGE_TOKENS];
            const float8 value =
                load8_cache(VALUES_OF(page) + ((ulong)IN_SEGMENT(page) * num_kv_heads + kv_head) * value_head,
                            column_lane * CHUNK_STRIDE + p % PAGE_TOKENS * CHUNK);
            for (uint i = 0; i < SET_QUERIES; i++)
                sums[i] = fma((float8)(scores[(value_set * SET_QUERIES + i) * KEYS + n]), value, sums[i]);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }

    part[item] = total;
    barrier(CLK_LOCAL_MEM_FENCE);
    if (weighed < QUERIES && mate == 0) {
        for (uint other = 1; other < TEAM; other++)
            total += part[item + other];
        highs[weighed] = high;
        totals[weighed] = total;
    }
    // The key sets are added, one query of each query set at a time.
    for (uint i = 0; i < SET_QUERIES; i++) {
        barrier(CLK_LOCAL_MEM_FENCE);
        vstore8(sums[i], item, room);
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint index = item; index < QUERY_SETS * VALUE_DIM; index += ATTEND_ITEMS) {
            const uint column = index % VALUE_DIM, m = index / VALUE_DIM * SET_QUERIES + i, row = m / HEADS;
            const uint from = (index / VALUE_DIM * COLUMN_LANES + column / CHUNK) * KEY_SETS;
            float value = 0;
            for (uint set = 0; set < KEY_SETS; set++)
                value += room[(from + set) * CHUNK + column % CHUNK];
            if (row < rows) {
                const uint head = first_head + m % HEADS;
                const ulong out = (ulong)(first_row + row) * num_heads + head;
                if (splits == 1) {
                    __global const float *gate = q + (ulong)(first_row + row) * q_row_stride + head * q_head_stride;
                    store_output(finished(value, highs[m], totals[m], sinks ? sinks[head] : -INFINITY,
                                          gate_offset ? gate + gate_offset + column : 0),
                                 output, out * VALUE_DIM + column);
                } else {
                    const ulong place =
                        ((get_group_id(0) * TILE_ROWS + row) * (ulong)num_heads + head) * splits + split;
                    partial[place * VALUE_DIM + column] = value;
                    if (column == 0)
                        stats[place] = (float2)(highs[m], totals[m]);
                }
            }
        }
    }
}

// Joins the splits of each head of a row. A work-group for each head of each of a tile's TILE_ROWS rows; any local size.
//   splits_at    where the step has the number of splits
__kernel void merge_splits(__global const int *restrict batch, const uint tiles, __global const float *restrict q,
                           const uint q_row_stride, const uint q_head_stride, const uint num_heads,
                           const uint value_dim, __global const float *restrict sinks, const uint gate_offset,
                           __global OUTPUT *restrict output, __global const float *restrict partial,
                           __global const float2 *restrict stats, const uint splits_at)
{
    const uint head = get_group_id(1), splits = (uint)batch[splits_at];
    __global const int *tile = batch + tiles + get_group_id(0) / TILE_ROWS * 4;
    if (get_group_id(0) % TILE_ROWS >= (uint)tile[1])
        return;
    const ulong row = (uint)tile[0] + get_group_id(0) % TILE_ROWS;
    stats += (get_group_id(0) * (ulong)num_heads + head) * splits;
    partial += (get_group_id(0) * (ulong)num_heads + head) * splits * value_dim;
    float high = -INFINITY, total = 0;
    for (uint split = 0; split < splits; split++)
        high = fmax(high, stats[split].x);
    for (uint split = 0; split < splits; split++) {
        const float2 each = stats[split];
        total += each.x == -INFINITY ? each.y : each.y * exp(each.x - high);
    }
    for (uint column = get_local_id(0); column < value_dim; column += get_local_size(0)) {
        float value = 0;
        for (uint split = 0; split < splits; split++) {
            const float its_high = stats[split].x;
            if (its_high > -INFINITY)
                value = fma(partial[(ulong)split * value_dim + column], exp(its_high - high), value);
        }
        __global const float *gate = q + row * q_row_stride + head * q_head_stride;
        store_output(finished(value, high, total, sinks ? sinks[head] : -INFINITY,
                              gate_offset ? gate + gate_offset + column : 0),
                     output, (row * num_heads + head) * value_dim + column);
    }
}
