// Attention of a whole step in one launch. A work-group attends with HEADS heads of a row, all of which read the
// same head of keys and values, to a run of the positions: KEYS of them at a time.
//
// Without tensor cores:
//
//   scores    a work-item has a position and a quarter of the dimensions, for all heads
//   weights   the work-items of a head: maximum, exponentials, sum
//   values    a work-item has a head, eight columns, and every VALUE_LANES-th position
//
// The work-group whose run has the row's own position appends it to the cache, and reads it from there as the others.

#if TENSOR_ATTENTION
#include "decoder_attention_pages_mma.cl"
#define SCORE_UNIT LOG2_E
#else
#define BASE_EXP exp
#define SCORE_UNIT 1
#endif
#include "attention_share.cl"
#define ROTATES_IN_LANES (PAIRS_ROTATED && PAIRS_ROTATED % WAVE == 0 && !INTERLEAVED)

// A head's sink, as a score; -INFINITY without one.
static inline float sink_of(__constant Layer *layer, uint head)
{
#if SINKS
    if (layer->sinks)
        return ((__global const float *)layer->sinks)[head] * SCORE_UNIT;
#endif
    return -INFINITY;
}

// What a column of a head's result is multiplied by.
static inline float gate_of(__global const float *heads, uint row, uint head, uint column)
{
#if GATED
    return 1 / (1 + exp(-heads[row * (ulong)QKV + head * HEAD_STRIDE + HEAD_DIM + column]));
#else
    return 1;
#endif
}

// Adds up over 32 neighbouring work-items; all work-items of the work-group call it. `sums`: float [ITEMS].
__attribute__((always_inline)) static inline float wave_sum(float value, __local float *sums)
{
    const uint item = get_local_id(0);
    barrier(CLK_LOCAL_MEM_FENCE);
    sums[item] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    float4 sum = (float4)(0);
#pragma unroll
    for (uint i = 0; i < WAVE / 4; i++)
        sum += vload4(item / WAVE * (WAVE / 4) + i, sums);
    return sum.x + sum.y + (sum.z + sum.w);
}

