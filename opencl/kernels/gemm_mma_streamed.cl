// needs mma.cl
//
// Few rows an expert: what takes time is reading weights. A tile is ROWS rows and STRIPS_PER_WAVE strips, the
// waves of a work-group split K, and each lane copies for itself what it will multiply, DEPTH blocks ahead,
// through a ring in local memory. Copies go on into the work-group's next tile while sums are stored.
//
// Columns of a work-group: 16 * STRIPS_PER_WAVE. Local memory: WAVES * DEPTH * STAGE_BYTES (below) for the
// rings, and 4 * WAVES * ROWS * (columns + 4) bytes for the sums.

// A stage holds, lane by lane, words [S], tokens [TOKEN_TILES][2] of 16 bytes, then scales and zeros [HALVES][S] of 4.
#define STAGE_BYTES (LANES * (16 * (S + 2 * TOKEN_TILES) + 4 * HALVES * S * (2 - SYMMETRIC)))
#define TOKENS_AT (LANES * 16 * S)
#define SCALES_AT (LANES * 16 * (S + 2 * TOKEN_TILES))
#define ZEROS_AT (SCALES_AT + LANES * 4 * HALVES * S)

// Work-groups share out the blocks of all tiles evenly, in runs of quanta of WAVES blocks; so a tile may be the work
// of several. Each then leaves its sums in `partial`, and the last to arrive adds them up, in the order of K. That is
// "stream-K" (Osama et al., "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on
// the GPU", 2023), and much like Marlin's stripes.
//
// partial: COUNTERS uints, zero before and after each launch; then, for each work-group, two times the sums of a tile.
#define COUNTERS 16384  // and no more work-groups

// Quanta first to end - 1 of a tile; of the work-group's own, `left` from first on.
typedef struct {
    uint column, row, first, end, left;
} Segment;

static inline Segment next_segment(Segment segment, uint column_tiles, uint quanta)
{
    segment.left -= segment.end - segment.first;
    segment.first = 0;
    segment.end = min(quanta, segment.left);
    segment.column++;
    if (segment.column == column_tiles) {
        segment.column = 0;
        segment.row++;
    }
    return segment;
}

static inline ulong first_quantum(uint group, uint groups, ulong total) { return group * total / groups; }
// The group that a quantum is the work of.
static inline uint group_of_quantum(ulong quantum, uint groups, ulong total)
{
    return ((quantum + 1) * groups - 1) / total;
}

// What routing says of a row tile, as it lies in memory: asked for long before it is looked at.
typedef struct {
#if ROUTED
    int expert, ids[TOKEN_TILES];
#else
    int4 entry, more;
#endif
} Routing;

static inline Routing routing_of(uint row_index, uint g, WORK_PARAMS)
{
    Routing routing;
#if ROUTED
    const int parts = (block_size + ROWS - 1) / ROWS;
    const int block = parts == 1 ? row_index : row_index / parts, part = row_index - block * parts;
    routing.expert = expert_ids[block];
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++) {
        const int slot = part * ROWS + 8 * i + g;
        routing.ids[i] = slot < block_size ? sorted_ids[block * block_size + slot] : -1;
    }
#else
    routing.entry = vload4(0, list + 8 * (ulong)row_index);
    routing.more = vload4(1, list + 8 * (ulong)row_index);
#endif
    return routing;
}

static inline int input_row(Routing routing, uint row_index, uint i, uint g, WORK_PARAMS)
{
#if ROUTED
    const int id = routing.ids[i];
    if ((uint)id >= (uint)valid)
        return -1;
    if (!slot_input)
        return top_k == 1 ? id : id / top_k;
    const int parts = (block_size + ROWS - 1) / ROWS;
    return row_index / parts * block_size + row_index % parts * ROWS + 8 * i + g;
#else
    const int r = 8 * i + g;
    return r < routing.more.z ? routing.more.x + r : -1;
#endif
}

