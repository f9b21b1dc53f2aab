#include "decoder_attention_mma.cl"

// Attention of a work-group with heads of a row that read the same head of keys and values, to a run of pages: see
// decoder_attention_rows_mma.cl, which has the build options.

#ifndef HEAD_DIM
#define HEAD_DIM 128
#define VALUE_DIM 128
#define HEADS 8
#define WAVES 8
#endif

#ifndef ITEMS
#define ITEMS (LANES * WAVES)
#endif
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

// The first operand of the products with keys: 16 numbers of HEAD_DIM of 16 heads. row_q(head, at): eight values of a
// head's query from `at` on, as float8.
#define READ_QUERIES(queries, row_q)                                                        \
    UNROLLED for (uint j = 0; j < STEPS / 2; j++)                                           \
    {                                                                                       \
        const uint at = CHUNK * (4 * j + t);                                                \
        const float8 x = g < HEADS ? row_q(g, at) * factor : (float8)(0);                   \
        const float8 y = 8 + g < HEADS ? row_q(8 + g, at) * factor : (float8)(0);           \
        (queries)[2 * j] = (uint4)(PAIR(x.s01), PAIR(y.s01), PAIR(x.s23), PAIR(y.s23));     \
        (queries)[2 * j + 1] = (uint4)(PAIR(x.s45), PAIR(y.s45), PAIR(x.s67), PAIR(y.s67)); \
    }

// Attends to pages `page`, page + WAVES, ... below my_end, and leaves each wave's sums in local memory.
//   number                  of the first page in `table`
//   my_keys, my_values      pages from the lane's place on
//   key_page, value_page    elements of a page of all heads
//   newest, seen            the row's position, and how many positions it sees
//   room4, wave_stats       WAVES * ALL_HEADS * ROOM_WIDTH floats; maximum and sum [WAVES][ALL_HEADS]
__attribute__((always_inline)) static inline void attend_pages(const uint4 queries[STEPS], __global const int *table,
                                                               uint number, int page, int my_end, Pages my_keys,
                                                               Pages my_values, ulong key_page, ulong value_page,
                                                               int newest, int seen, float soft_cap,
                                                               __local float4 *room4, __local float2 *wave_stats)
{
    const uint lane = get_local_id(0) % LANES, wave = get_local_id(0) / LANES, g = lane / 4, t = lane % 4;
    float4 sums[HEAD_SETS][4 * COLUMN_SETS];
    float high[HEAD_SETS], total[HEAD_SETS]; // of head 8 * set + g
    UNROLLED for (uint set = 0; set < HEAD_SETS; set++)
    {
        high[set] = -INFINITY;
        total[set] = 0;
        UNROLLED for (uint v = 0; v < 4 * COLUMN_SETS; v++) sums[set][v] = (float4)(0);
    }

    for (; page < my_end; page += WAVES) {
        __global const CACHE *page_keys = PAGE_AT(my_keys, number, key_page);
        __global const CACHE *page_values = PAGE_AT(my_values, number, value_page);
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
}

// The sum of the waves' weighted values for four columns of a head, its maximum and its sum of weights.
static inline float4 join_waves(uint head, uint column, float *highest, float *sum, __local const float4 *room4,
                                __local const float2 *wave_stats)
{
    float high = -INFINITY, total = 0;
    UNROLLED for (uint w = 0; w < WAVES; w++) high = fmax(high, wave_stats[w * ALL_HEADS + head].x);
    float4 value = (float4)(0);
    UNROLLED for (uint w = 0; w < WAVES; w++)
    {
        const float2 its = wave_stats[w * ALL_HEADS + head];
        const float weight = beside(its.x, high);
        total = fma(its.y, weight, total);
        value += weight * room4[((w * ALL_HEADS + head) * ROOM_WIDTH + column) / 4];
    }
    *highest = high;
    *sum = total;
    return value;
}
