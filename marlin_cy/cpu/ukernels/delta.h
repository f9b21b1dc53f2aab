/* The gated delta rule, over the vectors of a vec_*.h. The including file defines KERNEL, TARGET and
 * DELTA_STEP, the columns that are done at once: a multiple of LANES.
 *
 * The columns of a state do not depend on each other. A step of columns goes through all tokens before the next step,
 * so that its part of the state, key_dim * DELTA_STEP floats, stays in the first-level cache. A token passes over the
 * state twice. The first pass does not store the decayed state: the second pass computes it again.
 */
#ifndef MARLIN_CY_DELTA_H
#define MARLIN_CY_DELTA_H

/* One token; `state`, `v` and `y` are those of the first column. `columns` is a constant. */
KERNEL void delta_token(const delta_task *task, int64_t token, int64_t column, int columns)
{
    enum { VECS = DELTA_STEP / VEC_N };
    const float *const q = task->q + token * task->q_stride, *const k = task->k + token * task->k_stride;
    const float *const v = task->v + token * task->v_stride + column;
    float *const y = task->y + token * task->y_stride + column, *state = task->state + column;
    const vec decay = vec_set(task->decay[token * task->gate_stride]);
    const vec beta = vec_set(task->beta[token * task->gate_stride]);
    vec sum[VECS], delta[VECS];
#pragma GCC unroll 8
    for (int c = 0; c < columns / VEC_N; c++)
        sum[c] = vec_set(0.0f);
    for (int64_t i = 0; i < task->key_dim; i++, state += task->state_stride) {
        const vec key = vec_set(k[i]);
#pragma GCC unroll 8
        for (int c = 0; c < columns / VEC_N; c++)
            sum[c] = vec_fma(key, vec_mul(vec_load(state + c * VEC_N), decay), sum[c]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < columns / VEC_N; c++) {
        delta[c] = vec_mul(vec_sub(vec_load(v + c * VEC_N), sum[c]), beta);
        sum[c] = vec_set(0.0f);
    }
    state = task->state + column;
    for (int64_t i = 0; i < task->key_dim; i++, state += task->state_stride) {
        const vec key = vec_set(k[i]), query = vec_set(q[i]);
#pragma GCC unroll 8
        for (int c = 0; c < columns / VEC_N; c++) {
            const vec decayed = vec_mul(vec_load(state + c * VEC_N), decay);
            const vec updated = vec_fma(key, delta[c], decayed);
            vec_store(state + c * VEC_N, updated);
            sum[c] = vec_fma(query, updated, sum[c]);
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < columns / VEC_N; c++)
        vec_store(y + c * VEC_N, sum[c]);
}

TARGET static void delta_rule(const delta_task *task)
{
    int64_t column = 0;
    for (; column + DELTA_STEP <= task->columns; column += DELTA_STEP)
        for (int64_t token = 0; token < task->tokens; token++)
            delta_token(task, token, column, DELTA_STEP);
    for (; column < task->columns; column += LANES)
        for (int64_t token = 0; token < task->tokens; token++)
            delta_token(task, token, column, LANES);
}

#define DELTA_KERNELS .delta_rule = delta_rule

#endif
