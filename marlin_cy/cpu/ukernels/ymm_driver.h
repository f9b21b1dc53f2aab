/* The loops around a 256-bit micro-kernel: tiles, groups, rows. The including file defines
 *
 *   KERNEL                        storage class and target attribute of an inlined function
 *   PLANE_ROWS                    planes of rows that the registers hold
 *   micro_kernel(task, view, header, row, rows, planes, source, codes)    rows * planes is at most PLANE_ROWS
 */
KERNEL void some_rows(const gemm_task *task, const group_view *view, const group_header *header, int row, int rows,
                      int planes, int source, int codes)
{
    const int most = PLANE_ROWS / planes;
    switch (rows) {
    case 1:
        if (source != UNPACK) /* a task of one row has a driver of its own */
            micro_kernel(task, view, header, row, 1, planes, source, codes);
        break;
    case 2: micro_kernel(task, view, header, row, 2, planes, source, codes); break;
    case 3:
        if (most >= 3)
            micro_kernel(task, view, header, row, 3, planes, source, codes);
        break;
    case 4:
        if (most >= 4)
            micro_kernel(task, view, header, row, 4, planes, source, codes);
        break;
    case 5:
        if (most >= 5)
            micro_kernel(task, view, header, row, 5, planes, source, codes);
        break;
    case 6:
        if (most >= 6)
            micro_kernel(task, view, header, row, 6, planes, source, codes);
        break;
    }
}

/* All rows of a task with more than one. */
KERNEL void rows_of_group(const gemm_task *task, const group_view *view, const group_header *header, int planes,
                          int codes)
{
    const int most = PLANE_ROWS / planes;
    if (task->m <= most) {
        some_rows(task, view, header, 0, task->m, planes, UNPACK, codes);
        return;
    }
    micro_kernel(task, view, header, 0, most, planes, UNPACK_AND_KEEP, codes);
    for (int row = most; row < task->m; row += most)
        some_rows(task, view, header, row, task->m - row < most ? task->m - row : most, planes, UNPACKED, codes);
}

/* `known` is a constant: what is known of the task's scale record, or MANY_ROWS. */
KERNEL void gemm_records(const gemm_task *task, int planes, int codes, int known)
{
    const int num_tiles = task->header[1] ? 2 : 1;
    const int scales = known == PLAIN ? SCALES_F16 : known < 0 ? task->scales : known;
    const ptrdiff_t bytes = task_bytes(task, codes);
    const header_layout layout = layout_of_header(scales, codes, task->group_blocks * LANE_K);
    memset(task->scratch->sums, 0, (size_t)task->m * PAIR_N * sizeof(float));
    for (int t = 0; t < num_tiles; t++) {
        const uint8_t *body = task->body[t], *next = t + 1 < num_tiles ? task->body[t + 1] : task->next[0];
        group_view view = {
            .unpacked = task->scratch->weights,
            .a = task->a,
            .meta = task->meta,
            .sums = task->scratch->sums + t * TILE_N,
        };
        for (int g = 0; g < task->num_groups; g++) {
            const group_record record = record_of(task->header[t], &layout, g);
            const group_header header = load_header(record, task->scales, codes, known);
            view.blocks = g < task->num_groups - 1 ? task->group_blocks : task->last_group_blocks;
            const ptrdiff_t ahead = body - task->body[t] + PREFETCH_FAR;
            view.ahead = ahead < bytes ? task->body[t] + ahead : next + (ahead - bytes);
            view.packed = body;
            if (known == MANY_ROWS)
                rows_of_group(task, &view, &header, planes, codes);
            else
                micro_kernel(task, &view, &header, 0, 1, planes, UNPACK, codes);
            finish_group(task, &view, record, known);
            body += view.blocks * block_bytes(codes);
            view.a += task->a_group_stride;
            view.meta += task->meta_group_stride;
        }
    }
    finish(task, num_tiles * TILE_N);
}

KERNEL void gemm(const gemm_task *task, int planes, int codes)
{
    if (task->m > 1)
        gemm_records(task, planes, codes, MANY_ROWS);
    else if (task->scales == SCALES_F16 || task->scales == SCALES_BF16)
        gemm_records(task, planes, codes, PLAIN);
    else
        WITH_KNOWN_RECORD(gemm_records, task, planes, codes);
}
