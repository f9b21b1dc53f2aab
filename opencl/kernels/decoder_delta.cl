#include "decoder.cl"

// Gated DeltaNet, token by token. Source: Qwen3-Next; marlin_cy/decoder/plan.py has the formulas.
//
// A layer keeps two states for each slot: the last conv_width - 1 inputs of the convolution, and for each value head a
// matrix [key_dim][value_dim].
//
// Build options
//   KEY_DIM, VALUE_DIM      of `delta_rule`
//   STATE_COLUMNS           columns of a value head's state in a work-group of `delta_rule`
//   KEY_PARTS               runs of a column, one for each of as many work-items: divides KEY_DIM
//   HEAD_ITEMS              work-items of `gated_norm_heads`: a power of two

#ifndef KEY_DIM
#define KEY_DIM 128
#define VALUE_DIM 128
#define STATE_COLUMNS 32
#define KEY_PARTS 4
#endif
#ifndef HEAD_ITEMS
#define HEAD_ITEMS 64
#endif
#define STATE_ITEMS (STATE_COLUMNS * KEY_PARTS)
#define PART_KEYS (KEY_DIM / KEY_PARTS)
#define L2_EPS 1e-6f
#define LENGTH_LANES 16 // partial sums of the squares of a query, and of a key

// output[row][c] = silu(sum over j of weight[c][j] * input[row - (width - 1) + j][c]); rows before the segment's first
// come from the state. A work-item for each (channel, row).
//   input, output   float [rows][input_stride], [rows][channels]
//   weight          float [channels][conv_width]
//   states          float [slots][conv_width - 1][channels], the oldest first
__kernel void short_conv(__global const int *restrict batch, const uint segments, __global const float *restrict input,
                         const uint input_stride, __global const float *restrict weight,
                         __global const float *restrict states, __global float *restrict output, const uint channels,
                         const uint conv_width)
{
    const uint c = get_global_id(0);
    const ulong row = get_global_id(1);
    const int number = STEP_ROW(batch, row).w;
    if (c >= channels || number < 0)
        return;
    const int4 segment = vload4(number, batch + segments);
    float sum = 0;
    for (uint j = 0; j < conv_width; j++) {
        const int from = (int)(row + j) - (int)(conv_width - 1), before = from - segment.x;
        const float value =
            before >= 0 ? input[(ulong)from * input_stride + c]
                        : states[((ulong)segment.z * (conv_width - 1) + (conv_width - 1 + before)) * channels + c];
        sum = fma(weight[(ulong)c * conv_width + j], value, sum);
    }
    output[row * channels + c] = sum / (1 + exp(-sum));
}

// The sum of KEY_PARTS work-items that share a column, for each of them. Parts of a column are STATE_COLUMNS apart.
__attribute__((always_inline)) static inline float column_sum(float value, __local float *sums)
{
    const uint item = get_local_id(0);
    sums[item] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    float sum = 0;
    for (uint part = 0; part < KEY_PARTS; part++)
        sum += sums[item % STATE_COLUMNS + part * STATE_COLUMNS];
    barrier(CLK_LOCAL_MEM_FENCE);
    return sum;
}