// Norms and rotates the heads of a row: HEADS of queries, one of keys, one of values, to `queries`. Appends those of keys and
// values to the cache if `appends`.
//   sums   float [ITEMS]
__attribute__((always_inline)) static inline void place_row(__constant Layer *layer, uint row, uint first_head,
                                                            uint kv_head, uint position, bool appends,
                                                            __global const int *pages, __global const float *heads,
                                                            __local float *queries, __local float *sums)
{
    const uint item = get_local_id(0), lane = item % WAVE, wave = item / WAVE;
    LAYER_CACHE
    for (uint base = 0; base < HEADS + 2; base += WAVES) {
        const uint head = base + wave, kind = head < HEADS ? 0 : head - HEADS + 1;
        const bool exists = kind < 3;
        const uint column = kind == 0   ? (first_head + head) * HEAD_STRIDE
                            : kind == 1 ? QUERIES_WIDTH + kv_head * HEAD_DIM
                                        : QUERIES_WIDTH + (NUM_KV_HEADS + kv_head) * HEAD_DIM;
        __global const float *norm = (__global const float *)(kind == 0 ? layer->q_norm : layer->k_norm);
        const bool normed = exists && kind < 2 && norm;
        float own[HEAD_DIM / WAVE], square = 0;
#pragma unroll
        for (uint i = 0; i < HEAD_DIM / WAVE; i++) {
            own[i] = exists ? heads[row * (ulong)QKV + column + i * WAVE + lane] : 0;
            square = fma(own[i], own[i], square);
        }
#if ROTATES_IN_LANES // the two values of a pair are the lane's own
        float cosine[PAIRS_ROTATED / WAVE], sine[PAIRS_ROTATED / WAVE];
#pragma unroll
        for (uint i = 0; i < PAIRS_ROTATED / WAVE; i++) {
            const ulong at = position * (ulong)PAIRS_ROTATED + i * WAVE + lane;
            cosine[i] = ((__global const float *)layer->cosine)[at];
            sine[i] = ((__global const float *)layer->sine)[at];
        }
#endif
        square = wave_sum(square, sums);
        if (normed) {
            const float factor = 1 / sqrt(square / HEAD_DIM + layer->norm_eps);
#pragma unroll
            for (uint i = 0; i < HEAD_DIM / WAVE; i++)
                own[i] *= factor * norm[i * WAVE + lane];
        }
#if ROTATES_IN_LANES
        if (kind < 2)
#pragma unroll
            for (uint i = 0; i < PAIRS_ROTATED / WAVE; i++) {
                const float a = own[i], b = own[i + PAIRS_ROTATED / WAVE];
                own[i] = fma(a, cosine[i], -(b * sine[i]));
                own[i + PAIRS_ROTATED / WAVE] = fma(b, cosine[i], a * sine[i]);
            }
#endif
        if (exists)
#pragma unroll
            for (uint i = 0; i < HEAD_DIM / WAVE; i++)
                queries[head * HEAD_DIM + i * WAVE + lane] = own[i];
    }
    barrier(CLK_LOCAL_MEM_FENCE);
#if PAIRS_ROTATED && !ROTATES_IN_LANES
    EACH(i, (HEADS + 1) * PAIRS_ROTATED)
    {
        const uint pair = i % PAIRS_ROTATED;
        __local float *head = queries + i / PAIRS_ROTATED * HEAD_DIM;
        const uint one = INTERLEAVED ? 2 * pair : pair, other = INTERLEAVED ? one + 1 : one + PAIRS_ROTATED;
        const float a = head[one], b = head[other];
        const float cosine = ((__global const float *)layer->cosine)[position * (ulong)PAIRS_ROTATED + pair];
        const float sine = ((__global const float *)layer->sine)[position * (ulong)PAIRS_ROTATED + pair];
        head[one] = fma(a, cosine, -(b * sine));
        head[other] = fma(b, cosine, a * sine);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
#endif
    if (appends) {
        const uint number = pages[position / PAGE_TOKENS];
        const ulong page = (IN_SEGMENT(number) * (ulong)NUM_KV_HEADS + kv_head) * (HEAD_DIM * PAGE_TOKENS);
        const ulong place = page + position % PAGE_TOKENS * CHUNK;
        EACH(i, HEAD_DIM)
        {
            store_cache(queries[HEADS * HEAD_DIM + i], SEGMENT(keys, number),
                        place + i / CHUNK * CHUNK_STRIDE + i % CHUNK);
            store_cache(queries[(HEADS + 1) * HEAD_DIM + i], SEGMENT(values, number),
                        place + i / CHUNK * CHUNK_STRIDE + i % CHUNK);
        }
    }
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
}

#if !TENSOR_ATTENTION
// Attention to positions begin to end - 1 by multiply-adds; `memory` holds what follows the queries in ATTEND_FLOATS.
__attribute__((always_inline)) static inline void attend_positions(__constant Layer *layer, uint row, uint first_head,
                                                                   uint kv_head, uint begin, uint end, uint left_out,
                                                                   uint split, uint splits, __global const int *pages,
                                                                   __global const float *heads, __global half *attended,
                                                                   __global float *partial, __global float2 *stats,
                                                                   __local const float *queries, __local float *memory)
{
    const uint item = get_local_id(0);
    __local float *sums = memory, *scores = sums + ITEMS;
    __local float *weights = scores + MAX_OF(ATTEND_SCORES, ATTEND_SUMS);
    __local float *highs = weights + HEADS * KEYS, *totals = highs + HEADS, *factors = totals + HEADS;
    LAYER_CACHE
    EACH(i, HEADS)
    {
        highs[i] = -INFINITY;
        totals[i] = 0;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    const uint quarter = item / KEYS, key = item % KEYS;
    const uint slot = item % SLOTS, value_lane = item / SLOTS;
    const uint value_head = slot / (HEAD_DIM / CHUNK), value_chunk = slot % (HEAD_DIM / CHUNK);
    float8 sum = (float8)(0);
    for (uint from = begin; from < end; from += KEYS) {
        const uint at = from + key;
        const bool is_seen = at < end && at >= left_out;
        float scored[HEADS];
#pragma unroll
        for (uint h = 0; h < HEADS; h++)
            scored[h] = 0;
        if (is_seen) {
            const uint number = pages[at / PAGE_TOKENS];
            __global const CACHE *page =
                SEGMENT(keys, number) +
                (IN_SEGMENT(number) * (ulong)NUM_KV_HEADS + kv_head) * (HEAD_DIM * PAGE_TOKENS) +
                at % PAGE_TOKENS * CHUNK;
#pragma unroll
            for (uint i = 0; i < HEAD_DIM / CHUNK / QUARTERS; i++) {
                const uint chunk = quarter * (HEAD_DIM / CHUNK / QUARTERS) + i;
                const float8 k = load8_cache(page, chunk * CHUNK_STRIDE);
#pragma unroll
                for (uint h = 0; h < HEADS; h++) {
                    const float8 q = vload8(h * (HEAD_DIM / CHUNK) + chunk, queries);
                    const float4 part = fma(q.lo, k.lo, q.hi * k.hi);
                    scored[h] += part.x + part.y + (part.z + part.w);
                }
            }
        }
#pragma unroll
        for (uint h = 0; h < HEADS; h++)
            scores[(quarter * HEADS + h) * KEYS + key] = scored[h];
        barrier(CLK_LOCAL_MEM_FENCE);
        // A score that is not seen is -INFINITY.
        EACH(i, HEADS * KEYS)
        {
            float score = 0;
            for (uint j = 0; j < QUARTERS; j++)
                score += scores[j * (HEADS * KEYS) + i];
            const uint its = from + i % KEYS;
            score *= layer->scale;
#if CAPPED
            if (layer->soft_cap > 0)
                score = layer->soft_cap * tanh(score / layer->soft_cap);
#endif
            weights[i] = its < end && its >= left_out ? score : -INFINITY;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        // Eight lanes of each head find its largest score.
        EACH(i, HEADS * 8)
        {
            float high = -INFINITY;
            for (uint j = i % 8; j < KEYS; j += 8)
                high = fmax(high, weights[i / 8 * KEYS + j]);
            sums[i] = high;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, HEADS)
        {
            float high = highs[i];
            for (uint j = 0; j < 8; j++)
                high = fmax(high, sums[i * 8 + j]);
            factors[i] = highs[i] == -INFINITY ? 0 : exp(highs[i] - high);
            highs[i] = high;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, HEADS * KEYS)
        {
            const float high = highs[i / KEYS];
            weights[i] = high == -INFINITY ? 0 : exp(weights[i] - high);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, HEADS * 8)
        {
            float total = 0;
            for (uint j = i % 8; j < KEYS; j += 8)
                total += weights[i / 8 * KEYS + j];
            sums[i] = total;
        }
        sum *= factors[value_head];
        const uint left = min((uint)KEYS, end - from);
        for (uint j = value_lane; j < left; j += VALUE_LANES) {
            const uint its = from + j;
            const float weight = weights[value_head * KEYS + j];
            const uint number = pages[its / PAGE_TOKENS];
            if (its >= left_out)
                sum = fma((float8)(weight),
                          load8_cache(SEGMENT(values, number),
                                      (IN_SEGMENT(number) * (ulong)NUM_KV_HEADS + kv_head) * (HEAD_DIM * PAGE_TOKENS) +
                                          value_chunk * CHUNK_STRIDE + its % PAGE_TOKENS * CHUNK),
                          sum);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, HEADS)
        {
            float total = totals[i] * factors[i];
            for (uint j = 0; j < 8; j++)
                total += sums[i * 8 + j];
            totals[i] = total;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    vstore8(sum, item, scores); // [VALUE_LANES][HEADS][HEAD_DIM]
    barrier(CLK_LOCAL_MEM_FENCE);
    EACH(i, HEADS * HEAD_DIM)
    {
        const float value = group_total(scores + i, VALUE_LANES, HEADS * HEAD_DIM);
        const uint head = first_head + i / HEAD_DIM;
        const float total = totals[i / HEAD_DIM];
        if (splits == 1) {
            vstore_half_rte(value * share_of(highs[i / HEAD_DIM], total, sink_of(layer, head)) *
                                gate_of(heads, row, head, i % HEAD_DIM),
                            row * (ulong)ATTENDED + head * HEAD_DIM + i % HEAD_DIM, attended);
        } else {
            const ulong place = (row * (ulong)NUM_HEADS + head) * splits + split;
            partial[place * HEAD_DIM + i % HEAD_DIM] = value;
            if (i % HEAD_DIM == 0)
                stats[place] = (float2)(highs[i / HEAD_DIM], total);
        }
    }
}
#endif

__attribute__((always_inline)) static inline void attend_step(__constant Layer *layer, uint rows, uint splits,
                                                              __global const int *batch, __global const float *heads,
                                                              __global half *attended, __global float *partial,
                                                              __global float2 *stats, __local float *memory)
{
    __local float *queries = memory, *rest = queries + ATTEND_QUERIES;
    const uint blocks = NUM_HEADS / HEADS, tasks = rows * blocks * splits;
    for (uint task = get_group_id(0); task < tasks; task += get_num_groups(0)) {
        const uint split = task % splits, block = task / splits % blocks, row = task / splits / blocks;
        const uint first_head = block * HEADS, kv_head = first_head / (NUM_HEADS / NUM_KV_HEADS);
        const int4 record = STEP_ROW(batch, row);
        __global const int *pages = batch + record.z;
        const uint position = (uint)record.y, seen = position + 1;
        const uint left_out = layer->window && seen > layer->window ? seen - layer->window : 0;
        // Runs are whole pages, so that no page is read by two work-groups.
        const uint first_page = left_out / PAGE_TOKENS, end_page = (seen + PAGE_TOKENS - 1) / PAGE_TOKENS;
        const uint run = (end_page - first_page + splits - 1) / splits;
        const uint begin_page = first_page + split * run, my_end = min(begin_page + run, end_page);
        const bool appends = begin_page < my_end && my_end == end_page;
#if TENSOR_ATTENTION
        const uint wave_page = begin_page + get_local_id(0) / LANES;
        const uint number = wave_page < my_end ? pages[wave_page] : 0; // early, as the page's loads need it
#endif
        place_row(layer, row, first_head, kv_head, position, appends, pages, heads, queries, rest);
#if TENSOR_ATTENTION
        __local float4 *room4 = (__local float4 *)(rest + ITEMS);
        __local float2 *wave_stats = (__local float2 *)(room4 + WAVES * ALL_HEADS * ROOM_WIDTH / 4);
        const uint lane = get_local_id(0) % LANES, g = lane / 4, t = lane % 4;
        const ulong head_at = kv_head * (ulong)(HEAD_DIM * PAGE_TOKENS),
                    page_size = NUM_KV_HEADS * HEAD_DIM * PAGE_TOKENS;
        const float soft_cap = CAPPED ? layer->soft_cap : 0;
        const float factor = soft_cap > 0 ? layer->scale / soft_cap : layer->scale * LOG2_E;
        uint4 operand[STEPS];
#define LOCAL_Q(head, at) vload8(0, queries + (head) * HEAD_DIM + (at))
        READ_QUERIES(operand, LOCAL_Q)
        attend_pages(operand, pages, number, (int)wave_page, (int)my_end,
                     LAYER_PAGES(keys, head_at + (PAGE_TOKENS * t + g / 2 + 4 * (g % 2)) * CHUNK),
                     LAYER_PAGES(values, head_at + (PAGE_TOKENS * g + t) * CHUNK), page_size, page_size, (int)position,
                     layer->window ? (int)layer->window : INT_MAX, soft_cap, room4, wave_stats);
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, HEADS * QUADS)
        {
            const uint head = first_head + i / QUADS, column = 4 * (i % QUADS);
            float highest, total;
            const float4 value = join_waves(i / QUADS, column, &highest, &total, room4, wave_stats);
            if (splits == 1) {
                float4 result = value * share_of(highest, total, sink_of(layer, head));
#if GATED
                result *= (float4)(gate_of(heads, row, head, column), gate_of(heads, row, head, column + 1),
                                   gate_of(heads, row, head, column + 2), gate_of(heads, row, head, column + 3));
#endif
                vstore_half4_rte(result, (row * (ulong)ATTENDED + head * HEAD_DIM + column) / 4, attended);
            } else {
                const ulong place = (row * (ulong)NUM_HEADS + head) * splits + split;
                vstore4(value, (place * HEAD_DIM + column) / 4, partial);
                if (column == 0)
                    stats[place] = (float2)(highest, total);
            }
        }
#else
        attend_positions(layer, row, first_head, kv_head, begin_page * PAGE_TOKENS, min(my_end * PAGE_TOKENS, seen),
                         left_out, split, splits, pages, heads, attended, partial, stats, queries, rest);
#endif
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// Joins the runs of each head of a row. A work-group has 32 columns of a head, and each of its waves some of the runs.
// `memory`: 32 * WAVES + 2 * splits floats.
__attribute__((always_inline)) static inline void join_splits(__constant Layer *layer, uint rows, uint splits,
                                                              __global const float *heads, __global half *attended,
                                                              __global const float *partial,
                                                              __global const float2 *stats, __local float *memory)
{
    const uint item = get_local_id(0), lane = item % WAVE, wave = item / WAVE, tasks = rows * (ATTENDED / WAVE);
    __local float *highs = memory + ITEMS, *totals = highs + splits;
    for (uint task = get_group_id(0); task < tasks; task += get_num_groups(0)) {
        const uint head_of_row = task / (HEAD_DIM / WAVE), row = head_of_row / NUM_HEADS, own = head_of_row % NUM_HEADS;
        const ulong head = head_of_row * (ulong)splits; // its first run
        const uint column = task % (HEAD_DIM / WAVE) * WAVE + lane;
        EACH(i, splits)
        {
            const float2 its = stats[head + i];
            highs[i] = its.x;
            totals[i] = its.y;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        float high = -INFINITY, value = 0;
        for (uint split = 0; split < splits; split++)
            high = fmax(high, highs[split]);
        for (uint split = wave; split < splits; split += WAVES)
            if (highs[split] > -INFINITY)
                value = fma(partial[(head + split) * HEAD_DIM + column], BASE_EXP(highs[split] - high), value);
        memory[item] = value;
        barrier(CLK_LOCAL_MEM_FENCE);
        if (wave == 0) {
            float total = 0;
            for (uint split = 0; split < splits; split++)
                if (highs[split] > -INFINITY)
                    total = fma(totals[split], BASE_EXP(highs[split] - high), total);
            value = group_total(memory + lane, WAVES, WAVE);
            vstore_half_rte(value * share_of(high, total, sink_of(layer, own)) * gate_of(heads, row, own, column),
                            task * (ulong)WAVE + lane, attended);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}
