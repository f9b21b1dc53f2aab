/* AVX2 for multiplicands that need 8 bits: codes of 8 bits, and IQ4_NL. The pair sums of vpmaddubsw would not fit 16
 * bits. So both operands have 16 bits: vpmaddwd multiplies 16 weights by 16 activations and adds pairs of products to
 * 32-bit sums. It multiplies whole activations, so two planes cost no more than one. With 16-bit activations, a product
 * takes about as long as one of 4-bit codes.
 *
 * Four values of K of a column are the four bytes of a lane. Two operands come of them: the even values (0 and 2 of the
 * lane) by an `and`, the odd ones (1 and 3) by a shift. Activations are joined from their planes once for each group and
 * row, in the same order:
 *
 *   joined + row * MAX_GROUP_K:   for each four values of K, values 0 and 2; ODD elements further, values 1 and 3
 *
 * A weight is at most 255 and an activation at most 32639 in magnitude: 128 products fit 32 bits.
 *
 * With many rows, both operands of a group are stored in the scratch memory once.
 *
 * Registers, of 16: rows (6) times two halves of 32-bit sums, 2 weights, activation, product.
 */
enum { ODD = MAX_GROUP_K / 2, FEW_ROWS = ROWS };

/* sum += weights * x. One statement, so that GCC neither copies sums nor changes the order of additions. */
#define MULTIPLY_ADD_WORDS(sum, w, x)                                                                     \
    do {                                                                                                  \
        __m256i product;                                                                                  \
        __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(x), "x"(w)); \
    } while (0)

/* Join 16 values; `low` is plane 1, which one plane does not have. */
KERNEL void join_16(int16_t *to, const int8_t *high, const int8_t *low, int planes)
{
    const __m128i first = _mm_loadu_si128((const __m128i *)high);
    __m128i even = _mm_slli_epi16(first, 8), odd = _mm_and_si128(first, _mm_set1_epi16((short)0xff00));
    if (planes == 2) {
        const __m128i second = _mm_loadu_si128((const __m128i *)low);
        even = _mm_add_epi16(even, _mm_srai_epi16(_mm_slli_epi16(second, 8), 8));
        odd = _mm_add_epi16(odd, _mm_srai_epi16(second, 8));
    } else {
        even = _mm_srai_epi16(even, 8);
        odd = _mm_srai_epi16(odd, 8);
    }
    _mm_store_si128((__m128i *)to, even);
    _mm_store_si128((__m128i *)(to + ODD), odd);
}

/* `planes` is a constant. */
KERNEL void join_planes(const gemm_task *task, const group_view *view, int m, int planes)
{
    const int size = view->blocks * LANE_K;
    for (int r = 0; r < m; r++) {
        const int8_t *const a = view->a + task->rows[r] * task->a_row_stride;
        int16_t *const to = task->scratch->joined + r * MAX_GROUP_K;
        for (int k = 0; k < size; k += 16)
            join_16(to + k / 2, a + k, a + size + k, planes);
    }
}

/* Join the activations of a group, for `m` rows, all rows of the task. Nothing else depends on `planes`, which is not a
 * constant: products of both precisions share the code. */
KERNEL void join_rows(const gemm_task *task, const group_view *view, int m, int planes)
{
    if (planes == 2)
        join_planes(task, view, m, 2);
    else
        join_planes(task, view, m, 1);
}

/* A pair of joined activations, in every lane. */
KERNEL __m256i broadcast_pair(const int16_t *joined)
{
    int32_t pair;
    memcpy(&pair, joined, sizeof pair);
    return _mm256_set1_epi32(pair);
}

