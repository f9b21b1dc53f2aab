#include "decoder_attention_mma.cl"
#include "attention_share.cl"

// attend_tiles: attention of many rows over the paged cache by tensor cores, with a running maximum as in
// decoder_attention.cl and the division of work of FlashAttention-2 (Dao, "FlashAttention-2", 2023): a wave has its own
// queries and all keys, and scores and weights stay in registers.
//
// A work-group has QUERIES queries, HEADS heads of each row of a tile, all of which read the same head of keys and
// values: query m is head m % HEADS of row m / HEADS. A wave has WAVE_STRIPS strips of 16 of them. The work-group goes through
// the positions that its rows see, KEYS at a time. While the waves compute with one chunk, the next one is copied to
// local memory.
//
//   scores    m16n8k16: 16 queries, 8 positions, 16 of HEAD_DIM      operands: queries, keys
//   values    m16n8k16: 16 queries, 8 columns, 16 positions          operands: weights, values
//
// Keys need no shuffles: 16 bytes are eight values of a position, operands of two products, if K of these products takes
// HEAD_DIM in another order. Lane 4g + t has chunk 4j + t of position g: values 0 to 3 for product 2j, and 4 to 7 for
// product 2j + 1. Queries are read in the same order. In local memory chunks of the positions of a page are
//
//   16 * chunk + (position ^ 2 * (chunk % 4))
//
// so that the eight lanes that read together (two positions, four chunks) use all banks. The sums of the first product
// are in the order of the first operand of the second one. Values are transposed as they are read: eight positions of a
// chunk are a matrix of eight rows.
//
// Build options
//   HEAD_DIM, VALUE_DIM   multiples of 32, and of 16
//   HEADS                 at most QUERIES
//   WAVES, WAVE_STRIPS    QUERIES is 16 * WAVES * WAVE_STRIPS; WAVES is even
//   KEYS                  a multiple of 16
//   QUERIES_LOCAL         1: queries are kept in local memory instead of registers
//   CACHE_TYPE            1 or 2
//   SPLIT_TILES           1: a tile's positions are cut into splits, and the last of its work-groups joins them

#ifndef HEAD_DIM
#define HEAD_DIM 128
#define VALUE_DIM 128
#define HEADS 8
#define WAVES 4
#define WAVE_STRIPS 1
#define KEYS 64
#define QUERIES_LOCAL 0
#endif

#define ITEMS (LANES * WAVES)
#define QUERIES (16 * WAVES * WAVE_STRIPS)
#define TILE_ROWS (QUERIES / HEADS)
#define STEPS (HEAD_DIM / 16)
#define KEY_TILES (KEYS / 8)
#define PAGES (KEYS / PAGE_TOKENS)
#define VALUE_TILES (VALUE_DIM / 8)
#define KEY_SLOTS (HEAD_DIM / CHUNK * PAGE_TOKENS) // 16 bytes each, in a page
#define VALUE_SLOTS (VALUE_DIM / CHUNK * PAGE_TOKENS)
#define STAGE_SLOTS (PAGES * (KEY_SLOTS + VALUE_SLOTS))

#ifndef SPLIT_TILES
#define SPLIT_TILES 0
#endif
#if SPLIT_TILES
#define SPLIT_ARGS , __global float *partial, __global float2 *stats, __global uint *arrived
#else
#define SPLIT_ARGS
#endif
#if QUERIES_LOCAL
#define QUERY(s, step) queries[((wave * WAVE_STRIPS + (s)) * STEPS + (step)) * LANES + lane]
#else
#define QUERY(s, step) queries[s][step]
#endif

// What a wave's strip and a lane need to know of their queries. A lane has queries g and g + 8 of a strip.
typedef struct {
    int newest[2]; // positions of the lane's queries
    float high[2], total[2];
} Strip;

