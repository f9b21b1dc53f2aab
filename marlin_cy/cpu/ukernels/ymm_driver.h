/* The loops around a 256-bit micro-kernel: tiles, groups, rows. The file that includes this defines
 *
 *   KERNEL                                       storage and target of an inlined function
 *   PACKED_PLANE_ROWS, UNPACKED_PLANE_ROWS       int8 rows that its registers hold, in either mode
 *   micro_kernel(task, view, header, row, rows, planes, packed, codes)    rows * planes of these at most
 *
 * Few rows multiply the weights as they unpack them; more rows than one micro-kernel holds share a
 * group that was unpacked once into the first-level cache.
 */
KERNEL void rows_of_group(const gemm_task *task, const group_view *view, const group_header *header, int planes,
                          int packed, int codes)
{
    const int step = (packed ? PACKED_PLANE_ROWS : UNPACKED_PLANE_ROWS) / planes;
    for (int row = 0; row < task->m; row += step) {
        const int rows = task->m - row < step ? task->m - row : step;
        switch (rows) {
        case 1: micro_kernel(task, view, header, row, 1, planes, packed, codes); break;
        case 2: micro_kernel(task, view, header, row, 2, planes, packed, codes); break;
        case 3: if (step >= 3) micro_kernel(task, view, header, row, 3, planes, packed, codes); break;
        case 4: if (step >= 4) micro_kernel(task, view, header, row, 4, planes, packed, codes); break;
        case 5: if (step >= 5) micro_kernel(task, view, header, row, 5, planes, packed, codes); break;
        case 6: if (step >= 6) micro_kernel(task, view, header, row, 6, planes, packed, codes); break;
        }
    }
}

KERNEL void gemm(const gemm_task *task, int planes, int codes)
{
    const int num_tiles = task->header[1] ? 2 : 1;
    const ptrdiff_t bytes = task_bytes(task);
    memset(task->scratch->sums, 0, (size_t)task->m * PAIR_N * sizeof(float));
    for (int t = 0; t < num_tiles; t++) {
        const uint8_t *body = task->body[t], *next = t + 1 < num_tiles ? task->body[t + 1] : task->next[0];
        group_view view = {.a = task->a, .meta = task->meta, .sums = task->scratch->sums + t * TILE_N};
        for (int g = 0; g < task->num_groups; g++) {
            const uint8_t *const place = task->header[t] + g * GROUP_HEADER_BYTES;
            const group_header header = load_header(place, task->scale_dtype, codes);
            view.blocks = g < task->num_groups - 1 ? task->group_blocks : task->last_group_blocks;
            const ptrdiff_t ahead = body - task->body[t] + PREFETCH_BYTES;
            view.ahead = ahead < bytes ? task->body[t] + ahead : next + (ahead - bytes);
            view.weights = body;
            if (task->m * planes <= PACKED_PLANE_ROWS) {
                rows_of_group(task, &view, &header, planes, 1, codes);
            } else {
                unpack_group(task->scratch->weights, &view, codes);
                view.weights = task->scratch->weights;
                rows_of_group(task, &view, &header, planes, 0, codes);
            }
            body += view.blocks * BLOCK_BYTES;
            view.a += task->a_group_stride;
            view.meta += task->meta_group_stride;
        }
    }
    finish(task, num_tiles * TILE_N);
}
