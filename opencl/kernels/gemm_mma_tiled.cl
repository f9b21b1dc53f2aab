#include "mma.cl"

// gemm, tier "mma", for many rows per expert, where multiplying takes the time.
//
// A tile is ROWS rows and STRIPS_PER_WAVE * WAVES strips. Each wave has its own strips and all of K. Tokens, weights
// and scales are copied to local memory DEPTH - 1 blocks ahead; all waves read the tokens there. Token tiles without
// rows are skipped.
//
// Columns of a work-group: 16 * STRIPS_PER_WAVE * WAVES. ROWS: a multiple of 4 * WAVES. Local memory:
// DEPTH * STAGE_BYTES (below). Scales are below 2^15, as the packer stores them.

#if SPLIT
#error "gemm_mma_tiled.cl does not support SPLIT"
#endif

#define COLUMNS (STRIP_N * S * WAVES)
#define CHUNKS 8                                            // of 16 bytes in a token's 64 values
#define COPIES (ROWS * CHUNKS / (LANES * WAVES))            // chunks that each work-item copies for one stage
// A stage holds the tokens, which all waves read, and then for each wave words [S][LANES], scales [HALVES][S][LANES]
// and, unless SYMMETRIC, zero points [HALVES][S][LANES].
#define TOKEN_BYTES (ROWS * CHUNKS * 16)
#define WAVE_BYTES (LANES * (16 * S + 4 * HALVES * S * (2 - SYMMETRIC)))
#define SCALES_AT (LANES * 16 * S)
#define ZEROS_AT (SCALES_AT + LANES * 4 * HALVES * S)
#define STAGE_BYTES (TOKEN_BYTES + WAVES * WAVE_BYTES)

// A lane's two zero points (bytes), from the four bytes that were copied.
#define MY_ZEROS(bytes) ((bytes) >> (g & 1) * 16 & 0xffffu)

// The addresses of a lane's words, scales and zeros of S strips.
typedef struct {
    __global const uint4 *words[S];
    __global const uint *scales[S];
    __global const ushort *zeros[S];
} Source;

static inline Source source_of(Expert expert, uint first_strip, uint strips, uint blocks, uint groups, uint lane)
{
    Source source;
#pragma unroll
    for (int s = 0; s < S; s++) {
        const uint strip = min(first_strip + s, strips - 1), group = strip * groups * 8 + lane / 4;
        source.words[s] = expert.words + (ulong)strip * blocks * LANES + lane;
        source.scales[s] = expert.scales + group;
        source.zeros[s] = expert.zeros + group;
    }
    return source;
}

// Copies one block: words to `to`, scales to `to4` + SCALES_AT, and zeros to `to4` + ZEROS_AT. Zeros are copied as the
// four bytes that contain the lane's two.
#define COPY_WEIGHTS(to, to4, source, block)                                                                          \
    {                                                                                                                 \
        _Pragma("unroll") for (int s = 0; s < S; s++)                                                                 \
            copy_async((to) + s * LANES * 16, (source).words[s] + (block) * LANES);                                   \
        _Pragma("unroll") for (int h = 0; h < HALVES; h++)                                                            \
        {                                                                                                             \
            const uint group = min((BLOCK_K * (block) + 32 * h) >> group_shift, groups - 1) * 8;                      \
            _Pragma("unroll") for (int s = 0; s < S; s++)                                                             \
            {                                                                                                         \
                const uint at = (h * S + s) * LANES * 4;                                                              \
                copy_async4((to4) + SCALES_AT + at, (source).scales[s] + group);                                      \
                if (!SYMMETRIC)                                                                                       \
                    copy_async4((to4) + ZEROS_AT + at, (__global const uint *)((source).zeros[s] + group - (g & 1))); \
            }                                                                                                         \
        }                                                                                                             \
    }

// Products use float16 weights times WEIGHT_UNIT. The largest stored scale is between 2^14 and 2^15.
#if !HAS_ZERO_POINTS
#define WEIGHT_UNIT CODE_UNIT

typedef struct {
    uint even, odd;             // scales of a lane's two columns of a strip
} Group;

static inline Group group_of(uint scales, uint zeros)
{
    Group group;
    group.even = (scales & 0xffffu) * 0x10001u;
    group.odd = (scales >> 16) * 0x10001u;
    return group;
}

static inline uint4 weights_of(uint word, Group group)
{
    const uint4 q = code_halves(word);
    return (uint4)(half2_mul(q.x, group.even), half2_mul(q.y, group.odd), half2_mul(q.z, group.even),
                   half2_mul(q.w, group.odd));
}
#else
#define WEIGHT_UNIT (SYMMETRIC ? 0x1p-24f : 0x1p-10f)

// The terms that dequantisation subtracts, as pairs of float16: 1024 + z for column g, -(64 + z) for column g + 8.
typedef struct {
    uint even, odd;
} Zeros;

static inline Zeros zeros_of(uint z, uint z8)
{
    Zeros zeros;
    zeros.even = (0x6400u + z) * 0x10001u;
    zeros.odd = (0xd400u + (z8 << 4)) * 0x10001u;
    return zeros;
}

