// reduce_splits: adds the sums that a gemm with SPLIT has stored for the runs of K, in ascending order of the runs.
//
//   output[row][c] = sum over s of partial[s][tile][r][c] (+ bias)
//
// A work-group takes one row of a row tile at a time. Any local size and any number of work-groups will do. ROWS, BIAS,
// ROUTED and the work's arguments must be those of the gemm.

__kernel void reduce_splits(const uint num_experts, const uint n, __global OUTPUT *restrict output,
                            const ulong output_offset, const uint output_stride, __global const float *restrict bias,
                            __global const float *restrict partial, const uint tiles_capacity, const int splits,
                            WORK_ARGS)
{
    const long rows = (long)num_row_tiles(WORK) * ROWS;
    for (long turn = get_group_id(0); turn < rows; turn += get_num_groups(0)) {
        const Tile tile = row_tile(turn / ROWS, num_experts, n, WORK);
        const int2 row = tile.expert < 0 ? (int2)(-1, -1) : row_of(tile, turn % ROWS, WORK);
        if (row.y < 0)
            continue;
        __global const float *from = partial + (ulong)turn * n;
        const ulong to = output_offset + (ulong)row.y * output_stride + tile.out_column;
        for (uint c = get_local_id(0); c < tile.columns; c += get_local_size(0)) {
            float sum = from[c];
            for (int s = 1; s < splits; s++)
                sum += from[(ulong)s * tiles_capacity * ROWS * n + c];
#if BIAS
            sum += BIAS_AT(tile, tile.out_column + c);
#endif
            store_output(sum, output, to + c);
        }
    }
}
