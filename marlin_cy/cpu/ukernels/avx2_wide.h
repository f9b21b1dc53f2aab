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
 * Registers, of 16: rows (6) times two halves of 32-bit sums, 2 weights, activation, product.
 */
enum { WIDE_ROWS = 6, ODD = MAX_GROUP_K / 2 };

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

/* Join the activations of a group, for all rows of the task. */
KERNEL void join_rows(const gemm_task *task, const group_view *view, int planes)
{
    const int size = view->blocks * LANE_K;
    for (int r = 0; r < task->m; r++) {
        const int8_t *const a = view->a + task->rows[r] * task->a_row_stride;
        int16_t *const to = task->scratch->joined + r * MAX_GROUP_K;
        for (int k = 0; k < size; k += 16)
            join_16(to + k / 2, a + k, a + size + k, planes);
    }
}

/* A pair of joined activations, in every lane. */
KERNEL __m256i broadcast_pair(const int16_t *joined)
{
    int32_t pair;
    memcpy(&pair, joined, sizeof pair);
    return _mm256_set1_epi32(pair);
}

/* rows, source and codes are constants wherever this is inlined. */
KERNEL void wide_micro_kernel(const gemm_task *task, const group_view *view, const group_header *header, int row,
                              int rows, int source, int codes)
{
    const __m256i low_byte = _mm256_set1_epi16(255);
    const int16_t *const joined = task->scratch->joined + (ptrdiff_t)row * MAX_GROUP_K;
    const int32_t *const indices = task->rows + row;
    const ptrdiff_t blocks = view->blocks;
    float *sums = view->sums + (ptrdiff_t)row * PAIR_N;
    const act_meta *meta[WIDE_ROWS];
    __m256i total[WIDE_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        meta[r] = view->meta + indices[r];
        for (int half = 0; half < 2; half++)
            total[r][half] = zero_term(header, meta[r], half, codes);
    }
    for (ptrdiff_t block = 0; block < blocks; block++) {
#pragma GCC unroll 2
        for (int quad = 0; quad < 2; quad++) {
            __m256i w[2];
            load_quad(w, view, block, quad, source, codes);
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                __m256i pairs[2];
                for (int half = 0; half < 2; half++)
                    pairs[half] = odd ? _mm256_srli_epi16(w[half], 8) : _mm256_and_si256(w[half], low_byte);
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) {
                    const __m256i x = broadcast_pair(joined + r * MAX_GROUP_K + odd * ODD + 4 * block + 2 * quad);
                    for (int half = 0; half < 2; half++) {
                        __m256i product = _mm256_madd_epi16(pairs[half], x);
                        KEEP(product);
                        total[r][half] = _mm256_add_epi32(total[r][half], product);
                        KEEP(total[r][half]);
                    }
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const __m256 row_scale = _mm256_set1_ps(meta[r]->scale);
        for (int half = 0; half < 2; half++, sums += 8)
            add_group(sums, total[r][half], header->scale[half], row_scale);
        sums += PAIR_N - TILE_N;
    }
}

KERNEL void wide_rows_of_group(const gemm_task *task, const group_view *view, const group_header *header, int codes)
{
    int row = 0, source = task->m <= WIDE_ROWS ? UNPACK : UNPACK_AND_KEEP;
    if (source == UNPACK_AND_KEEP) {
        wide_micro_kernel(task, view, header, 0, WIDE_ROWS, UNPACK_AND_KEEP, codes);
        for (row = WIDE_ROWS; row + WIDE_ROWS <= task->m; row += WIDE_ROWS)
            wide_micro_kernel(task, view, header, row, WIDE_ROWS, UNPACKED, codes);
    }
#define REST(rows)                                                             \
    case rows:                                                                 \
        if (source == UNPACK)                                                  \
            wide_micro_kernel(task, view, header, row, rows, UNPACK, codes);   \
        else                                                                   \
            wide_micro_kernel(task, view, header, row, rows, UNPACKED, codes); \
        break
    switch (task->m - row) {
        REST(1);
        REST(2);
        REST(3);
        REST(4);
        REST(5);
        REST(6);
    }
#undef REST
}

/* Both tiles of a group are multiplied before the next group, so that activations are joined once. `known` is a constant:
 * what is known of the task's scale record. A constant record means one row. */
KERNEL void gemm_wide_records(const gemm_task *task, int planes, int codes, int known)
{
    const int num_tiles = task->header[1] ? 2 : 1;
    const ptrdiff_t bytes = task_bytes(task, codes);
    const header_layout layout =
        layout_of_header(known == ANY ? task->scales : known, codes, task->group_blocks * LANE_K);
    group_view view = {.unpacked = task->scratch->weights, .a = task->a, .meta = task->meta};
    memset(task->scratch->sums, 0, (size_t)task->m * PAIR_N * sizeof(float));
    for (int g = 0; g < task->num_groups; g++) {
        const ptrdiff_t begin = (ptrdiff_t)g * task->group_blocks * block_bytes(codes), ahead = begin + PREFETCH_FAR;
        view.blocks = g < task->num_groups - 1 ? task->group_blocks : task->last_group_blocks;
        join_rows(task, &view, planes);
        for (int t = 0; t < num_tiles; t++) {
            const group_record record = record_of(task->header[t], &layout, g);
            const group_header header = load_header(record, task->scales, codes, known);
            view.packed = task->body[t] + begin;
            view.ahead = ahead < bytes ? task->body[t] + ahead : task->next[t] + (ahead - bytes);
            view.sums = task->scratch->sums + t * TILE_N;
            if (known >= 0)
                wide_micro_kernel(task, &view, &header, 0, 1, UNPACK, codes);
            else
                wide_rows_of_group(task, &view, &header, codes);
            finish_group(task, &view, record, known);
        }
        view.a += task->a_group_stride;
        view.meta += task->meta_group_stride;
    }
    finish(task, num_tiles * TILE_N);
}

KERNEL void gemm_wide(const gemm_task *task, int planes, int codes)
{
    if (task->m == 1 && task->scales == SCALES_F16)
        gemm_wide_records(task, planes, codes, SCALES_F16);
    else
        WITH_KNOWN_RECORD(gemm_wide_records, task, planes, codes);
}