// q - z of a fragment, exactly: a nibble below 0x6400 is the float16 1024 + q, and four bits higher it is 1024 + 16 q.
// Source of the idea: Kim et al., "Who Says Elephants Can't Run", 2022; Marlin uses it too.
static inline uint4 dequantise(uint word, Zeros zeros)
{
    const uint magic = 0x64006400u, sixteenth = 0x2c002c00u;
    uint next = word >> 8;
    return (uint4)(half2_sub((word & 0x000f000fu) | magic, zeros.even),
                   half2_fma((word & 0x00f000f0u) | magic, sixteenth, zeros.odd),
                   half2_sub((next & 0x000f000fu) | magic, zeros.even),
                   half2_fma((next & 0x00f000f0u) | magic, sixteenth, zeros.odd));
}

// A group's constants for a lane's two columns of a strip.
typedef struct {
    uint even, odd;             // factors
    uint even_add, odd_add;     // SYMMETRIC: added to the product with the factor; otherwise: as in Zeros
} Group;

static inline Group group_of(uint scales, uint zeros)
{
    Group group;
    const uint even = (scales & 0xffffu) * 0x10001u, odd = (scales >> 16) * 0x10001u;
#if SYMMETRIC  // nibbles without an exponent are q * 2^-24 and q * 2^-20; z * scale is exact
    group.even = even;
    group.odd = half2_mul(odd, 0x2c002c00u);            // 2^-4
    const uint minus_zero = (0x8000u | SYMMETRIC_ZERO) * 0x10001u; // -z * 2^-24
    group.even_add = half2_mul(even, minus_zero);
    group.odd_add = half2_mul(odd, minus_zero);
#else
    group.even = half2_mul(even, 0x14001400u);          // 2^-10
    group.odd = half2_mul(odd, 0x14001400u);
    const Zeros z = zeros_of(zeros & 0xffu, zeros >> 8);
    group.even_add = z.even;
    group.odd_add = z.odd;
#endif
    return group;
}

static inline uint4 weights_of(uint word, Group group)
{
    word = code_integers(word);
#if SYMMETRIC
    const uint next = word >> 8;
    return (uint4)(half2_fma(word & 0x000f000fu, group.even, group.even_add),
                   half2_fma(word & 0x00f000f0u, group.odd, group.odd_add),
                   half2_fma(next & 0x000f000fu, group.even, group.even_add),
                   half2_fma(next & 0x00f000f0u, group.odd, group.odd_add));
#else
    Zeros z;
    z.even = group.even_add;
    z.odd = group.odd_add;
    const uint4 q = dequantise(word, z);
    return (uint4)(half2_mul(q.x, group.even), half2_mul(q.y, group.odd), half2_mul(q.z, group.even),
                   half2_mul(q.w, group.odd));
#endif
}
#endif

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
#define MULTIPLY(TILES_USED)                                                                                         \
    {                                                                                                                \
        uint stage_index = 0;                                                                                        \
        for (uint block = 0; block < blocks; block++) {                                                              \
            AWAIT_COPIES(DEPTH - 2);                                                                                 \
            barrier(CLK_LOCAL_MEM_FENCE);                                                                            \
            COPY_STAGE(block + DEPTH - 1, stage_index == 0 ? DEPTH - 1 : stage_index - 1);                           \
            __local const uint4 *stage = stages + stage_index * (STAGE_BYTES / 16);                                  \
            __local const uint4 *mine = stage + (TOKEN_BYTES + wave * WAVE_BYTES) / 16;                              \
            __local const uint *mine4 = (__local const uint *)mine + lane;                                           \
            stage_index = stage_index + 1 == DEPTH ? 0 : stage_index + 1;                                            \
            uint4 w[S];                                                                                              \
            Group group[S];                                                                                          \
            _Pragma("unroll") for (int s = 0; s < S; s++) w[s] = mine[s * LANES + lane];                             \
            _Pragma("unroll") for (int half_block = 0; half_block < 2; half_block++)                                 \
            {                                                                                                        \
                uint4 a[S][2];                                                                                       \
                _Pragma("unroll") for (int s = 0; s < S; s++)                                                        \
                {                                                                                                    \
                    if (half_block < HALVES) {                                                                       \
                        const uint at = (half_block * S + s) * LANES;                                                \
                        group[s] =                                                                                   \
                            group_of(mine4[SCALES_AT / 4 + at], SYMMETRIC ? 0 : MY_ZEROS(mine4[ZEROS_AT / 4 + at])); \
                    }                                                                                                \
                    a[s][0] = weights_of(half_block ? w[s].z : w[s].x, group[s]);                                    \
                    a[s][1] = weights_of(half_block ? w[s].w : w[s].y, group[s]);                                    \
                }                                                                                                    \
                _Pragma("unroll") for (int i = 0; i < TILES_USED; i++)                                               \
                {                                                                                                    \
                    const uint4 x = stage[(8 * i + g) * CHUNKS + ((4 * half_block + t) ^ ((g & 1) * 4))];            \
                    _Pragma("unroll") for (int s = 0; s < S; s++) total[s][i] = mma(a[s][0], x.x, x.y, total[s][i]); \
                    _Pragma("unroll") for (int s = 0; s < S; s++) total[s][i] = mma(a[s][1], x.z, x.w, total[s][i]); \
                }                                                                                                    \
            }                                                                                                        \
        }                                                                                                            \
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