/* A task of one row. */
KERNEL void one_wide_row(const gemm_task *task, const group_view *view, const group_header *header, int codes)
{
    const __m256i low_byte = _mm256_set1_epi16(255);
    const int16_t *const joined = task->scratch->joined;
    const ptrdiff_t blocks = view->blocks;
    const act_meta *const meta = view->meta + task->rows[0];
    __m256i total[2] = {zero_term(header, meta, 0, codes), zero_term(header, meta, 1, codes)};
    for (ptrdiff_t block = 0; block < blocks; block++) {
#pragma GCC unroll 2
        for (int quad = 0; quad < 2; quad++) {
            __m256i w[2];
            load_quad(w, view, block, quad, UNPACK, codes);
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                const __m256i x = broadcast_pair(joined + odd * ODD + 4 * block + 2 * quad);
                for (int half = 0; half < 2; half++) {
                    const __m256i pairs = odd ? _mm256_srli_epi16(w[half], 8) : _mm256_and_si256(w[half], low_byte);
                    __m256i product = _mm256_madd_epi16(pairs, x);
                    KEEP(product);
                    total[half] = _mm256_add_epi32(total[half], product);
                    KEEP(total[half]);
                }
            }
        }
    }
    for (int half = 0; half < 2; half++)
        add_group(view->sums + 8 * half, total[half], header->scale[half], _mm256_set1_ps(meta->scale));
}

/* Rows of a group. Operands are read from `view->unpacked`, or taken from codes of 8 bits (`packed`), which takes less time
 * if there are few rows. `rows`, `packed` and `kind` are constants. */
KERNEL void wide_rows(int row, int rows, const group_view *view, const int16_t *joined, const row_place *places,
                      const group_terms *terms, int packed, int kind)
{
    const __m256i low_byte = _mm256_set1_epi16(255);
    const row_place *const place = places + row;
    const int16_t *const a = joined + (ptrdiff_t)row * MAX_GROUP_K;
    float *const sums = view->sums + (ptrdiff_t)row * PAIR_N;
    const ptrdiff_t blocks = view->blocks;
    __m256i total[ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        zero_terms(total[r], terms, meta_at(view, place[r]), kind);
    ptrdiff_t block = 0;
    do { /* a group has at least one block: a loop that is always entered keeps its sums in their registers */
#pragma GCC unroll 2
        for (int quad = 0; quad < 2; quad++) {
            __m256i bytes[2];
            if (packed)
                load_quad(bytes, view, block, quad, UNPACK, CODES_UINT8);
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                const __m256i *const from = (const __m256i *)view->unpacked + 8 * block + 4 * quad + 2 * odd;
                __m256i w[2];
                for (int half = 0; half < 2; half++)
                    w[half] = !packed ? _mm256_load_si256(from + half)
                              : odd   ? _mm256_srli_epi16(bytes[half], 8)
                                      : _mm256_and_si256(bytes[half], low_byte);
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) {
                    const __m256i x = broadcast_pair(a + r * MAX_GROUP_K + odd * ODD + 4 * block + 2 * quad);
                    for (int half = 0; half < 2; half++)
                        MULTIPLY_ADD_WORDS(total[r][half], w[half], x);
                }
            }
        }
    } while (++block < blocks);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        add_row(sums + r * PAIR_N, total[r], terms, meta_at(view, place[r]), kind);
}

#define WIDE(name, most, packed, kind)                                                                \
    YMM_CALL void name(const group_view *view, const int16_t *joined, const row_place *places, int m, \
                       const group_terms *terms)                                                      \
    {                                                                                                 \
        CALL_FOR_ROWS(wide_rows, 0, m, most, view, joined, places, terms, packed, kind);              \
    }

WIDE(wide_with_pairs, ROWS, 0, ZERO_PAIRS)
WIDE(wide_with_integers, ROWS, 0, ZERO_INTEGERS)
WIDE(wide_with_constant, ROWS, 0, ZERO_CONSTANT)
WIDE(wide_with_minima, ROWS, 0, MINIMA)
WIDE(few_wide_with_integers, FEW_ROWS, 1, ZERO_INTEGERS)
WIDE(few_wide_with_constant, FEW_ROWS, 1, ZERO_CONSTANT)
WIDE(few_wide_with_minima, FEW_ROWS, 1, MINIMA)

KERNEL void unpack_operands(const group_view *view, int codes)
{
    const __m256i low_byte = _mm256_set1_epi16(255);
    for (ptrdiff_t block = 0; block < view->blocks; block++)
        for (int quad = 0; quad < 2; quad++) {
            __m256i w[2], *const to = (__m256i *)view->unpacked + 8 * block + 4 * quad;
            load_quad(w, view, block, quad, UNPACK, codes);
            for (int half = 0; half < 2; half++) {
                _mm256_store_si256(to + half, _mm256_and_si256(w[half], low_byte));
                _mm256_store_si256(to + 2 + half, _mm256_srli_epi16(w[half], 8));
            }
        }
}

