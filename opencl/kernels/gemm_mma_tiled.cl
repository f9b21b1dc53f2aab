#include "mma_stage.cl"

// gemm, tier "mma", for many rows per expert, where multiplying takes the time.
//
// A tile is ROWS rows and STRIPS_PER_WAVE * WAVES strips. Each wave has its own strips and all of K. Tokens, weights
// and scales are copied to local memory DEPTH - 1 blocks ahead; all waves read the tokens there. Token tiles without
// rows are skipped.
//
// Columns of a work-group: 16 * STRIPS_PER_WAVE * WAVES. ROWS: a multiple of 4 * WAVES. Local memory:
// DEPTH * STAGE_BYTES (mma_stage.cl).

#if SPLIT
#error "gemm_mma_tiled.cl does not support SPLIT"
#endif

#define COLUMNS (STRIP_N * S * WAVES)

WAVE_OF_32 __attribute__((reqd_work_group_size(LANES * WAVES, 1, 1))) __kernel void gemm(GEMM_ARGS)
{
    // A token's 128 bytes are chunks of 16 bytes. In odd rows the two halves are swapped, so that the eight lanes that
    // read together (two tokens, four chunks) use all banks.
    __local uint4 stages[DEPTH * STAGE_BYTES / 16];
    const uint item = get_local_id(0), lane = item % LANES, wave = item / LANES, g = lane / 4, t = lane % 4;
    const uint strips = STRIPS, blocks = K_BLOCKS;
    const uint column_tiles = (strips * STRIP_N + COLUMNS - 1) / COLUMNS;
    const uint tiles = num_row_tiles(WORK) * column_tiles;
    const LocalAddress stages_at = local_address(stages);

    for (uint index = get_group_id(0); index < tiles; index += get_num_groups(0)) {
        const Tile tile = row_tile(index / column_tiles, num_experts, n, WORK);
        const uint tile_strip = tile.column / STRIP_N + index % column_tiles * (S * WAVES);
        const uint end_strip = (tile.column + tile.columns + STRIP_N - 1) / STRIP_N;
        if (tile.expert < 0 || tile_strip >= end_strip)
            continue;
        const uint first_strip = tile_strip + wave * S;

        // Token tiles up to the last that holds a row.
        uint used = 0;
#pragma unroll
        for (int i = 0; i < ROWS; i += LANES) {
            const uint live = ballot(i + lane < ROWS && row_of(tile, i + lane, WORK).x >= 0);
            used = live ? (i + 32 - clz(live) + 7) / 8 : used;
        }

        // This work-item copies the same chunk of every token that it copies; their rows are 4 * WAVES apart.
        const uint chunk = item % CHUNKS;
        __global const INPUT *from[COPIES];
        bool live[COPIES];  // products of other rows are undefined, and are not read
        LocalAddress to[COPIES];
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const uint r = item / CHUNKS + i * (LANES * WAVES / CHUNKS);
            const int row = row_of(tile, r, WORK).x;
            live[i] = row >= 0;
            from[i] = input + input_offset + (ulong)max(row, 0) * k + 8 * chunk;
            to[i] = stages_at + (r * CHUNKS + (chunk ^ ((r & 1) * 4))) * 16;
        }
        const Expert expert = expert_at(EXPERT_BASE(tile.expert), strips, blocks, groups);
        const Source source = source_of(expert, first_strip, strips, blocks, groups, lane);

        float4 total[S][TOKEN_TILES];
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; i++)
                total[s][i] = (float4)(0);

#define COPY_STAGE(which, stage)                                                                         \
    {                                                                                                    \
        const uint copied = (which), at = (stage) * STAGE_BYTES;                                         \
        if (copied < blocks) {                                                                           \
            const bool exists = BLOCK_K * copied + 8 * chunk < k; /* K may end inside a block */         \
            _Pragma("unroll") for (int i = 0; i < COPIES; i++) if (live[i])                              \
            {                                                                                            \
                if (exists)                                                                              \
                    copy_async(to[i] + at, from[i] + BLOCK_K * copied);                                  \
                else                                                                                     \
                    *(__local uint4 *)((__local uchar *)stages + (to[i] - stages_at) + at) = (uint4)(0); \
            }                                                                                            \
            const LocalAddress mine = stages_at + at + TOKEN_BYTES + wave * WAVE_BYTES + lane * 16;      \
            const LocalAddress mine4 = stages_at + at + TOKEN_BYTES + wave * WAVE_BYTES + lane * 4;      \
            COPY_WEIGHTS(mine, mine4, source, copied)                                                    \
        }                                                                                                \
        commit_copies();                                                                                 \
    }
        barrier(CLK_LOCAL_MEM_FENCE);  // all waves have read the previous tile's stages
