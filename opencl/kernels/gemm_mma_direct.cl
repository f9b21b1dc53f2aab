// needs mma.cl
//
// Few products in all. A work-group is one tile of 8 rows and STRIPS_PER_WAVE strips, its waves split K, and
// each asks for DEPTH blocks at once, weights and tokens straight into registers. The code is short on
// purpose: a launch so small is over before a longer one would have been fetched.
//
// Columns of a work-group: 16 * STRIPS_PER_WAVE. Local memory: 4 * WAVES * ROWS * (columns + 4) bytes.

#if ROWS != 8
#error "ROWS must be 8"
#endif

// Where the sum of row r and a column of the expert waits for those of the other parts of K.
#define PARTIAL_AT(r, column)                                                                        \
    ((((ulong)part * tiles_capacity + row_index) * ROWS + (r)) * n + ((column) - tile.column))

WAVE_OF_32 __attribute__((reqd_work_group_size(LANES * WAVES, 1, 1))) __kernel void gemm(GEMM_ARGS)
{
    __local float sums[WAVES * ROWS * SUMS_STRIDE];
    const uint item = get_local_id(0), lane = item % LANES, wave = item / LANES, g = lane / 4, t = lane % 4;
    const uint strips = STRIPS, blocks = K_BLOCKS;
    const uint column_tiles = (strips + S - 1) / S;
    const uint tiles = max_row_tiles(WORK) * column_tiles * (SPLIT ? splits : 1);
    const uint share = SPLIT ? (blocks + splits - 1) / splits : blocks;
    const uint run = (share + WAVES - 1) / WAVES;

    for (uint index = get_group_id(0); index < tiles; index += get_num_groups(0)) {
        const uint part_row = index / column_tiles, column = index - part_row * column_tiles;
        const uint row_index = SPLIT ? part_row / splits : part_row;
        const uint part = SPLIT ? part_row - row_index * splits : 0;
        // All that routing says of the tile is asked for at once.
        const Tile tile = row_tile(row_index, num_experts, n, WORK);
        const int row = row_of(tile, g, WORK).x;
        if (!row_tile_exists(row_index, WORK))
            break;
        const uint first_strip = tile.column / STRIP_N + column * S;
        if (tile.expert < 0 || first_strip >= strips)
            continue;
        const Expert expert = expert_at(EXPERT_BASE(tile.expert), strips, blocks, groups);
        __global const uint4 *token = (__global const uint4 *)(input + input_offset + (ulong)max(row, 0) * k) + t;
        const uint begin = part * share + wave * run;
        const uint end = min(min(begin + run, (part + 1) * share), blocks);

        float4 total[S];
#pragma unroll
        for (int s = 0; s < S; s++)
            total[s] = (float4)(0);
#pragma unroll 1
        for (uint chunk = begin; chunk < end; chunk += DEPTH) {
            uint4 words[DEPTH][S], x[DEPTH][2];
            uint scales[DEPTH][S][HALVES], zeros[DEPTH][S][HALVES];
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                const bool exists = chunk + d < end;
                const uint block = exists ? chunk + d : chunk;  // read again, and multiplied by tokens of 0
#pragma unroll
                for (int s = 0; s < S; s++) {
                    const uint strip = min(first_strip + s, strips - 1);
                    words[d][s] = load_once(expert.words + ((ulong)strip * blocks + block) * LANES + lane);
#pragma unroll
                    for (int h = 0; h < HALVES; h++) {
                        const uint group = min((BLOCK_K * block + 32 * h) >> group_shift, groups - 1);
                        const uint at = (strip * groups + group) * 8 + g;
                        scales[d][s][h] = load_early_word(expert.scales + at);
                        zeros[d][s][h] = SYMMETRIC ? 0 : expert.zeros[at];
                    }
                }
                const bool reads = exists && row >= 0;
                x[d][0] = x[d][1] = (uint4)(0);
                if (reads)
                    x[d][0] = load_early(token + block * 8);
                if (reads && BLOCK_K * block + 32 < k)
                    x[d][1] = load_early(token + block * 8 + 4);
            }
            issue_loads();
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                float4 token_sums[HALVES];
                sum_tokens(token_sums, x[d][0], x[d][1]);
#pragma unroll
                for (int s = 0; s < S; s++) {
                    float2 scale[HALVES];
#pragma unroll
                    for (int h = 0; h < HALVES; h++)
                        scale[h] = half2_to_float2(scales[d][s][h]);
                    total[s] = add_block(total[s], words[d][s], x[d][0], x[d][1], token_sums, scale, zeros[d][s]);
                }
            }
        }

#pragma unroll
        for (int s = 0; s < S; s++)
            put_sums(sums, total[s], wave, s, 0, g, t);
        barrier(CLK_LOCAL_MEM_FENCE);
#pragma unroll 1
        for (int o = 0; o < OUTPUTS; o++) {
            const int2 out_row = row_of(tile, OUTPUT_ROW(o), WORK);
            STORE_SUM(o, out_row, SUM_OF_WAVES(o))
        }
        barrier(CLK_LOCAL_MEM_FENCE);  // the sums have been read
    }
}