/* All rows of a group of a task with more than one. */
KERNEL void multiply_wide(const gemm_task *task, const group_view *view, const row_place *places, group_record record,
                          int codes)
{
    const int minima = scale_records[task->scales].has_minimum, zeros = stores_zeros(task->scales), m = task->m;
    const int few = codes == CODES_UINT8 && m <= FEW_ROWS;
    const int16_t *const joined = task->scratch->joined;
    group_terms terms;
    load_group_terms(&terms, record, task->scales, codes);
    if (!few)
        unpack_operands(view, codes);
    if (minima)
        (few ? few_wide_with_minima : wide_with_minima)(view, joined, places, m, &terms);
    else if (code_types[codes].zero_bytes == 1)
        wide_with_pairs(view, joined, places, m, &terms);
    else if (zeros)
        (few ? few_wide_with_integers : wide_with_integers)(view, joined, places, m, &terms);
    else
        (few ? few_wide_with_constant : wide_with_constant)(view, joined, places, m, &terms);
}

/* A task of one row. Both tiles of a group are multiplied before the next group, so that activations are joined once.
 * `known` is a constant: what is known of the task's scale record. */
KERNEL void gemm_one_wide_row(const gemm_task *task, int planes, int codes, int known)
{
    const int num_tiles = task->header[1] ? 2 : 1;
    const ptrdiff_t bytes = task_bytes(task, codes);
    const header_layout layout =
        layout_of_header(known == ANY ? task->scales : known, codes, task->group_blocks * LANE_K);
    group_view view = {.a = task->a, .meta = task->meta};
    memset(task->scratch->sums, 0, PAIR_N * sizeof(float));
    for (int g = 0; g < task->num_groups; g++) {
        const ptrdiff_t begin = (ptrdiff_t)g * task->group_blocks * block_bytes(codes), ahead = begin + PREFETCH_FAR;
        view.blocks = g < task->num_groups - 1 ? task->group_blocks : task->last_group_blocks;
        join_rows(task, &view, 1, planes);
        for (int t = 0; t < num_tiles; t++) {
            const group_record record = record_of(task->header[t], &layout, g);
            const group_header header = load_header(record, task->scales, codes, known);
            view.packed = task->body[t] + begin;
            view.ahead = ahead < bytes ? task->body[t] + ahead : task->next[t] + (ahead - bytes);
            view.sums = task->scratch->sums + t * TILE_N;
            one_wide_row(task, &view, &header, codes);
            finish_group(task, &view, record, known);
        }
        view.a += task->a_group_stride;
        view.meta += task->meta_group_stride;
    }
    finish(task, num_tiles * TILE_N);
}

/* The same with more rows. Activations are joined for the first tile of a group that needs them. */
KERNEL void gemm_wide_rows(const gemm_task *task, int planes, int codes)
{
    const int num_tiles = task->header[1] ? 2 : 1;
    const header_layout layout = layout_of_header(task->scales, codes, task->group_blocks * LANE_K);
    row_place places[MAX_MC];
    find_rows(places, task);
    memset(task->scratch->sums, 0, (size_t)task->m * PAIR_N * sizeof(float));
    for (int g = 0; g < task->num_groups; g++) {
        int joined = 0;
        for (int t = 0; t < num_tiles; t++) {
            const group_view view = view_of(task, t, g, task->next[t], codes);
            const group_record record = record_of(task->header[t], &layout, g);
            if (planes == 1 && codes == CODES_UINT8 && multiply_narrow(task, &view, places, record))
                continue;
            if (!joined)
                join_rows(task, &view, task->m, planes);
            joined = 1;
            multiply_wide(task, &view, places, record, codes);
        }
    }
    finish(task, num_tiles * TILE_N);
}

KERNEL void gemm_wide(const gemm_task *task, int planes, int codes)
{
    if (task->m > 1)
        gemm_wide_rows(task, planes, codes);
    else if (task->scales == SCALES_F16)
        gemm_one_wide_row(task, planes, codes, SCALES_F16);
    else
        WITH_KNOWN_RECORD(gemm_one_wide_row, task, planes, codes);
}
