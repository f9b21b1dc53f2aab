#include "activation.cl"

// prepare_rows: converts rows of activations to one element type, in the order of packed K, with padding.
//
//   output[i][j] = x[order[j]] * 2^-e,  row_factor[i] = 2^e
//
// x is the source of prepared row i. Elements with an order of -1, or beyond the source's end, are 0. There is a
// work-group for each prepared row; its local size is a multiple of 16, at most MAX_LOCAL.
//
// Build options
//   INPUT_TYPE      of common.cl
//   PREPARED_TYPE   one of PREPARED_*, below
//   ACTIVATION      of activation.cl. With an activation, an input row is gate (k_in), then up (k_in), and x[j] is
//                   computed from gate[j] and up[j] in float32
//   GATHER          one of GATHER_*, below
//   GROUP_SHIFT     of packed K; with PREPARED_PLANES only
//
// Arguments
//   input, input_offset    INPUT rows of k_in elements (2 * k_in with ACTIVATION); the offset in elements
//   output, row_factor     [rows][k_out] (planes: [rows][row bytes]), [rows]
//   k_in, k_out            elements of a row; k_out >= k_in with GATHER_NO_ORDER
//   order                  NULL with GATHER_NO_ORDER
//   num_experts, WORK_ARGS of common.cl      GATHER_BY_SLOT only
//   map                    int2 [rows]       GATHER_MAPPED only
//
// Integer planes: each group of 2^GROUP_SHIFT elements is quantised to 16 bits by a scale of its own,
// scale = max |x| / 32639, value = rint(x / scale) = 256 * high + low, where high and low are signed bytes. The layout
// of a prepared row, in bytes:
//
//   [k_out / 8] of 16        for 8 elements: high of 0 2 1 3, high of 4 6 5 7, low of 0 2 1 3, low of 4 6 5 7. The
//                            order is that of (word & 0x0f0f0f0f) in the packed weight
//   [groups] of 8            scale (float), sum of the group's values (int); groups = ceil(k_out / 2^GROUP_SHIFT)
//
// With groups of 16, 16 bytes hold rows 4 t to 4 t + 3 and 16 + 4 t to 19 + 4 t of 32, as a lane of packed weights does.
//
// It is padded to a multiple of 16: 2 * k_out + 16 * ceil(groups / 2) bytes. A group with a NaN or an infinity has a
// scale of NaN and values of 0.

// Element types of prepared rows:
// - float32: e is 0 and row_factor is not used;
// - float16: 2^e brings the row's largest magnitude into [2^13, 2^14). For a row of zeros, and for a row with a NaN or
//   an infinity, e is 0, and NaN and infinity stay;
// - integer planes.
#define PREPARED_FLOAT32 0
#define PREPARED_FLOAT16 1
#define PREPARED_PLANES 2

// Sources of prepared row i and its order of K:
// GATHER_NO_ORDER    row i, in K's own order
// GATHER_ONE_ORDER   row i, by an order that is the same for all experts: order int32 [k_out]
// GATHER_BY_SLOT     row id / top_k for slot i of the routing arrays (ROUTED=1), by the order of the slot's expert:
//                    order int32 [num_experts][k_out]. Slots that are not in use are not written
// GATHER_MAPPED      row map[i].x, by the order of expert map[i].y: order int32 [num_experts][k_out]
#define GATHER_NO_ORDER 0
#define GATHER_ONE_ORDER 1
#define GATHER_BY_SLOT 2
#define GATHER_MAPPED 3

#ifndef PREPARED_TYPE
#define PREPARED_TYPE PREPARED_FLOAT32
#endif
#ifndef GATHER
#define GATHER GATHER_NO_ORDER
#endif
#if GATHER == GATHER_BY_SLOT && !ROUTED
#error "GATHER_BY_SLOT needs ROUTED=1"
#endif

#if GATHER == GATHER_BY_SLOT
#define GATHER_ARGS , const uint num_experts, WORK_ARGS
#elif GATHER == GATHER_MAPPED
#define GATHER_ARGS , __global const int2 *restrict map
#else
#define GATHER_ARGS
#endif
#if PREPARED_TYPE == PREPARED_PLANES
#define PREPARED uint
#else
#define PREPARED JOIN(TYPE_, PREPARED_TYPE)
#endif
#define MAX_LOCAL 256
#define PREPARE_ARGS                                                                                    \
    __global const INPUT *restrict input, const ulong input_offset, __global PREPARED *restrict output, \
        __global float *restrict row_factor, const uint k_in, const uint k_out, __global const int *restrict order

