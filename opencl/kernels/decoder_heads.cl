#include "decoder.cl"

// place_heads: normalises and rotates the heads of queries and keys, and appends keys and values to the cache.
//
// There is a work-group for each (row, head): first the heads of queries, then those of keys, then those of values.
//
//   query   = rope(rms_norm(q, q_norm))                              to `out`
//   key     = rope of the values from k_rope_begin on; the first k_norm_values are normalised before
//   a, b    = x[i], x[i + pairs], or x[2 i], x[2 i + 1] if interleaved
//   a, b    = a * cos - b * sin, b * cos + a * sin
//
// Build options
//   HEAD_ITEMS   work-items of a work-group: a power of two
//
// Arguments. Offsets and strides are in elements, and pages are drawn in decoder.cl
//   q, q_offset, q_row_stride, q_head_stride, q_width                where queries are; likewise `out`, which may be q
//   q_norm, k_norm   float [q_width], [k_norm_values], or NULL
//   kv               float rows: keys from k_offset on, values from v_offset on, of one head after the other
//   v_width          0: values are part of the keys
//   cos, sin         float [positions][pairs]
//   CACHE_ARGS       CACHE [pages][kv_heads][k_width or v_width / 8][16][8]

#ifndef HEAD_ITEMS
#define HEAD_ITEMS 64
#endif
#define MAX_HEAD_DIM 640

__attribute__((reqd_work_group_size(HEAD_ITEMS, 1, 1))) __kernel void place_heads(
    __global const int *restrict batch, __global float *q, const uint q_offset, const uint q_row_stride,
    const uint q_head_stride, const uint q_width, __global float *out, const uint out_offset, const uint out_row_stride,
    const uint out_head_stride, __global const float *restrict q_norm, __global float *kv, const uint k_offset,
    const uint v_offset, const uint kv_row_stride, const uint k_width, const uint v_width,
    __global const float *restrict k_norm, const uint k_norm_values, const uint k_rope_begin, const float eps,
    __global const float *restrict cosine, __global const float *restrict sine, const uint pairs, const int interleaved,
    const uint num_heads, const uint num_kv_heads, CACHE_ARGS(CACHE))
{
    __local float head[MAX_HEAD_DIM];
    __local float sums[HEAD_ITEMS];
    const uint item = get_local_id(0), number = get_group_id(1);
    const ulong row = get_group_id(0);
    const int4 record = STEP_ROW(batch, row);
    const uint kind = number < num_heads ? 0 : number < num_heads + num_kv_heads ? 1 : 2;
    const uint kv_head = (number - num_heads) % num_kv_heads;
    const uint width = kind == 0 ? q_width : kind == 1 ? k_width : v_width;
    __global float *from = kind == 0 ? q + q_offset + row * q_row_stride + number * q_head_stride
                                     : kv + row * kv_row_stride + (kind == 1 ? k_offset : v_offset) + kv_head * width;
    for (uint i = item; i < width; i += HEAD_ITEMS)
        head[i] = from[i];
    barrier(CLK_LOCAL_MEM_FENCE);
    cosine += (ulong)record.y * pairs;
    sine += (ulong)record.y * pairs;
    // All work-items reach all barriers, whatever the kind of head: PoCL needs that.
    __global const float *norm = kind == 0 ? q_norm : kind == 1 ? k_norm : 0;
    const uint normed = norm ? (kind == 0 ? q_width : k_norm_values) : 0;
    float sum = 0;
    for (uint i = item; i < normed; i += HEAD_ITEMS)
        sum = fma(head[i], head[i], sum);
    const float factor = 1 / sqrt(group_sum(sum, sums) / max(normed, 1u) + eps);
    for (uint i = item; i < normed; i += HEAD_ITEMS)
        head[i] *= factor * norm[i];
    barrier(CLK_LOCAL_MEM_FENCE);
    const uint rotated = kind < 2 ? pairs : 0, begin = kind == 1 ? k_rope_begin : 0;
    for (uint i = item; i < rotated; i += HEAD_ITEMS) {
        const uint first = begin + (interleaved ? 2 * i : i), second = interleaved ? first + 1 : first + pairs;
        const float a = head[first], b = head[second];
        head[first] = fma(a, cosine[i], -(b * sine[i]));
        head[second] = fma(b, cosine[i], a * sine[i]);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    if (kind == 0) {
        __global float *to = out + out_offset + row * out_row_stride + number * out_head_stride;
        for (uint i = item; i < width; i += HEAD_ITEMS)
            to[i] = head[i];
    } else if (record.w >= 0) {
        const ulong page = (uint)batch[record.z + record.y / PAGE_TOKENS];
        const ulong base =
            ((ulong)IN_SEGMENT(page) * num_kv_heads + kv_head) * width * PAGE_TOKENS + record.y % PAGE_TOKENS * CHUNK;
        __global CACHE *to = kind == 1 ? KEYS_OF(page) : VALUES_OF(page);
        for (uint i = item; i < width; i += HEAD_ITEMS)
            store_cache(head[i], to, base + i / CHUNK * CHUNK_STRIDE + i % CHUNK);
    }
}
