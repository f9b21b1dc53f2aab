#define CHOSEN_SPACE __local
#define ROUTE_ITEMS (32 * WAVES)
#define TENSOR_ATTENTION (TENSOR && CACHE_TYPE && HEAD_DIM % 64 == 0)
#define VALUE_DIM HEAD_DIM
#include "activation.cl"
#include "decoder.cl"
#include "codes.cl"
#include "route_token.cl"
#include "decoder_step_shape.cl"
#include "decoder_step_memory.cl"
#include "decoder_step_product.cl"
#include "decoder_step_rows.cl"
#include "decoder_step_attend.cl"
#include "decoder_step_route.cl"
#include "decoder_step_dense.cl"
#include "decoder_step_heads.cl"
#if SHARED
#include "decoder_step_shared.cl"
#endif
#include "decoder_step_experts.cl"
#if HAS_HEAD
#include "decoder_step_head.cl"
#endif

// decoder_step: a step of few tokens through all layers in one launch, in phases:
//
//   0  norm of x, query, key and value projections                                             to `heads`
//   1  norms of heads, RoPE, append to the cache, attention to a run of positions              to `attended` or `partial`
//   2  join the runs                            (left out if every row has one run)            to `attended`
//   3  output projection                                                                       added to x
//   4  norm of x, router                                                                       to `logits`
//   5  experts of each token, gate and up projections, activation                              to `inner`
//   6  down projections, weighted sum                                                          added to x
//
// and after the last layer the head: 7 norm of x, logits, and each work-group's best; 8 the best of all.
//
// With RESIDENT all work-groups of the launch are resident, and wait for each other after each phase. Without it every
// phase is a launch. The idea of running a whole model in one persistent kernel is that of Hazy Research, "Look Ma, No
// Bubbles! Designing a Low-Latency Megakernel for Llama-1B", 2025.
//
// Build options
//   TENSOR                        1: products by tensor cores (mma.cl)
//   RESIDENT                   see above
//   TOKENS                     rows of a step, at most: 1 to 8
//   WAVES                 waves of 32 work-items in a work-group
//   LAYERS, HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, INNER, EXPERTS, TOP_K, VOCABULARY
//   SHARED                     1: layers have shared experts, or are dense: decoder_step_shared.cl
//   HAS_HEAD                   1: the head is part of the launch; it is not quantised
//   GATED                      1: each query has a gate behind it
//   SINKS, CAPPED              1: a layer has sinks, or a soft cap
//   EXPERT_BIASES              1: experts have biases
//   DENSE                      1: projections of attention have weights of PROJECTION_TYPE, and are not quantised
//   PAIRS_ROTATED, INTERLEAVED of RoPE; 0 pairs: none
//   HEADS             heads that a work-group attends with, a divisor of NUM_HEADS / NUM_KV_HEADS
//   QKV_TEAM, GATE_TEAM        waves that share a strip: divisors of WAVES
//   QKV_SHIFT, O_SHIFT, GATE_SHIFT, DOWN_SHIFT     group_shift of the weights
//   GATE_WORDS, DOWN_WORDS     expert_words
//   EXPERTS_PER_PART           experts in a buffer
//   EMBEDDING_TYPE, ROUTER_TYPE, HEAD_TYPE, PROJECTION_TYPE      element types, as INPUT_TYPE
//   NORMALISE, TOPK_GROUPS, NUM_GROUPS, and the options of routing.cl, codes.cl and decoder.cl
//   LAYER_BYTES                of a layer's entry, as the host sees it

#define PHASES 7
#if SHARED
#define IS_DENSE(layer) (layer)->is_dense
#else
#define IS_DENSE(layer) 0
#endif

#if RESIDENT
// Waits for all work-groups; false if they do not come, or have given up. state: work-groups that have arrived since the
// device was opened; 1 once a work-group has given up.
__attribute__((always_inline)) static inline bool all_arrive(__global uint *state, uint target, uint patience,
                                                             __local uint *failed)
{
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    if (get_local_id(0) == 0) {
        uint waits = 0, given_up = 0;
        add_release(state);
        while ((int)(load_acquire(state) - target) < 0 && !given_up) {
            waits++;
            if (waits >= patience || (waits % 256 == 0 && load_acquire(state + 1)))
                given_up = 1;
        }
        if (given_up)
            atomic_max(state + 1, 1u);
        *failed = given_up;
    }
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    return !*failed;
}
#endif

