#include "mma_block.cl"

// gemm, tier "mma", for few rows per expert, where reading weights takes the time.
//
// A work-group computes one tile of ROWS rows and STRIPS_PER_WAVE strips. Its waves split K, and each wave loads DEPTH
// blocks at a time, weights and tokens directly into registers. Tiles are small so that many work-groups fit on a
// compute unit: some of them load while others multiply. The code is short, because fetching longer code may take
// longer than a launch.
//
// The grid has a work-group for each tile. Columns of a work-group: 16 * STRIPS_PER_WAVE. Local memory:
// 4 * WAVES * ROWS * (columns + 4) bytes.

// Sums of waves that split K -----------------------------------------------------------------------
//
// Local memory holds floats [WAVES][ROWS][SUMS_STRIDE]. A work-item adds and stores outputs that are LANES * WAVES
// apart in [ROWS][SUM_COLUMNS].

#define SUM_COLUMNS (STRIP_N * S)
#define SUMS_STRIDE (SUM_COLUMNS + 4)  // with 4 more, the 32 lanes of a store use 32 banks
#define OUTPUTS ((ROWS * SUM_COLUMNS + LANES * WAVES - 1) / (LANES * WAVES))
#define OUTPUT_ROW(o) ((item + (o) * LANES * WAVES) / SUM_COLUMNS)
#define OUTPUT_COLUMN(o) ((item + (o) * LANES * WAVES) % SUM_COLUMNS)

// Stores one wave's totals for strip s and token tile i.
static inline void put_sums(__local float *sums, float4 total, uint wave, uint s, uint i, uint g, uint t)
{
    __local float *token = sums + (wave * ROWS + 8 * i + 2 * t) * SUMS_STRIDE + STRIP_N * s + g;
    token[0] = total.x;
    token[SUMS_STRIDE] = total.y;
    token[8] = total.z;
    token[SUMS_STRIDE + 8] = total.w;
}

// The sum over all waves. If the number of work-items does not divide the tile, some work-items have outputs beyond the
// last row; for these they read the last row.
#if ROWS * SUM_COLUMNS % (LANES * WAVES)
#define SUM_OF_WAVES(o) sum_of_waves(sums, min(OUTPUT_ROW(o), (uint)ROWS - 1), OUTPUT_COLUMN(o))
#else
#define SUM_OF_WAVES(o) sum_of_waves(sums, OUTPUT_ROW(o), OUTPUT_COLUMN(o))
#endif
static inline float sum_of_waves(__local const float *sums, uint r, uint c)
{
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WAVES; w++)
        sum += sums[(w * ROWS + r) * SUMS_STRIDE + c];
    return sum;
}

// Stores output o of the tile whose first strip is first_strip. row: row_of(tile, OUTPUT_ROW(o), WORK).
#define STORE_SUM(o, row, sum)                                                                           \
    {                                                                                                    \
        const uint column = STRIP_N * first_strip + OUTPUT_COLUMN(o);                                    \
        if ((row).y >= 0 && column >= tile.column && column < tile.column + tile.columns) {              \
            const uint to = tile.out_column + (column - tile.column);                                    \
            const float result = (sum) * (weight_factor * (column & 8 ? 1 / ODD_UNIT : 1 / EVEN_UNIT)) * \
                                 (ROW_FACTOR ? tiny_factor * row_factor[(row).x] : tiny_factor);         \
            if (SPLIT)                                                                                   \
                partial[PARTIAL_AT(OUTPUT_ROW(o), column)] = result;                                     \
            else                                                                                         \
                store_output(BIAS ? result + BIAS_AT(tile, to) : result, output,                         \
                             output_offset + (ulong)(row).y * output_stride + to);                       \
        }                                                                                                \
    }

// A lane's eight values of 32 of a token: eight consecutive ones, or two runs of four with groups of 16.
#if GROUP_16
typedef uint2 Octets;
#define BLOCK_OCTETS 16
static inline uint4 load_octets(__global const Octets *p)
{
    return (uint4)(load_early_pair(p), load_early_pair(p + 4));
}
#else
typedef uint4 Octets;
#define BLOCK_OCTETS 8
static inline uint4 load_octets(__global const Octets *p) { return load_early(p); }
#endif

// The place in `partial` of the sum for row r and a column of the expert, over this part of K.
#define PARTIAL_AT(r, column) ((((ulong)part * tiles_capacity + row_index) * ROWS + (r)) * n + ((column) - tile.column))

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

    // All loads of routing arrays are issued together.
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
    __global const Octets *tokens[TOKEN_TILES];
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++)
        tokens[i] = (__global const Octets *)(input + input_offset + (ulong)max(rows[i], 0) * k) + t;
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
        BlockWords words[DEPTH][S];
        uint4 x[DEPTH][TOKEN_TILES][2];
        Record records[DEPTH][S][HALVES];
        BlockRecord of_rows[DEPTH][S];
        uint zeros[DEPTH][S][HALVES];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const bool exists = chunk + d < end;
            const uint block = exists ? chunk + d : chunk;  // a block that does not exist is multiplied by zeros
#pragma unroll
            for (int s = 0; s < S; s++) {
                const uint strip = min(first_strip + s, strips - 1);
                words[d][s] = load_words_once(expert.words + (strip * blocks + block) * (BLOCK_QUADS * LANES) + lane);
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    const uint group = min((BLOCK_K * block + GROUP_K * h) >> group_shift, groups - 1);
                    const uint at = (strip * groups + group) * 8 + g;
                    records[d][s][h] = load_early_record(expert.records + at);
                    zeros[d][s][h] = SYMMETRIC ? 0 : expert.zeros[at];
                }
#if TWO_LEVELS
                const uint row = strip * blocks_of_rows(blocks) + (BLOCK_K * block >> BLOCK_SHIFT);
                of_rows[d][s] = expert.of_rows[row * 8 + g];
#else
                of_rows[d][s] = 0;
#endif
            }
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; i++) {
                const bool reads = exists && rows[i] >= 0;
                x[d][i][0] = x[d][i][1] = (uint4)(0);
                if (reads)
                    x[d][i][0] = load_octets(tokens[i] + block * BLOCK_OCTETS);
                if (reads && BLOCK_K * block + 32 < k)
                    x[d][i][1] = load_octets(tokens[i] + block * BLOCK_OCTETS + BLOCK_OCTETS / 2);
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
                Factors factors[HALVES];
#pragma unroll
                for (int h = 0; h < HALVES; h++)
                    factors[h] = group_factors(records[d][s][h], of_rows[d][s]);
#pragma unroll
                for (int i = 0; i < TOKEN_TILES; i++)
                    total[s][i] = add_block(total[s][i], words[d][s], x[d][i][0], x[d][i][1], token_sums[i], factors,
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