#pragma unroll 1
        for (uint d = 0; d < DEPTH - 1; d++)
            COPY_STAGE(d, d);

        // The products, for a number of token tiles that is known to the compiler.
#define MULTIPLY(TILES_USED)                                                                     \
    {                                                                                            \
        uint stage_index = 0;                                                                    \
        for (uint block = 0; block < blocks; block++) {                                          \
            AWAIT_COPIES(DEPTH - 2);                                                             \
            barrier(CLK_LOCAL_MEM_FENCE);                                                        \
            COPY_STAGE(block + DEPTH - 1, stage_index == 0 ? DEPTH - 1 : stage_index - 1);       \
            __local const uint4 *stage = stages + stage_index * (STAGE_BYTES / 16);              \
            __local const uint4 *mine = stage + (TOKEN_BYTES + wave * WAVE_BYTES) / 16;          \
            __local const uint *mine4 = (__local const uint *)mine + lane;                       \
            stage_index = stage_index + 1 == DEPTH ? 0 : stage_index + 1;                        \
            HalfWords w[S][2];                                                                   \
            Group group[S][PIECES];                                                              \
            _Pragma("unroll") for (int s = 0; s < S; s++) LOAD_WORDS(w[s], s)                    \
                _Pragma("unroll") for (int half_block = 0; half_block < 2; half_block++)         \
            {                                                                                    \
                uint4 a[S][2];                                                                   \
                _Pragma("unroll") for (int s = 0; s < S; s++)                                    \
                {                                                                                \
                    if (half_block < HALVES)                                                     \
                        _Pragma("unroll") for (int p = 0; p < PIECES; p++) group[s][p] =         \
                            GROUP_AT(half_block * PIECES + p, s);                                \
                    a[s][0] = weights_of(STEP_WORDS(w[s][half_block], 0), group[s][0]);          \
                    a[s][1] = weights_of(STEP_WORDS(w[s][half_block], 1), group[s][PIECES - 1]); \
                }                                                                                \
                _Pragma("unroll") for (int i = 0; i < TILES_USED; i++)                           \
                {                                                                                \
                    const uint4 x = TOKEN_VALUES(8 * i + g, half_block);                         \
                    ADD_PRODUCTS(total, i, a, x, group)                                          \
                }                                                                                \
            }                                                                                    \
        }                                                                                        \
    }
#if TOKEN_TILES >= 4
        if (used <= TOKEN_TILES / 4)
            MULTIPLY(TOKEN_TILES / 4)
        else if (used <= TOKEN_TILES / 2)
            MULTIPLY(TOKEN_TILES / 2)
        else if (used <= TOKEN_TILES * 3 / 4)
            MULTIPLY(TOKEN_TILES * 3 / 4)
        else
#endif
            MULTIPLY(TOKEN_TILES)
        AWAIT_COPIES(0);

#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++) {
            if (i >= used)
                continue;
#pragma unroll
            for (int p = 0; p < 2; p++) {
                const int2 row = row_of(tile, 8 * i + 2 * t + p, WORK);
                if (row.y < 0)
                    continue;
                const float factor = weight_factor / WEIGHT_UNIT;
                const float more = ROW_FACTOR ? tiny_factor * row_factor[row.x] : tiny_factor;
                const ulong at = output_offset + (ulong)row.y * output_stride + tile.out_column;
#pragma unroll
                for (int s = 0; s < S; s++)
#pragma unroll
                    for (int q = 0; q < 2; q++) {
                        const uint column = STRIP_N * (first_strip + s) + 8 * q + g;
                        if (column < tile.column || column >= tile.column + tile.columns)
                            continue;
                        const float4 sums = total[s][i];
                        const float sum = (q ? (p ? sums.w : sums.z) : (p ? sums.y : sums.x)) * factor * more;
                        const uint to = column - tile.column;
                        store_output(BIAS ? sum + BIAS_AT(tile, tile.out_column + to) : sum, output, at + to);
                    }
            }
        }
    }
}