// Runs all tokens of a segment, and updates both states. Groups: columns, value heads, segments.
//   mixed          float [rows][2 * num_k_heads * KEY_DIM + num_v_heads * VALUE_DIM]: queries, keys, values
//   raw            the input of the convolution, float [rows][raw_stride]
//   gates          float [rows][2 * num_v_heads]: b, then a
//   output         float [rows][num_v_heads * VALUE_DIM]
//   states         float [slots][num_v_heads][KEY_DIM][VALUE_DIM]
__attribute__((reqd_work_group_size(STATE_ITEMS, 1, 1))) __kernel void delta_rule(
    __global const int *restrict batch, const uint segments, __global const float *restrict mixed,
    __global const float *restrict raw, const uint raw_stride, __global const float *restrict gates,
    __global const float *restrict a_log, __global const float *restrict dt_bias, __global float *restrict output,
    __global float *restrict states, __global float *restrict conv_states, const uint num_k_heads,
    const uint num_v_heads, const uint conv_width)
{
    __local float query[KEY_DIM], key[KEY_DIM];
    __local float sums[STATE_ITEMS];
    __local float squares[2 * LENGTH_LANES];
    const uint item = get_local_id(0), head = get_group_id(1), part = item / STATE_COLUMNS;
    const uint column = get_group_id(0) * STATE_COLUMNS + item % STATE_COLUMNS;
    const uint k_head = head / (num_v_heads / num_k_heads),
               channels = 2 * num_k_heads * KEY_DIM + num_v_heads * VALUE_DIM;
    const int4 segment = vload4(get_group_id(2), batch + segments);
    __global float *state = states + ((ulong)segment.z * num_v_heads + head) * KEY_DIM * VALUE_DIM;
    const float rate = -exp(a_log[head]);

    float memory[PART_KEYS];
    for (uint i = 0; i < PART_KEYS; i++)
        memory[i] = column < VALUE_DIM ? state[(part * PART_KEYS + i) * VALUE_DIM + column] : 0;
    for (int t = 0; t < segment.y; t++) {
        const ulong row = segment.x + t;
        __global const float *from = mixed + row * channels;
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint i = item; i < KEY_DIM; i += STATE_ITEMS) {
            query[i] = from[k_head * KEY_DIM + i];
            key[i] = from[(num_k_heads + k_head) * KEY_DIM + i];
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint place = item; place < 2 * LENGTH_LANES; place += STATE_ITEMS) {
            __local const float *from_head = place < LENGTH_LANES ? query : key;
            float sum = 0;
            for (uint i = place % LENGTH_LANES; i < KEY_DIM; i += LENGTH_LANES)
                sum = fma(from_head[i], from_head[i], sum);
            squares[place] = sum;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        float query_square = L2_EPS, key_square = L2_EPS;
        for (uint lane = 0; lane < LENGTH_LANES; lane++) {
            query_square += squares[lane];
            key_square += squares[LENGTH_LANES + lane];
        }
        const float query_factor = 1 / sqrt(query_square * KEY_DIM), key_factor = 1 / sqrt(key_square);
        const float b = gates[row * 2 * num_v_heads + head];
        const float a = gates[(row * 2 + 1) * num_v_heads + head] + dt_bias[head];
        const float softplus = fmax(a, 0.0f) + log1p(exp(-fabs(a)));
        const float decay = exp(rate * softplus), beta = 1 / (1 + exp(-b));
        float found = 0, result = 0;
        for (uint i = 0; i < PART_KEYS; i++) {
            memory[i] *= decay;
            found = fma(key[part * PART_KEYS + i] * key_factor, memory[i], found);
        }
        found = column_sum(found, sums);
        const float value = column < VALUE_DIM ? from[2 * num_k_heads * KEY_DIM + head * VALUE_DIM + column] : 0;
        const float change = (value - found) * beta;
        for (uint i = 0; i < PART_KEYS; i++) {
            memory[i] = fma(key[part * PART_KEYS + i] * key_factor, change, memory[i]);
            result = fma(query[part * PART_KEYS + i] * query_factor, memory[i], result);
        }
        result = column_sum(result, sums);
        if (part == 0 && column < VALUE_DIM)
            output[(row * num_v_heads + head) * VALUE_DIM + column] = result;
    }
    for (uint i = 0; i < PART_KEYS; i++)
        if (column < VALUE_DIM)
            state[(part * PART_KEYS + i) * VALUE_DIM + column] = memory[i];

    // The convolution's state: each work-group has a share of the channels.
    const uint share = head * get_num_groups(0) + get_group_id(0), shares = num_v_heads * get_num_groups(0);
    __global float *conv = conv_states + (ulong)segment.z * (conv_width - 1) * channels;
    for (uint c = share * STATE_ITEMS + item; c < channels; c += shares * STATE_ITEMS)
        for (int j = 0; j < (int)conv_width - 1; j++) { // the oldest first: what is read lies behind what is written
            const int from = segment.y + j - ((int)conv_width - 1);
            conv[(ulong)j * channels + c] = from >= 0 ? raw[(ulong)(segment.x + from) * raw_stride + c]
                                                      : conv[(ulong)(j + segment.y) * channels + c];
        }
}

// output = rms_norm(y, weight) * silu(gate), for each head of each row. Groups: rows, heads.
//   y, gate   float [rows][heads * width], [rows][gate_stride] from gate_offset on
__attribute__((reqd_work_group_size(HEAD_ITEMS, 1, 1))) __kernel void gated_norm_heads(
    __global const float *restrict y, __global const float *restrict gate, const uint gate_offset,
    const uint gate_stride, __global const float *restrict weight, __global OUTPUT *restrict output, const uint heads,
    const uint width, const float eps)
{
    __local float sums[HEAD_ITEMS];
    const ulong row = get_group_id(0);
    const uint head = get_group_id(1);
    y += (row * heads + head) * width;
    gate += gate_offset + row * gate_stride + head * width;
    float sum = 0;
    for (uint i = get_local_id(0); i < width; i += HEAD_ITEMS)
        sum = fma(y[i], y[i], sum);
    const float factor = 1 / sqrt(group_sum(sum, sums) / width + eps);
    for (uint i = get_local_id(0); i < width; i += HEAD_ITEMS)
        store_output(y[i] * factor * weight[i] * (gate[i] / (1 + exp(-gate[i]))), output,
                     (row * heads + head) * width + i);
}