// Element j of a source row x, in K's own order.
static inline float row_value(__global const INPUT *row, uint j, uint k_in)
{
#if ACTIVATION
    return activated(load_input(row, j), load_input(row, (ulong)(ROW_PARTS - 1) * k_in + j));
#else
    return load_input(row, j);
#endif
}

static inline float prepared_value(__global const INPUT *row, uint j, uint k_in, __global const int *order)
{
#if GATHER
    const int from = order[j];
#else
    const int from = j;
#endif
    return (uint)from < k_in ? row_value(row, from, k_in) : 0;
}

// Elements 8 * octet to 8 * octet + 7.
static inline float8 prepared_values(__global const INPUT *row, uint octet, uint k_in, __global const int *order)
{
    const uint j = 8 * octet;
#if GATHER
    return (float8)(prepared_value(row, j, k_in, order), prepared_value(row, j + 1, k_in, order),
                    prepared_value(row, j + 2, k_in, order), prepared_value(row, j + 3, k_in, order),
                    prepared_value(row, j + 4, k_in, order), prepared_value(row, j + 5, k_in, order),
                    prepared_value(row, j + 6, k_in, order), prepared_value(row, j + 7, k_in, order));
#else
    if (j >= k_in) // a multiple of 32, as k_out is
        return (float8)(0);
#if ACTIVATION
    return activated8(load8_input(row, j), load8_input(row, (ulong)(ROW_PARTS - 1) * k_in + j));
#else
    return load8_input(row, j);
#endif
#endif
}

#if PREPARED_TYPE == PREPARED_PLANES
#define QMAX 32639.0f // 256 * 127 + 127, the largest value of two signed bytes
#define MIN_AMAX 0x1p-100f // for smaller magnitudes amax / QMAX or QMAX / amax may not be a normal number
#define GROUP_OCTETS (1 << (GROUP_SHIFT - 3))

static inline uint plane_word(int v0, int v1, int v2, int v3)
{
    return (v0 & 255) | (v2 & 255) << 8 | (v1 & 255) << 16 | (uint)(v3 & 255) << 24;
}
#endif

// Prepares row i from row `from` of the input, by one order; called by a whole work-group. It is always inlined for
// PoCL: see align.cl.
//   largest, value_sums   local uint and int [local size]
__attribute__((always_inline)) static inline void prepare_row(uint i, ulong from, __global const INPUT *input,
                                                              __global PREPARED *output, __global float *row_factor,
                                                              uint k_in, uint k_out, __global const int *order,
                                                              __local uint *largest, __local int *value_sums)
{
    const uint item = get_local_id(0), items = get_local_size(0);
    __global const INPUT *row = input + from * k_in * ROW_PARTS;
#if PREPARED_TYPE == PREPARED_PLANES
    // A work-item takes 8 elements in each turn. The work-items of a group share their maxima and sums.
    const uint octets = k_out / 8, groups = (k_out + (1 << GROUP_SHIFT) - 1) >> GROUP_SHIFT;
    const uint row_words = k_out / 2 + (groups + 1) / 2 * 4;
    __global uint *to = output + (ulong)i * row_words;
    for (uint turn = 0; turn < octets; turn += items) {
        const uint octet = turn + item, leader = item / GROUP_OCTETS * GROUP_OCTETS;
        float x[8];
        uint most = 0; // magnitudes as bits, among which infinities and NaNs are the largest
        for (uint j = 0; j < 8; j++) {
            x[j] = octet < octets ? prepared_value(row, 8 * octet + j, k_in, order) : 0;
            most = max(most, as_uint(x[j]) & 0x7fffffffu);
        }
        largest[item] = most;
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint other = leader; other < leader + GROUP_OCTETS; other++)
            most = max(most, largest[other]);
        const bool finite = most < 0x7f800000u, usable = finite && as_float(most) >= MIN_AMAX;
        const float inverse = usable ? QMAX / as_float(most) : 0;
        int high[8], low[8], sum = 0;
        for (uint j = 0; j < 8; j++) {
            const int value = usable ? clamp((int)rint(x[j] * inverse), -(int)QMAX, (int)QMAX) : 0;
            sum += value;
            high[j] = (value + 128) >> 8;
            low[j] = value - 256 * high[j];
        }
#if GROUP_SHIFT == 4
        // With groups of 16, quad t of 32 rows holds rows 4 t on of both groups (common.cl): here t is 2 (octet % 2) and
        // one more.
        if (octet < octets)
            for (uint j = 0; j < 2; j++) {
                const uint first = 4 * (octet / 4 * 4 + octet % 2 * 2 + j) + octet % 4 / 2;
                to[first] = plane_word(high[4 * j], high[4 * j + 1], high[4 * j + 2], high[4 * j + 3]);
                to[first + 2] = plane_word(low[4 * j], low[4 * j + 1], low[4 * j + 2], low[4 * j + 3]);
            }
#else
        if (octet < octets)
            vstore4((uint4)(plane_word(high[0], high[1], high[2], high[3]),
                            plane_word(high[4], high[5], high[6], high[7]), plane_word(low[0], low[1], low[2], low[3]),
                            plane_word(low[4], low[5], low[6], low[7])),
                    octet, to);
#endif
        value_sums[item] = sum;
        barrier(CLK_LOCAL_MEM_FENCE);
        if (item == leader && octet < octets) {
            for (uint other = leader + 1; other < leader + GROUP_OCTETS; other++)
                sum += value_sums[other];
            const float scale = usable ? as_float(most) / QMAX : finite ? 0.0f : NAN;
            vstore2((uint2)(as_uint(scale), as_uint(sum)), octet / GROUP_OCTETS, to + k_out / 2);
        }
    }
