/* AVX2, many rows by weights of at most 6 bits in groups with few 16-bit sums: groups of 32 with codes of 4 bits, whose
 * products are added in 16 bits for the whole group, and codes of 8 bits that use only six. The products are those of
 * avx2.c. 32-bit sums and float steps follow at the end of the group, from registers.
 */

/* sum += weights * x, in 16 bits. One statement, so that GCC neither copies sums nor changes the order of additions. */
#define MULTIPLY_ADD_BYTES(sum, w, x)                                                                       \
    do {                                                                                                    \
        __m256i product;                                                                                    \
        __asm__("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(x), "x"(w)); \
    } while (0)

/* Rows of a group that has a single 16-bit sum, of four blocks. All arguments but pointers and `row` are constants. */
KERNEL void single_sum_rows(int row, int rows, const group_view *view, const row_place *places,
                            const group_terms *terms, int planes, int source, int kind)
{
    enum { BLOCKS = 4 };
    const __m256i ones = _mm256_set1_epi16(1), by_256 = _mm256_set1_epi16(256);
    const row_place *const place = places + row;
    float *const sums = view->sums + (ptrdiff_t)row * PAIR_N;
    const int8_t *a[ROWS];
    __m256i sum[ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        a[r] = view->a + place[r].a;
#pragma GCC unroll 4
    for (int block = 0; block < BLOCKS; block++) {
#pragma GCC unroll 2
        for (int quad = 0; quad < 2; quad++) {
            __m256i w[2];
            load_quad(w, view, block, quad, source, CODES_UINT4);
#pragma GCC unroll 8
            for (int i = 0; i < rows * planes; i++) {
                const __m256i x = broadcast_quad(a[i / planes] + (i % planes * BLOCKS + block) * LANE_K + 4 * quad);
                for (int half = 0; half < 2; half++) {
                    if (block + quad == 0) {
                        sum[i][half] = _mm256_maddubs_epi16(w[half], x);
                        KEEP(sum[i][half]);
                    } else {
                        MULTIPLY_ADD_BYTES(sum[i][half], w[half], x);
                    }
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const act_meta *const meta = meta_at(view, place[r]);
        __m256i total[2], zero[2];
        zero_terms(zero, terms, meta, kind);
        for (int half = 0; half < 2; half++) {
            total[half] = _mm256_madd_epi16(sum[r * planes][half], planes == 2 ? by_256 : ones);
            if (planes == 2)
                total[half] = _mm256_add_epi32(total[half], _mm256_madd_epi16(sum[r * planes + 1][half], ones));
            if (kind != MINIMA)
                total[half] = _mm256_add_epi32(total[half], zero[half]);
        }
        add_row(sums + r * PAIR_N, total, terms, meta, kind);
    }
}

/* All rows of such a group. The first kernel unpacks the weights for the others. */
#define SINGLE_SUM(name, planes, kind)                                                                   \
    YMM_CALL void name(const group_view *view, const row_place *places, int m, const group_terms *terms) \
    {                                                                                                    \
        const int most = ROWS / (planes), first = m < most ? 0 : most;                                   \
        if (first)                                                                                       \
            single_sum_rows(0, most, view, places, terms, planes, UNPACK_AND_KEEP, kind);                \
        else                                                                                             \
            for (int block = 0; block < view->blocks; block++)                                           \
                for (int quad = 0; quad < 2; quad++) {                                                   \
                    __m256i w[2];                                                                        \
                    load_quad(w, view, block, quad, UNPACK_AND_KEEP, CODES_UINT4);                       \
                }                                                                                        \
        CALL_FOR_ROWS(single_sum_rows, first, m, most, view, places, terms, planes, UNPACKED, kind);     \
    }

SINGLE_SUM(single_sum_i8, 1, ZERO_PAIRS)
SINGLE_SUM(single_sum_i16, 2, ZERO_PAIRS)
SINGLE_SUM(single_sum_minima_i8, 1, MINIMA)
SINGLE_SUM(single_sum_minima_i16, 2, MINIMA)

KERNEL void gemm_groups_of_32(const gemm_task *task, int planes)
{
    const int num_tiles = task->header[1] ? 2 : 1;
    const header_layout layout = layout_of_header(task->scales, CODES_UINT4, task->group_blocks * LANE_K);
    row_place places[MAX_MC];
    find_rows(places, task);
    memset(task->scratch->sums, 0, (size_t)task->m * PAIR_N * sizeof(float));
    for (int t = 0; t < num_tiles; t++) {
        const uint8_t *const next = t + 1 < num_tiles ? task->body[t + 1] : task->next[0];
        for (int g = 0; g < task->num_groups; g++) {
            const group_view view = view_of(task, t, g, next, CODES_UINT4);
            group_terms terms;
            load_group_terms(&terms, record_of(task->header[t], &layout, g), task->scales, CODES_UINT4);
            if (scale_records[task->scales].has_minimum)
                (planes == 2 ? single_sum_minima_i16 : single_sum_minima_i8)(&view, places, task->m, &terms);
            else
                (planes == 2 ? single_sum_i16 : single_sum_i8)(&view, places, task->m, &terms);
        }
    }
    finish(task, num_tiles * TILE_N);
}

/* Rows that narrow_rows takes: six 16-bit sums, six 32-bit sums, 2 weights, activation and product fill the registers. */
enum { NARROW_ROWS = 3 };

/* Rows of a group of weights of 6 bits: a block has a 16-bit sum, of two pairs, at most 4 * 63 * 128 in magnitude.
 * `view->unpacked` has the weights. */
KERNEL void narrow_rows(int row, int rows, const group_view *view, const row_place *places, const group_terms *terms,
                        int kind)
{
    const __m256i ones = _mm256_set1_epi16(1);
    const row_place *const place = places + row;
    float *const sums = view->sums + (ptrdiff_t)row * PAIR_N;
    const int8_t *a[NARROW_ROWS];
    __m256i total[NARROW_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        a[r] = view->a + place[r].a;
        zero_terms(total[r], terms, meta_at(view, place[r]), kind);
    }
    const __m256i *from = (const __m256i *)view->unpacked;
    const ptrdiff_t end = view->blocks * LANE_K;
    for (ptrdiff_t k = 0; k < end; k += LANE_K, from += 4) {
        __m256i sum[NARROW_ROWS][2];
#pragma GCC unroll 2
        for (int quad = 0; quad < 2; quad++) {
            const __m256i w[2] = {_mm256_load_si256(from + 2 * quad), _mm256_load_si256(from + 2 * quad + 1)};
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const __m256i x = broadcast_quad(a[r] + k + 4 * quad);
                for (int half = 0; half < 2; half++) {
                    if (quad == 0) {
                        sum[r][half] = _mm256_maddubs_epi16(w[half], x);
                        KEEP(sum[r][half]);
                    } else {
                        MULTIPLY_ADD_BYTES(sum[r][half], w[half], x);
                    }
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            for (int half = 0; half < 2; half++)
                total[r][half] = _mm256_add_epi32(total[r][half], _mm256_madd_epi16(sum[r][half], ones));
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        add_row(sums + r * PAIR_N, total[r], terms, meta_at(view, place[r]), kind);
}

#define NARROW(name, kind)                                                                               \
    YMM_CALL void name(const group_view *view, const row_place *places, int m, const group_terms *terms) \
    {                                                                                                    \
        CALL_FOR_ROWS(narrow_rows, 0, m, NARROW_ROWS, view, places, terms, kind);                        \
    }

NARROW(narrow_with_zeros, ZERO_INTEGERS)
NARROW(narrow_with_constant, ZERO_CONSTANT)
NARROW(narrow_with_minima, MINIMA)

/* Copy a group of codes of 8 bits, minus `base`, up to the first difference of more than 6 bits. Returns whether there is
 * none. */
KERNEL int copy_narrow(const group_view *view, int base)
{
    const __m256i minus = _mm256_set1_epi8((char)base), high_bits = _mm256_set1_epi8((char)0xc0);
    for (ptrdiff_t block = 0; block < view->blocks; block++) {
        __m256i any = _mm256_setzero_si256(), *const to = (__m256i *)(view->unpacked + block * UNPACKED_BLOCK);
        for (int quad = 0; quad < 2; quad++) {
            __m256i w[2];
            load_quad(w, view, block, quad, UNPACK, CODES_UINT8);
            for (int half = 0; half < 2; half++) {
                w[half] = _mm256_sub_epi8(w[half], minus);
                any = _mm256_or_si256(any, w[half]);
                _mm256_store_si256(to + 2 * quad + half, w[half]);
            }
        }
        if (!_mm256_testz_si256(any, high_bits))
            return 0;
    }
    return 1;
}

/* Multiply a group of codes of 8 bits by activations of 8 bits, if the codes allow it, as those of Q5_0, Q5_1, Q5_K and
 * Q6_K do. Returns whether they did. */
KERNEL int multiply_narrow(const gemm_task *task, const group_view *view, const row_place *places, group_record record)
{
    enum { CONSTANT = 32 };
    const int minima = scale_records[task->scales].has_minimum, constant = !minima && !stores_zeros(task->scales);
    if (!copy_narrow(view, constant ? constant_zero(task->scales, CODES_UINT8) - CONSTANT : 0))
        return 0;
    group_terms terms;
    load_group_terms(&terms, record, task->scales, CODES_UINT8);
    terms.minus_constant = -CONSTANT;
    if (minima)
        narrow_with_minima(view, places, task->m, &terms);
    else if (constant)
        narrow_with_constant(view, places, task->m, &terms);
    else
        narrow_with_zeros(view, places, task->m, &terms);
    return 1;
}
