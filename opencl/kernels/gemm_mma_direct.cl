// needs mma.cl
//
// Few rows an expert: what takes time is reading weights. A work-group is one tile of ROWS rows and STRIPS_PER_WAVE
// strips, its waves split K, and each asks for DEPTH blocks at once, weights and tokens straight into registers. What
// keeps memory busy is that many work-groups fit a compute unit, one of which waits while others multiply; so tiles
// are small, and the code is short: a launch may be over before a longer one would have been fetched.
//
// The grid has a work-group for each tile. Columns of a work-group: 16 * STRIPS_PER_WAVE. Local memory:
// 4 * WAVES * ROWS * (columns + 4) bytes.

// Where the sum of row r and a column of the expert waits for those of the other parts of K.
#define PARTIAL_AT(r, column)                                                                        \
    ((((ulong)part * tiles_capacity + row_index) * ROWS + (r)) * n + ((column) - tile.column))

WAVE_OF_32 __attribute__((reqd_work_group_size(LANES * WAVES, 1, 1))) __kernel void gemm(GEMM_ARGS)
{
    __local float sums[WAVES * ROWS * SUMS_STRIDE];
    const uint item = get_local_id(0), lane = item % LANES, wave = item / LANES, g = lane / 4, t = lane % 4;
    const uint strips = STRIPS, blocks = K_BLOCKS;
    const uint column_tiles = (strips + S - 1) / S;
    const uint share = SPLIT ? (blocks + splits - 1) / splits : blocks;
    const uint run = (share + WAVES - 1) / WAVES;
    const uint index = get_group_id(0), part_row = index / column_tiles, column = index - part_row * column_tiles;
    const uint row_index = SPLIT ? part_row / splits : part_row;
    const uint part = SPLIT ? part_row - row_index * splits : 0;

    // All that routing says of the tile is asked for at once.
    const Tile tile = row_tile(row_index, num_experts, n, WORK);
    int rows[TOKEN_TILES];
    int2 out_rows[OUTPUTS];
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++)
        rows[i] = row_of(tile, 8 * i + g, WORK).x;
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
        out_rows[o] = row_of(tile, OUTPUT_ROW(o), WORK);
    const uint first_strip = tile.column / STRIP_N + column * S;
    if (!row_tile_exists(row_index, WORK) || tile.expert < 0 || first_strip >= strips)
        return;
    const Expert expert = expert_at(EXPERT_BASE(tile.expert), strips, blocks, groups);
    __global const uint4 *tokens[TOKEN_TILES];
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++)
        tokens[i] = (__global const uint4 *)(input + input_offset + (ulong)max(rows[i], 0) * k) + t;
    const uint begin = part * share + wave * run;
    const uint end = min(min(begin + run, (part + 1) * share), blocks);

    float4 total[S][TOKEN_TILES];
#pragma unroll
    for (int s = 0; s < S; s++)
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++)
            total[s][i] = (float4)(0);
#pragma unroll 1
    for (uint chunk = begin; chunk < end; chunk += DEPTH) {
        uint4 words[DEPTH][S], x[DEPTH][TOKEN_TILES][2];
        uint scales[DEPTH][S][HALVES], zeros[DEPTH][S][HALVES];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const bool exists = chunk + d < end;
            const uint block = exists ? chunk + d : chunk;  // read again, and multiplied by tokens of 0
#pragma unroll
            for (int s = 0; s < S; s++) {
                const uint strip = min(first_strip + s, strips - 1);
                words[d][s] = load_once(expert.words + (strip * blocks + block) * LANES + lane);
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    const uint group = min((BLOCK_K * block + 32 * h) >> group_shift, groups - 1);
                    const uint at = (strip * groups + group) * 8 + g;
                    scales[d][s][h] = load_early_word(expert.scales + at);
                    zeros[d][s][h] = SYMMETRIC ? 0 : expert.zeros[at];
                }
            }
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; i++) {
                const bool reads = exists && rows[i] >= 0;
                x[d][i][0] = x[d][i][1] = (uint4)(0);
                if (reads)
                    x[d][i][0] = load_early(tokens[i] + block * 8);
                if (reads && BLOCK_K * block + 32 < k)
                    x[d][i][1] = load_early(tokens[i] + block * 8 + 4);
            }
        }
        issue_loads();
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            float4 token_sums[TOKEN_TILES][HALVES];
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; i++)
                sum_tokens(token_sums[i], x[d][i][0], x[d][i][1]);
#pragma unroll
            for (int s = 0; s < S; s++) {
                float2 scale[HALVES];
#pragma unroll
                for (int h = 0; h < HALVES; h++)
                    scale[h] = half2_to_float2(scales[d][s][h]);
#pragma unroll
                for (int i = 0; i < TOKEN_TILES; i++)
                    total[s][i] = add_block(total[s][i], words[d][s], x[d][i][0], x[d][i][1], token_sums[i], scale,
                                            zeros[d][s]);
            }
        }
    }

#pragma unroll
    for (int s = 0; s < S; s++)
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++)
            put_sums(sums, total[s][i], wave, s, i, g, t);
    barrier(CLK_LOCAL_MEM_FENCE);
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
        STORE_SUM(o, out_rows[o], SUM_OF_WAVES(o))
}