#define PARTIAL_AT(r, column) 0
#if SPLIT
#error "not with SPLIT: work-groups share tiles anyhow"
#endif

#if ROUTED
#define EXPERT_OF(routing) (routing).expert
#define FIRST_STRIP_OF(routing) 0u
#else
#define EXPERT_OF(routing) (routing).entry.x
#define FIRST_STRIP_OF(routing) ((uint)(routing).entry.y / STRIP_N)
#endif

WAVE_OF_32 __attribute__((reqd_work_group_size(LANES * WAVES, 1, 1))) __kernel void gemm(GEMM_ARGS)
{
    // Each wave's ring of stages, which each lane fills for itself and reads alone; the waves' sums.
    __local uint4 rings[WAVES * DEPTH * STAGE_BYTES / 16];
    __local float sums[WAVES * ROWS * SUMS_STRIDE];
    __local uint arrived;
    const uint item = get_local_id(0), lane = item % LANES, wave = item / LANES, g = lane / 4, t = lane % 4;
    const uint strips = STRIPS, blocks = K_BLOCKS;
    const uint column_tiles = (strips + S - 1) / S;
    const uint quanta = (blocks + WAVES - 1) / WAVES;
    __local uchar *ring = (__local uchar *)rings + wave * DEPTH * STAGE_BYTES;
    const LocalAddress ring_at = local_address(ring);
    __global uint *counters = (__global uint *)partial;

    const uint own = get_group_id(0), work_groups = get_num_groups(0);
    const ulong total_quanta = (ulong)num_row_tiles(WORK) * column_tiles * quanta;
    const ulong begin_quantum = first_quantum(own, work_groups, total_quanta);
    Segment segment;
    segment.left = first_quantum(own + 1, work_groups, total_quanta) - begin_quantum;
    if (segment.left == 0)
        return;
    const uint first_tile = begin_quantum / quanta;
    segment.first = begin_quantum - (ulong)first_tile * quanta;
    segment.end = min(quanta, segment.first + segment.left);
    segment.row = first_tile / column_tiles;
    segment.column = first_tile - segment.row * column_tiles;
    bool is_first = true;

    // Copies run DEPTH - 1 blocks ahead of the products, into the next tile where this one ends.
    Segment copied = segment;
    uint copy_block = 0, copy_end = 0, copy_stage = 0;
    __global const uint4 *words[S];
    __global const uint *scales[S];
    __global const ushort *zeros[S];
    __global const INPUT *rows[TOKEN_TILES];
    bool live[TOKEN_TILES];  // rows that are not leave their column of products undefined, which nobody reads
    Routing ahead = routing_of(copied.row, g, WORK);

#define COPY_NEXT()                                                                                  \
    {                                                                                                \
        while (copy_block >= copy_end && copied.left) {                                              \
            const int expert = EXPERT_OF(ahead);                                                     \
            const uint end = min(copied.end * WAVES, blocks);                                        \
            const uint run = (end - copied.first * WAVES + WAVES - 1) / WAVES;                       \
            copy_block = copied.first * WAVES + wave * run;                                          \
            copy_end = (uint)expert < num_experts ? min(copy_block + run, end) : 0;                  \
            if (copy_block < copy_end) {                                                             \
                const Expert from = expert_at(EXPERT_BASE(expert), strips, blocks, groups);          \
                _Pragma("unroll") for (int s = 0; s < S; s++)                                        \
                {                                                                                    \
                    const uint strip = min(FIRST_STRIP_OF(ahead) + copied.column * S + s, strips - 1); \
                    words[s] = from.words + (ulong)strip * blocks * LANES + lane;                    \
                    scales[s] = from.scales + strip * groups * 8 + g;                                \
                    zeros[s] = from.zeros + strip * groups * 8 + g;                                  \
                }                                                                                    \
                _Pragma("unroll") for (int i = 0; i < TOKEN_TILES; i++)                              \
                {                                                                                    \
                    const int row = input_row(ahead, copied.row, i, g, WORK);                        \
                    live[i] = row >= 0;                                                              \
                    rows[i] = input + input_offset + (ulong)max(row, 0) * k + 8 * t;                 \
                }                                                                                    \
            }                                                                                        \
            const uint row_before = copied.row;                                                      \
            copied = next_segment(copied, column_tiles, quanta);                                     \
            if (copied.left && copied.row != row_before)                                             \
                ahead = routing_of(copied.row, g, WORK);                                             \
        }                                                                                            \
        if (copy_block < copy_end) {                                                                 \
            const LocalAddress to = ring_at + copy_stage * STAGE_BYTES + lane * 16;                  \
            const LocalAddress to4 = ring_at + copy_stage * STAGE_BYTES + lane * 4;                  \
            _Pragma("unroll") for (int s = 0; s < S; s++)                                            \
                copy_async(to + s * LANES * 16, words[s] + copy_block * LANES);                      \
            const bool second = BLOCK_K * copy_block + 32 < k; /* K may end in the middle of a block */ \
            _Pragma("unroll") for (int i = 0; i < TOKEN_TILES; i++) if (live[i])                     \
            {                                                                                        \
                copy_async(to + TOKENS_AT + 2 * i * LANES * 16, rows[i] + BLOCK_K * copy_block);     \
                if (second)                                                                          \
                    copy_async(to + TOKENS_AT + (2 * i + 1) * LANES * 16, rows[i] + BLOCK_K * copy_block + 32); \
                else                                                                                 \
                    *(__local uint4 *)(ring + copy_stage * STAGE_BYTES + lane * 16 + TOKENS_AT +     \
                                       (2 * i + 1) * LANES * 16) = (uint4)(0);                       \
            }                                                                                        \
            _Pragma("unroll") for (int h = 0; h < HALVES; h++)                                       \
            {                                                                                        \
                const uint group = min((BLOCK_K * copy_block + 32 * h) >> group_shift, groups - 1);  \
                _Pragma("unroll") for (int s = 0; s < S; s++)                                        \
                {                                                                                    \
                    copy_async4(to4 + SCALES_AT + (h * S + s) * LANES * 4, scales[s] + group * 8);   \
                    COPY_ZEROS(h, s, group)                                                          \
                }                                                                                    \
            }                                                                                        \
            copy_block++;                                                                            \
            copy_stage = copy_stage + 1 == DEPTH ? 0 : copy_stage + 1;                               \
        }                                                                                            \
        commit_copies();                                                                             \
    }
#if SYMMETRIC
#define COPY_ZEROS(h, s, group)
#else  // pairs of bytes: the 4 that contain them
#define COPY_ZEROS(h, s, group)                                                                      \
    copy_async4(to4 + ZEROS_AT + (h * S + s) * LANES * 4,                                            \
                (__global const uint *)(zeros[s] + group * 8 - (g & 1)));
#endif
    uint stage_index = 0, in_flight = 0;
    Tile next_tile = row_tile(segment.row, num_experts, n, WORK);
    while (segment.left) {
        const Tile tile = next_tile;
        const Segment here = segment;
        const bool here_first = is_first;
        is_first = false;
        segment = next_segment(segment, column_tiles, quanta);
        if (segment.left && segment.row != here.row)
            next_tile = row_tile(segment.row, num_experts, n, WORK);
        if (tile.expert < 0)
            continue;
        const uint first_strip = tile.column / STRIP_N + here.column * S;
        const uint stop = min(here.end * WAVES, blocks);
        const uint run = (stop - here.first * WAVES + WAVES - 1) / WAVES;
        const uint begin = here.first * WAVES + wave * run;
        const uint end = min(begin + run, stop);

        float4 total[S][TOKEN_TILES];
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; i++)
                total[s][i] = (float4)(0);

        for (uint block = begin; block < end; block++) {
            // One copy a product, and DEPTH of them at first. Only here, since a launch begins by fetching its code.
#pragma unroll 1
            for (; in_flight < DEPTH; in_flight++)
                COPY_NEXT();
            in_flight--;
            AWAIT_COPIES(DEPTH - 1);
            __local const uint4 *mine = (__local const uint4 *)(ring + stage_index * STAGE_BYTES) + lane;
            __local const uint *mine4 = (__local const uint *)(ring + stage_index * STAGE_BYTES) + lane;
            stage_index = stage_index + 1 == DEPTH ? 0 : stage_index + 1;
            uint4 x[TOKEN_TILES][2];
            float4 token_sums[TOKEN_TILES][HALVES];
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; i++) {
                x[i][0] = mine[TOKENS_AT / 16 + 2 * i * LANES];
                x[i][1] = mine[TOKENS_AT / 16 + (2 * i + 1) * LANES];
                sum_tokens(token_sums[i], x[i][0], x[i][1]);
            }
#pragma unroll
            for (int s = 0; s < S; s++) {
                const uint4 w = mine[s * LANES];
                float2 scale[HALVES];
                uint zero[HALVES];
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    scale[h] = half2_to_float2(mine4[SCALES_AT / 4 + (h * S + s) * LANES]);
                    zero[h] = SYMMETRIC ? 0 : MY_ZEROS(mine4[ZEROS_AT / 4 + (h * S + s) * LANES]);
                }
#pragma unroll
                for (int i = 0; i < TOKEN_TILES; i++)
                    total[s][i] = add_block(total[s][i], w, x[i][0], x[i][1], token_sums[i], scale, zero);
            }
        }

        int2 out_rows[OUTPUTS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++)
            out_rows[o] = row_of(tile, OUTPUT_ROW(o), WORK);
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; i++)
                put_sums(sums, total[s][i], wave, s, i, g, t);
        barrier(CLK_LOCAL_MEM_FENCE);
        float results[OUTPUTS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++)
            results[o] = SUM_OF_WAVES(o);
        bool stores = here.first == 0 && here.end == quanta;
        if (!stores) {
            // [work-group][its first segment or its last][output][work-item]
            __global float *slots = partial + COUNTERS;
#define SLOT(group, second, o) (((2 * (ulong)(group) + (second)) * OUTPUTS + (o)) * (LANES * WAVES) + item)
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++)
                slots[SLOT(own, !here_first, o)] = results[o];
            device_fence();
            barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
            const ulong tile_quantum = ((ulong)here.row * column_tiles + here.column) * quanta;
            const uint first_group = group_of_quantum(tile_quantum, work_groups, total_quanta);
            if (item == 0) {
                const uint mine = here.end - here.first;
                arrived = atomic_add(counters + first_group, mine) + mine;
                if (arrived == quanta)
                    counters[first_group] = 0;
            }
            barrier(CLK_LOCAL_MEM_FENCE);
            stores = arrived == quanta;
            if (stores) {
                device_fence();
                const uint last_group = group_of_quantum(tile_quantum + quanta - 1, work_groups, total_quanta);
#pragma unroll
                for (int o = 0; o < OUTPUTS; o++)
                    results[o] = 0;
                for (uint group = first_group; group <= last_group; group++) {
                    const ulong from = first_quantum(group, work_groups, total_quanta);
                    if (first_quantum(group + 1, work_groups, total_quanta) == from)
                        continue;
#pragma unroll
                    for (int o = 0; o < OUTPUTS; o++)
                        results[o] += load_coherent(slots + SLOT(group, from < tile_quantum, o));
                }
            }
        }
        if (stores)
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++)
                STORE_SUM(o, out_rows[o], results[o])
        barrier(CLK_LOCAL_MEM_FENCE);  // the sums have been read
    }
    AWAIT_COPIES(0);
}
