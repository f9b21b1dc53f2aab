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

// Tiles in the order in which a work-group takes them: column tiles fastest, then parts of K, then rows.
typedef struct {
    uint column, part, row;
} Position;

static inline Position position_of(uint index, uint column_tiles, uint parts_of_k)
{
    Position position;
    position.column = index % column_tiles;
    position.part = index / column_tiles % parts_of_k;
    position.row = index / column_tiles / parts_of_k;
    return position;
}

static inline Position advance(Position position, Position step, uint column_tiles, uint parts_of_k)
{
    position.column += step.column;
    position.part += step.part;
    position.row += step.row;
    if (position.column >= column_tiles) {
        position.column -= column_tiles;
        position.part++;
    }
    if (position.part >= parts_of_k) {
        position.part -= parts_of_k;
        position.row++;
    }
    return position;
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
    const uint item = get_local_id(0), lane = item % LANES, wave = item / LANES, g = lane / 4, t = lane % 4;
    const uint strips = STRIPS, blocks = K_BLOCKS;
    const uint column_tiles = (strips + S - 1) / S;
    const uint parts_of_k = SPLIT ? splits : 1;
    const Position step = position_of(get_num_groups(0), column_tiles, parts_of_k);
    __local uchar *ring = (__local uchar *)rings + wave * DEPTH * STAGE_BYTES;
    const LocalAddress ring_at = local_address(ring);
    const uint share = SPLIT ? (blocks + splits - 1) / splits : blocks;
    const uint run = (share + WAVES - 1) / WAVES;

    // Copies run DEPTH - 1 blocks ahead of the products, into the next tile where this one ends.
    Position copied = position_of(get_group_id(0), column_tiles, parts_of_k);
    uint copy_block = 0, copy_end = 0, copy_stage = 0;
    __global const uint4 *words[S];
    __global const uint *scales[S];
    __global const ushort *zeros[S];
    __global const INPUT *rows[TOKEN_TILES];
    bool live[TOKEN_TILES];  // rows that are not leave their column of products undefined, which nobody reads
    Routing ahead;
    if (copied.row < max_row_tiles(WORK))  // asked for together with the number of tiles, not after it
        ahead = routing_of(copied.row, g, WORK);
    const uint row_tiles = num_row_tiles(WORK);

#define COPY_NEXT()                                                                                  \
    {                                                                                                \
        while (copy_block >= copy_end && copied.row < row_tiles) {                                   \
            const int expert = EXPERT_OF(ahead);                                                     \
            copy_block = copied.part * share + wave * run;                                           \
            copy_end = (uint)expert < num_experts ? min(min(copy_block + run, (copied.part + 1) * share), blocks) : 0; \
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
            copied = advance(copied, step, column_tiles, parts_of_k);                                \
            if (copied.row < row_tiles)                                                              \
                ahead = routing_of(copied.row, g, WORK);                                             \
        }                                                                                            \
        if (copy_block < copy_end) {                                                                 \
            const LocalAddress to = ring_at + copy_stage * STAGE_BYTES + lane * 16;                          \
            const LocalAddress to4 = ring_at + copy_stage * STAGE_BYTES + lane * 4;                          \
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
    Position position = copied;
    Tile next_tile;
    if (position.row < row_tiles)
        next_tile = row_tile(position.row, num_experts, n, WORK);
    while (position.row < row_tiles) {
        const Tile tile = next_tile;
        const Position here = position;
        position = advance(position, step, column_tiles, parts_of_k);
        if (position.row < row_tiles)
            next_tile = row_tile(position.row, num_experts, n, WORK);
        if (tile.expert < 0)
            continue;
        const uint first_strip = tile.column / STRIP_N + here.column * S;
        const uint begin = here.part * share + wave * run;
        const uint end = min(min(begin + run, (here.part + 1) * share), blocks);

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
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++)
            STORE_SUMS(o, out_rows[o], first_strip, here.row, here.part)
        barrier(CLK_LOCAL_MEM_FENCE);  // the sums have been read
    }
    AWAIT_COPIES(0);
}
