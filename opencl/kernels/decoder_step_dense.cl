// Products by weights of 16 or 32 bits in a step in one launch: the head, and with DENSE the projections of attention.
// Rows are float32 in local memory, [TOKENS][k].

// The sum over the 32 work-items of a wave; all work-items of the work-group call it.
#if TENSOR
__attribute__((always_inline)) static inline float lane_sum(float value, __local float *sums)
{
    UNROLLED for (uint mask = 1; mask < WAVE; mask *= 2) value += exchange(value, mask);
    return value;
}
#else
#define lane_sum wave_sum
#endif

// Partial sums of a row and a column. Those of two columns with eight rows would take all registers as float8.
#if TOKENS > 4
typedef float4 Partial;
static inline Partial add_octet(Partial sum, float8 a, float8 b) { return fma(a.hi, b.hi, fma(a.lo, b.lo, sum)); }
static inline float sum_of_partial(Partial sum) { return sum.x + sum.y + (sum.z + sum.w); }
#else
typedef float8 Partial;
static inline Partial add_octet(Partial sum, float8 a, float8 b) { return fma(a, b, sum); }
static inline float sum_of_partial(Partial sum)
{
    const float4 four = sum.lo + sum.hi;
    return four.x + four.y + (four.z + four.w);
}
#endif

// Defines name(sums, matrix, column, columns, k, kept, lane): a lane's part of the products of all rows with columns
// `column` and column + 1 of a matrix [columns][k]. `code` is the weights' INPUT_TYPE.
#define DEFINE_PAIR_PRODUCT(name, code)                                                                                \
    __attribute__((always_inline)) static inline void name(Partial sums[2][TOKENS], ulong matrix, uint column,         \
                                                           uint columns, uint k, __local const float *kept, uint lane) \
    {                                                                                                                  \
        __global const JOIN(TYPE_, code) *weights = (__global const JOIN(TYPE_, code) *)matrix;                        \
        _Pragma("unroll") for (uint r = 0; r < TOKENS; r++) sums[0][r] = sums[1][r] = (Partial)(0);                    \
        _Pragma("unroll 4") for (uint octet = lane; octet < k / 8; octet += WAVE)                                      \
        {                                                                                                              \
            const float8 w0 = JOIN(load8_, code)(weights, min(column, columns - 1) * (ulong)k + 8 * octet);            \
            const float8 w1 = JOIN(load8_, code)(weights, min(column + 1, columns - 1) * (ulong)k + 8 * octet);        \
            _Pragma("unroll") for (uint r = 0; r < TOKENS; r++)                                                        \
            {                                                                                                          \
                const float8 value = vload8(r * (k / 8) + octet, kept);                                                \
                sums[0][r] = add_octet(sums[0][r], value, w0);                                                         \
                sums[1][r] = add_octet(sums[1][r], value, w1);                                                         \
            }                                                                                                          \
        }                                                                                                              \
    }

// Normed rows as float32.
__attribute__((always_inline)) static inline void keep_floats(const float4 normed[TOKENS][FOURS], __local float *kept)
{
    const uint item = get_local_id(0);
#pragma unroll
    for (uint r = 0; r < TOKENS; r++)
#pragma unroll
        for (uint j = 0; j < FOURS; j++)
            if (item + j * ITEMS < HIDDEN / 4)
                vstore4(normed[r][j], r * (HIDDEN / 4) + item + j * ITEMS, kept);
    barrier(CLK_LOCAL_MEM_FENCE);
}

#if DENSE
DEFINE_PAIR_PRODUCT(pair_of_projection, PROJECTION_TYPE)

// out = or, if `adds`, out += rows @ matrix.T + bias; `bias` may be NULL.
__attribute__((always_inline)) static inline void project_dense(ulong matrix, ulong bias, uint columns, uint k,
                                                                uint rows, bool adds, __global float *out,
                                                                __local const float *kept, __local float *scratch)
{
    const uint lane = get_local_id(0) % WAVE, wave = get_local_id(0) / WAVE;
    const uint waves = get_num_groups(0) * WAVES;
    for (uint base = 0; base < columns; base += 2 * waves) {
        const uint first = base + 2 * (wave * get_num_groups(0) + get_group_id(0));
        Partial sums[2][TOKENS];
        pair_of_projection(sums, matrix, first, columns, k, kept, lane);
#pragma unroll
        for (uint r = 0; r < TOKENS; r++)
#pragma unroll
            for (uint c = 0; c < 2; c++) {
                float sum = lane_sum(sum_of_partial(sums[c][r]), scratch);
                const uint column = first + c;
                if (lane == 0 && r < rows && column < columns) {
                    if (bias)
                        sum += ((__global const float *)bias)[column];
                    out[r * (ulong)columns + column] = adds ? out[r * (ulong)columns + column] + sum : sum;
                }
            }
    }
    barrier(CLK_LOCAL_MEM_FENCE);
}
#endif
