/* AVX2, many rows of one group of a tile: what the row kernels of avx2_bytes.h and avx2_wide.h have in common.
 *
 * A row kernel multiplies up to six rows (ROWS) by the unpacked weights of a group. The code is shared by all scale
 * records and code types that have the same kind of zero points.
 */
enum { ROWS = 6 };

/* Kinds of zero points. */
enum {
    ZERO_PAIRS,    /* group_header.minus_zero, in pairs of 16 bits */
    ZERO_INTEGERS, /* group_header.minus_zero, in 32 bits */
    ZERO_CONSTANT, /* group_terms.minus_constant, for all columns */
    MINIMA,        /* none: group_terms.minimum takes their place */
};

/* The terms of a group for many rows. */
typedef struct {
    group_header header;
    __m256 minimum[2]; /* with minima: what load_minima returns */
    int minus_constant;
} group_terms;

KERNEL void load_constant_record(group_terms *terms, group_record record, int scales, int codes)
{
    terms->header = load_terms(record, scales, codes);
    terms->minus_constant = -constant_zero(scales, codes);
    if (scale_records[scales].has_minimum)
        for (int half = 0; half < 2; half++)
            terms->minimum[half] = load_minima(record, scales, half);
}

/* `codes` is a constant; a constant record makes straight-line code. A call would take longer than the loads. */
KERNEL void load_group_terms(group_terms *terms, group_record record, int scales, int codes)
{
    switch (scales) {
    case SCALES_F16: load_constant_record(terms, record, SCALES_F16, codes); break;
    case SCALES_BF16: load_constant_record(terms, record, SCALES_BF16, codes); break;
    case SCALES_F16_MIN: load_constant_record(terms, record, SCALES_F16_MIN, codes); break;
    case SCALES_TWO_LEVEL: load_constant_record(terms, record, SCALES_TWO_LEVEL, codes); break;
    case SCALES_TWO_LEVEL_MIN: load_constant_record(terms, record, SCALES_TWO_LEVEL_MIN, codes); break;
    default: load_constant_record(terms, record, scales, codes);
    }
}

/* Minus the zero points of both halves times the sum of a row's activations. `kind` is a constant. */
KERNEL void zero_terms(__m256i to[2], const group_terms *terms, const act_meta *meta, int kind)
{
    const int32_t sum = -(meta->symmetric_sum >> 3); /* symmetric_sum is -8 times the sum */
    for (int half = 0; half < 2; half++)
        to[half] = kind == MINIMA          ? _mm256_setzero_si256()
                   : kind == ZERO_CONSTANT ? _mm256_set1_epi32(sum * terms->minus_constant)
                   : kind == ZERO_INTEGERS
                       ? _mm256_mullo_epi32(terms->header.minus_zero[half], _mm256_set1_epi32(sum))
                       : _mm256_madd_epi16(terms->header.minus_zero[half], _mm256_set1_epi32(meta->sum_split));
}

/* The float steps of one row; zero points are already subtracted from `total`. */
KERNEL void add_row(float *sums, const __m256i total[2], const group_terms *terms, const act_meta *meta, int kind)
{
    const __m256 row_scale = _mm256_set1_ps(meta->scale);
    __m256 sum[2];
    for (int half = 0; half < 2; half++)
        sum[half] =
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[half]), _mm256_mul_ps(row_scale, terms->header.scale[half]),
                            _mm256_load_ps(sums + 8 * half));
    if (kind == MINIMA) {
        const __m256 factor = _mm256_set1_ps(meta->scale * (float)meta->symmetric_sum);
        for (int half = 0; half < 2; half++)
            sum[half] = _mm256_fmadd_ps(factor, terms->minimum[half], sum[half]);
    }
    for (int half = 0; half < 2; half++)
        _mm256_store_ps(sums + 8 * half, sum[half]);
}

/* A group of a tile. `next` is the memory that is read after the tile's blocks. */
KERNEL group_view view_of(const gemm_task *task, int tile, int group, const uint8_t *next, int codes)
{
    const ptrdiff_t begin = (ptrdiff_t)group * task->group_blocks * block_bytes(codes);
    const ptrdiff_t ahead = begin + PREFETCH_FAR, bytes = task_bytes(task, codes);
    return (group_view){
        .packed = task->body[tile] + begin,
        .ahead = ahead < bytes ? task->body[tile] + ahead : next + (ahead - bytes),
        .unpacked = task->scratch->weights,
        .blocks = group < task->num_groups - 1 ? task->group_blocks : task->last_group_blocks,
        .a = task->a + group * task->a_group_stride,
        .meta = task->meta + group * task->meta_group_stride,
        .sums = task->scratch->sums + tile * TILE_N,
    };
}

/* Where a row of a task is, in bytes from row 0 of any group. */
typedef struct {
    ptrdiff_t a, meta;
} row_place;

KERNEL void find_rows(row_place *places, const gemm_task *task)
{
    for (int r = 0; r < task->m; r++)
        places[r] = (row_place){task->rows[r] * task->a_row_stride, task->rows[r] * (ptrdiff_t)sizeof(act_meta)};
}

KERNEL const act_meta *meta_at(const group_view *view, row_place place)
{
    return (const act_meta *)(const void *)((const char *)view->meta + place.meta);
}

/* Call kernel(row, number of rows, ...) for all rows from `begin` to `end` - 1; `most` is a constant, at most ROWS. */
#define CALL_FOR_ROWS(kernel, begin, end, most, ...) \
    do {                                             \
        int row = begin;                             \
        for (; row + (most) <= (end); row += (most)) \
            kernel(row, most, __VA_ARGS__);          \
        switch ((end) - row) {                       \
        case 1: kernel(row, 1, __VA_ARGS__); break;  \
        case 2: kernel(row, 2, __VA_ARGS__); break;  \
        case 3:                                      \
            if ((most) > 3)                          \
                kernel(row, 3, __VA_ARGS__);         \
            break;                                   \
        case 4:                                      \
            if ((most) > 4)                          \
                kernel(row, 4, __VA_ARGS__);         \
            break;                                   \
        case 5:                                      \
            if ((most) > 5)                          \
                kernel(row, 5, __VA_ARGS__);         \
            break;                                   \
        }                                            \
    } while (0)