// Arguments
//   batch               the step (decoder.cl); when tokens have been chosen, the step that follows
//   layers              Layer [LAYERS]
//   embedding           its address
//   x, heads, logits, inner              float [TOKENS][HIDDEN], [TOKENS][QKV], [TOKENS][EXPERTS], [TOKENS * TOP_K][INNER]
//   attended            half [TOKENS][ATTENDED]
//   partial, stats      float [TOKENS][NUM_HEADS][splits][HEAD_DIM], float2 [TOKENS][NUM_HEADS][splits]
//   ids, weights, inner_most             int, float and uint [TOKENS][TOP_K]; with SHARED inner, weights and inner_most
//                       have more: see decoder_step_shared.cl
//   final_norm, head    their addresses (HAS_HEAD)
//   vocabulary, best    of decoder_step_head.cl
//   rows                of this step
//   splits              runs into which the positions of each row are cut
//   first, last         phases: first to last - 1
//   state               of all_arrive, then two `found` of choose_tokens, of even and of odd steps
//   number              of the step
//   target, patience    of all_arrive: the first target; loads of the counter until a work-group gives up
__attribute__((reqd_work_group_size(ITEMS, 1, 1))) __kernel void decoder_step(
    __global int *batch, __constant Layer *layers, const ulong embedding, __global float *x, __global float *heads,
    __global half *attended, __global float *partial, __global float2 *stats, __global float *logits, __global int *ids,
    __global float *weights, __global float *inner, __global uint *inner_most, const ulong final_norm, const ulong head,
    __global float *vocabulary, __global uint2 *best, const uint rows, const uint splits, const uint first,
    const uint last, __global uint *state, const uint number, const uint target, const uint patience)
{
    __local float4 memory[(LOCAL_FLOATS + 3) / 4];
    __local int chosen[TOKENS * TOP_K];
    __local float weighed[TOKENS * TOP_K];
    __local uint failed;
    __local float *scratch = (__local float *)memory;
    __local uint4 *kept = (__local uint4 *)(scratch + (SCRATCH + 3) / 4 * 4);
    uint arrived = target;
    for (uint phase = first; phase < last; phase++) {
        const uint depth = min(phase / PHASES, LAYERS - 1u), kind = phase - depth * PHASES;
        __constant Layer *layer = layers + depth;
        if (kind == 0)
            project_heads(layer, depth == 0, rows, batch, embedding, x, heads, scratch, kept);
        else if (kind == 1)
            attend_step(layer, rows, splits, batch, heads, attended, partial, stats, scratch);
        else if (kind == 2) {
            if (splits == 1)
                continue;
            join_splits(layer, rows, splits, heads, attended, partial, stats, scratch);
        } else if (kind == 3)
            project_output(layer, rows, x, attended, scratch, kept);
        else if (kind == 4)
            score_experts(layer, rows, batch, x, logits, inner_most, weights, scratch, kept);
        else if (kind == 5) {
            if (!IS_DENSE(layer))
                project_inner(layer, rows, phase > first, batch, x, logits, ids, weights, inner, inner_most, scratch,
                              kept, chosen, weighed);
#if SHARED
            if (layer->shared_inner)
                project_shared_inner(layer, rows, phase > first || !layer->is_dense, batch, x, inner, inner_most,
                                     scratch, kept);
#endif
        } else if (kind == 6) {
            if (!IS_DENSE(layer))
                project_down(layer, depth + 1 == LAYERS, rows, phase > first, x, ids, weights, inner, inner_most,
                             scratch, chosen, weighed);
#if SHARED
            if (layer->shared_inner)
                project_shared_down(layer, rows, x, weights, inner, inner_most, scratch);
#endif
        }
#if HAS_HEAD
        else if (kind == PHASES)
            score_vocabulary(layers, rows, batch, x, final_norm, head, vocabulary, best, scratch,
                             (__local float *)kept);
        else
            choose_tokens(rows, best, state + 2 + number % 2 * FOUND, number, batch, scratch);
#endif
#if RESIDENT
        if (phase + 1 < last) {
            if (!all_arrive(state, arrived, patience, &failed))
                return;
            arrived += get_num_groups(0);
        }
#endif
    }
}