// Arguments as of `attend` in decoder_attention.cl. Groups: heads, tiles, splits; the last tiles, which see most positions,
// begin first. With SPLIT_TILES partial, stats and arrived are those of `attend_rows`, with TILE_ROWS rows for each tile.
WAVE_OF_32 __attribute__((reqd_work_group_size(ITEMS, 1, 1))) __kernel void attend_tiles(
    __global const int *restrict batch, const uint tiles, __global const float *restrict q, const uint q_row_stride,
    const uint q_head_stride, CACHE_ARGS(const CACHE), const uint num_heads, const uint num_kv_heads,
    const uint key_head, const uint value_head, const float scale, const float soft_cap, const int window,
    __global const float *restrict sinks, const uint gate_offset, __global OUTPUT *restrict output SPLIT_ARGS)
{
    __local uint4 stages[2 * STAGE_SLOTS];
#if QUERIES_LOCAL
    __local uint4 queries[WAVES * WAVE_STRIPS * STEPS * LANES];
#else
    uint4 queries[WAVE_STRIPS][STEPS];
#endif
    const uint item = get_local_id(0), lane = item % LANES, wave = item / LANES, g = lane / 4, t = lane % 4;
    const uint heads_per_kv = num_heads / num_kv_heads, blocks = heads_per_kv / HEADS;
    const uint kv_head = get_group_id(0) / blocks;
    const uint first_head = kv_head * heads_per_kv + get_group_id(0) % blocks * HEADS;
    const int4 tile = vload4(get_num_groups(1) - 1 - get_group_id(1), batch + tiles);
    const uint first_row = tile.x, rows = tile.y;
    __global const int *table = batch + STEP_ROW(batch, first_row).z;
    const int seen = window ? window : INT_MAX;

    // Positions of the tile: those of its pages, from the first that a row sees to the last.
    const int oldest = STEP_ROW(batch, first_row).y, tile_end = STEP_ROW(batch, first_row + rows - 1).y + 1;
    const int tile_begin = oldest >= seen ? (oldest - seen + 1) / PAGE_TOKENS * PAGE_TOKENS : 0;
#if SPLIT_TILES // the work-group's run of whole chunks
    const uint split = get_group_id(2), splits = get_num_groups(2);
    const int run = (tile_end - tile_begin + KEYS * (int)splits - 1) / (KEYS * (int)splits) * KEYS;
    const int begin = min(tile_begin + (int)split * run, tile_end), end = min(begin + run, tile_end);
#else
    const int begin = tile_begin, end = tile_end;
#endif
    const int last_page = (end - 1) / PAGE_TOKENS;

    // Page numbers are read a chunk ahead of the copies. Values behind the end are zeros, as a weight of 0 times a NaN would
    // be a NaN.
    const LocalAddress stages_at = local_address(stages);
    const ulong my_keys = (ulong)kv_head * key_head + item * CHUNK; // in a page of all heads
    const ulong my_values = (ulong)kv_head * value_head + item * CHUNK;
    const uint swizzle = 2 * (item / PAGE_TOKENS % 4);
    uint pages[PAGES];
#define READ_PAGES(base) \
    UNROLLED for (int i = 0; i < PAGES; i++) pages[i] = table[min((base) / PAGE_TOKENS + i, last_page)];
#define COPY_STAGE(base, stage)                                                                                     \
    {                                                                                                               \
        const LocalAddress to = stages_at + ((stage) * STAGE_SLOTS + item) * 16;                                    \
        const LocalAddress keys_to = stages_at + ((stage) * STAGE_SLOTS + (item ^ swizzle)) * 16;                   \
        UNROLLED for (uint i = 0; i < PAGES; i++)                                                                   \
        {                                                                                                           \
            __global const CACHE *from =                                                                            \
                KEYS_OF(pages[i]) + (ulong)IN_SEGMENT(pages[i]) * num_kv_heads * key_head + my_keys;                \
            UNROLLED for (uint slot = 0; slot < KEY_SLOTS; slot += ITEMS) if (slot + item < KEY_SLOTS)              \
                copy_async(keys_to + (i * KEY_SLOTS + slot) * 16, from + slot * CHUNK);                             \
            from = VALUES_OF(pages[i]) + (ulong)IN_SEGMENT(pages[i]) * num_kv_heads * value_head + my_values;       \
            const bool inside = (base) + (int)(i * PAGE_TOKENS + item % PAGE_TOKENS) < end;                         \
            UNROLLED for (uint slot = 0; slot < VALUE_SLOTS; slot += ITEMS) if (slot + item < VALUE_SLOTS)          \
                copy_async_if(to + (PAGES * KEY_SLOTS + i * VALUE_SLOTS + slot) * 16, from + slot * CHUNK, inside); \
        }                                                                                                           \
        commit_copies();                                                                                            \
    }
    READ_PAGES(begin)
    COPY_STAGE(begin, 0)
    READ_PAGES(begin + KEYS)

    // The wave's queries.
    const uint first_query = wave * WAVE_STRIPS * 16;
    const bool has_rows = first_query / HEADS < rows;
    const int wave_oldest = STEP_ROW(batch, first_row + min(first_query / HEADS, rows - 1)).y;
    const int wave_newest = STEP_ROW(batch, first_row + min((first_query + WAVE_STRIPS * 16 - 1) / HEADS, rows - 1)).y;
    const float factor = soft_cap > 0 ? scale / soft_cap : scale * LOG2_E;
    Strip strips[WAVE_STRIPS];
    UNROLLED for (uint s = 0; s < WAVE_STRIPS; s++)
    {
        __global const float *from[2];
        UNROLLED for (uint h = 0; h < 2; h++)
        {
            const uint m = first_query + 16 * s + 8 * h + g, row = first_row + min(m / HEADS, rows - 1);
            from[h] = q + (ulong)row * q_row_stride + (first_head + m % HEADS) * q_head_stride + CHUNK * t;
            strips[s].newest[h] = STEP_ROW(batch, row).y;
            strips[s].high[h] = -INFINITY;
            strips[s].total[h] = 0;
        }
        UNROLLED for (uint j = 0; j < STEPS / 2; j++)
        {
            const float8 x = vload8(4 * j, from[0]) * factor, y = vload8(4 * j, from[1]) * factor;
            QUERY(s, 2 * j) = (uint4)(PAIR(x.s01), PAIR(y.s01), PAIR(x.s23), PAIR(y.s23));
            QUERY(s, 2 * j + 1) = (uint4)(PAIR(x.s45), PAIR(y.s45), PAIR(x.s67), PAIR(y.s67));
        }
    }

    float4 sums[WAVE_STRIPS][VALUE_TILES];
    UNROLLED for (uint s = 0; s < WAVE_STRIPS; s++) UNROLLED for (uint v = 0; v < VALUE_TILES; v++) sums[s][v] =
        (float4)(0);

    uint stage = 0;
    for (int base = begin; base < end; base += KEYS) {
        AWAIT_COPIES(0);
        barrier(CLK_LOCAL_MEM_FENCE);
        if (base + KEYS < end) {
            COPY_STAGE(base + KEYS, 1 - stage)
            READ_PAGES(base + 2 * KEYS)
        }
        __local const uint4 *chunk_keys = stages + stage * STAGE_SLOTS + PAGE_TOKENS * t + (g ^ 2 * t);
        const LocalAddress chunk_values = stages_at + (stage * STAGE_SLOTS + PAGES * KEY_SLOTS + lane) * 16;
        stage = 1 - stage;
        if (!has_rows || base > wave_newest || wave_oldest - (base + KEYS - 1) >= seen)
            continue;

        float4 scores[WAVE_STRIPS][KEY_TILES];
        UNROLLED for (uint s = 0; s < WAVE_STRIPS; s++) UNROLLED for (uint n = 0; n < KEY_TILES; n++) scores[s][n] =
            (float4)(0);
        UNROLLED for (uint j = 0; j < STEPS / 2; j++) UNROLLED for (uint n = 0; n < KEY_TILES; n++)
        {
            const uint4 key = chunk_keys[n / 2 * KEY_SLOTS + 4 * PAGE_TOKENS * j + 8 * (n % 2)];
            UNROLLED for (uint s = 0; s < WAVE_STRIPS; s++) scores[s][n] =
                MMA(QUERY(s, 2 * j), key.x, key.y, scores[s][n]);
            UNROLLED for (uint s = 0; s < WAVE_STRIPS; s++) scores[s][n] =
                MMA(QUERY(s, 2 * j + 1), key.z, key.w, scores[s][n]);
        }
        if (soft_cap > 0)
            UNROLLED for (uint s = 0; s < WAVE_STRIPS; s++) UNROLLED for (uint n = 0; n < KEY_TILES; n++)
            {
                const float4 x = scores[s][n];
                scores[s][n] = (float4)(capped(x.x, soft_cap), capped(x.y, soft_cap), capped(x.z, soft_cap),
                                        capped(x.w, soft_cap));
            }
        if (base + KEYS - 1 > wave_oldest || wave_newest - base >= seen)
            UNROLLED for (uint s = 0; s < WAVE_STRIPS; s++) UNROLLED for (uint n = 0; n < KEY_TILES; n++)
            {
                // Positions before a row's own; negative behind it.
                const int before = strips[s].newest[0] - (base + (int)(8 * n + 2 * t));
                const int before8 = strips[s].newest[1] - (base + (int)(8 * n + 2 * t));
                const float4 x = scores[s][n];
                scores[s][n] = (float4)(before >= 0 && before < seen ? x.x : -INFINITY,
                                        before >= 1 && before - 1 < seen ? x.y : -INFINITY,
                                        before8 >= 0 && before8 < seen ? x.z : -INFINITY,
                                        before8 >= 1 && before8 - 1 < seen ? x.w : -INFINITY);
            }

        // Weights, and the factors of what was summed before. A NaN is never the maximum, but its exponential is a NaN.
        uint4 weights[WAVE_STRIPS][PAGES];
        UNROLLED for (uint s = 0; s < WAVE_STRIPS; s++)
        {
            float high = strips[s].high[0], high8 = strips[s].high[1];
            UNROLLED for (uint n = 0; n < KEY_TILES; n++)
            {
                high = fmax(high, fmax(scores[s][n].x, scores[s][n].y));
                high8 = fmax(high8, fmax(scores[s][n].z, scores[s][n].w));
            }
            high = fmax(high, exchange(high, 1));
            high8 = fmax(high8, exchange(high8, 1));
            high = fmax(high, exchange(high, 2));
            high8 = fmax(high8, exchange(high8, 2));
            const float zero = high == -INFINITY ? 0 : high, zero8 = high8 == -INFINITY ? 0 : high8;
            const float past = native_exp2(strips[s].high[0] - zero), past8 = native_exp2(strips[s].high[1] - zero8);
            float total = strips[s].total[0] * past, total8 = strips[s].total[1] * past8;
            strips[s].high[0] = high;
            strips[s].high[1] = high8;
            UNROLLED for (uint n = 0; n < KEY_TILES; n++)
            {
                const float4 x = scores[s][n] - (float4)(zero, zero, zero8, zero8);
                const float4 weight = (float4)(native_exp2(x.x), native_exp2(x.y), native_exp2(x.z), native_exp2(x.w));
                total += weight.x + weight.y;
                total8 += weight.z + weight.w;
                if (n % 2 == 0)
                    weights[s][n / 2].xy = (uint2)(PAIR(weight.xy), PAIR(weight.zw));
                else
                    weights[s][n / 2].zw = (uint2)(PAIR(weight.xy), PAIR(weight.zw));
            }
            strips[s].total[0] = total;
            strips[s].total[1] = total8;
            if (ballot(past != 1 || past8 != 1))
                UNROLLED for (uint v = 0; v < VALUE_TILES; v++) sums[s][v] *= (float4)(past, past, past8, past8);
        }

        UNROLLED for (uint page = 0; page < PAGES; page++) UNROLLED for (uint v = 0; v < VALUE_TILES / 2; v++)
        {
            const uint4 value = load_transposed(chunk_values + (page * VALUE_SLOTS + v * LANES) * 16);
            UNROLLED for (uint s = 0; s < WAVE_STRIPS; s++) sums[s][2 * v] =
                MMA(weights[s][page], value.x, value.y, sums[s][2 * v]);
            UNROLLED for (uint s = 0; s < WAVE_STRIPS; s++) sums[s][2 * v + 1] =
                MMA(weights[s][page], value.z, value.w, sums[s][2 * v + 1]);
        }
    }

    UNROLLED for (uint s = 0; s < WAVE_STRIPS; s++) UNROLLED for (uint h = 0; h < 2; h++)
    {
        strips[s].total[h] += exchange(strips[s].total[h], 1);
        strips[s].total[h] += exchange(strips[s].total[h], 2);
    }
    UNROLLED for (uint s = 0; s < WAVE_STRIPS; s++) UNROLLED for (uint h = 0; h < 2; h++)
    {
        const uint m = first_query + 16 * s + 8 * h + g, row = m / HEADS;
        if (row >= rows)
            continue;
        const uint head = first_head + m % HEADS;
#if SPLIT_TILES
        const uint tile_number = get_num_groups(1) - 1 - get_group_id(1);
        const ulong place = ((tile_number * TILE_ROWS + row) * (ulong)num_heads + head) * splits + split;
        UNROLLED for (uint v = 0; v < VALUE_TILES; v++) *
            (__global float2 *)(partial + place * VALUE_DIM + 8 * v + 2 * t) = h ? sums[s][v].zw : sums[s][v].xy;
        if (t == 0)
            stats[place] = (float2)(strips[s].high[h], strips[s].total[h]);
#else
        const float share = share_of(strips[s].high[h], strips[s].total[h], sinks ? sinks[head] * LOG2_E : -INFINITY);
        __global const float *gate =
            q + (ulong)(first_row + row) * q_row_stride + head * q_head_stride + gate_offset + 2 * t;
        const ulong out = ((ulong)(first_row + row) * num_heads + head) * VALUE_DIM + 2 * t;
        UNROLLED for (uint v = 0; v < VALUE_TILES; v++)
        {
            float2 value = (h ? sums[s][v].zw : sums[s][v].xy) * share;
            if (gate_offset)
                value = gated(value, gate + 8 * v);
            store_pair(value, output, out + 8 * v);
        }
#endif
    }
#if SPLIT_TILES
    AWAIT_COPIES(0);
    __local uint is_last;
    const uint tile_number = get_num_groups(1) - 1 - get_group_id(1);
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE); // the split is written before the work-group is counted
    __global uint *counter = arrived + tile_number * get_num_groups(0) + get_group_id(0);
    if (item == 0)
        is_last = arrive(counter) == splits - 1;
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    if (!is_last)
        return;
    if (item == 0)
        *counter = 0;
    // A wave has a head of a row, and a lane two columns of it at a time.
    for (uint m = wave; m < rows * HEADS; m += WAVES) {
        const uint row = m / HEADS, head = first_head + m % HEADS;
        const ulong part = ((tile_number * TILE_ROWS + row) * (ulong)num_heads + head) * splits;
        float high = -INFINITY, total = 0;
        for (uint i = 0; i < splits; i++)
            high = fmax(high, stats[part + i].x);
        for (uint i = 0; i < splits; i++)
            total = fma(stats[part + i].y, beside(stats[part + i].x, high), total);
        const float share = share_of(high, total, sinks ? sinks[head] * LOG2_E : -INFINITY);
        __global const float *gate = q + (ulong)(first_row + row) * q_row_stride + head * q_head_stride + gate_offset;
        for (uint column = 2 * lane; column < VALUE_DIM; column += 2 * LANES) {
            float2 value = (float2)(0);
            for (uint i = 0; i < splits; i++)
                value += beside(stats[part + i].x, high) *
                         *(__global const float2 *)(partial + (part + i) * VALUE_DIM + column);
            value *= share;
            if (gate_offset)
                value = gated(value, gate + column);
            store_pair(value, output, ((ulong)(first_row + row) * num_heads + head) * VALUE_DIM + column);
        }
    }
#endif
}