#else
    // Work-items take 8 elements at a time. With float16 each element is computed twice: first for the row's factor.
    const ulong to = (ulong)i * k_out;
    const uint octets = k_out / 8;
#if PREPARED_TYPE == PREPARED_FLOAT16
    uint8 magnitudes = (uint8)(0); // as bits, among which infinities and NaNs are the largest
    for (uint octet = item; octet < octets; octet += items)
        magnitudes = max(magnitudes, as_uint8(prepared_values(row, octet, k_in, order)) & 0x7fffffffu);
    const uint4 four = max(magnitudes.lo, magnitudes.hi);
    largest[item] = max(max(four.x, four.y), max(four.z, four.w));
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint count = items; count > 1;) {
        const uint upper = (count + 1) / 2;
        if (item < count - upper)
            largest[item] = max(largest[item], largest[item + upper]);
        barrier(CLK_LOCAL_MEM_FENCE);
        count = upper;
    }
    const uint most = largest[0];
    int e = 0;
    if (most > 0 && most < 0x7f800000u)
        e = max(ilogb(as_float(most)) - 13, -126); // 2^e is a normal number
    if (item == 0)
        row_factor[i] = ldexp(1.0f, e);
    const float factor = ldexp(1.0f, -e);
    for (uint octet = item; octet < octets; octet += items)
        vstore_half8_rte(prepared_values(row, octet, k_in, order) * factor, octet, output + to);
#else
    for (uint octet = item; octet < octets; octet += items)
        vstore8(prepared_values(row, octet, k_in, order), octet, output + to);
#endif
#endif
}

__kernel void prepare_rows(PREPARE_ARGS GATHER_ARGS)
{
    __local uint largest[MAX_LOCAL];
    __local int value_sums[MAX_LOCAL];
    const uint i = get_group_id(0);
    long from = i;
    ulong order_offset = 0;
#if GATHER == GATHER_BY_SLOT
    // A work-group for each slot, whatever the size of blocks.
    from = -1;
    if (i < (uint)clamp(past[past_offset], 0, past_limit)) {
        const int expert = expert_ids[expert_offset + i / block_size];
        const int id = sorted_ids[sorted_offset + i];
        if ((uint)expert < num_experts && (uint)id < (uint)valid) {
            from = id / top_k;
            order_offset = (ulong)expert * k_out;
        }
    }
#elif GATHER == GATHER_MAPPED
    from = map[i].x;
    order_offset = (ulong)map[i].y * k_out;
#endif
    if (from >= 0) // the same for the whole work-group
        prepare_row(i, from, input + input_offset, output, row_factor, k_in, k_out, order + order_offset, largest,
                    value_sums);
}
