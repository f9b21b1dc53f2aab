"""Routing: the experts of each token, and their weights. ``marlin_cy/moe/routing.py`` has the formula."""

import numpy as np

from libc.math cimport INFINITY, NAN, exp, fabsf, fmaxf, isfinite, isnan, log1p, sqrt
from libc.stdint cimport int32_t, int64_t

from marlin_cy.cpu._arena cimport arena, carve, take_floats
from marlin_cy.cpu._buffers cimport element_bytes, float_matrix, matrix
from marlin_cy.cpu._team cimport member, run_team
from marlin_cy.cpu._workspace cimport Workspace

SCORING_KINDS = {
    "softmax": SOFTMAX,
    "softmax_topk": SOFTMAX_TOPK,
    "sigmoid": SIGMOID,
    "sqrt_softplus": SQRT_SOFTPLUS,
    "sparsemixer": SPARSEMIXER,
}


def route(Workspace workspace, router_logits, kind):
    """``(ids, weights)`` of each token, int32 and float32 ``[tokens, top_k]``, by a ``Routing``."""
    cdef matrix logits = float_matrix(router_logits, "router_logits", kind.num_experts, False)
    cdef routing r
    cdef routing_run run
    set_routing(&r, workspace, &logits, kind)
    ids, weights = np.empty((logits.rows, r.top_k), np.int32), np.empty((logits.rows, r.top_k), np.float32)
    cdef int32_t[:, ::1] ids_view = ids
    cdef float[:, ::1] weights_view = weights
    if logits.rows == 0:
        return ids, weights
    r.ids, r.weights = &ids_view[0, 0], &weights_view[0, 0]
    workspace.enter()
    try:
        carve(workspace, &workspace.scratch, carve_routing, &r)
        run.r, run.tokens = &r, logits.rows
        with nogil:
            # Waking the other threads costs more than routing one token.
            run_team(1 if logits.rows == 1 else r.num_threads, route_alone, &run)
    finally:
        workspace.leave()
    return ids, weights


cdef int set_routing(routing *r, Workspace workspace, const matrix *logits, kind) except -1:
    """Set the members from the settings, the logits and a ``Routing``, which owns the bias."""
    cdef const float[::1] bias = kind.correction_bias
    cdef const float[::1] scale = kind.expert_scale
    r.table, r.num_threads, r.logits, r.dtype = workspace.table, workspace.num_threads, logits.data, logits.dtype
    r.num_experts, r.top_k = logits.width, kind.top_k
    r.scoring, r.normalise, r.factor = SCORING_KINDS[kind.scoring], kind.norm_topk_prob, kind.routed_scaling_factor
    r.bias = r.scale = NULL
    r.jitter = kind.mixer_jitter
    if scale is not None:
        r.scale = &scale[0]
    if bias is not None:
        r.bias = &bias[0]
    r.num_groups, r.topk_groups, r.top2_group_score = kind.num_groups, kind.topk_groups, kind.group_score == "top2_sum"
    return 0


cdef void carve_routing(arena *memory, void *job) noexcept nogil:
    """The layout of a :class:`routing`'s scratch memory; ``ids`` and ``weights`` are the caller's."""
    cdef routing *r = <routing *>job
    r.buffers = take_floats(memory, buffer_floats(r) * r.num_threads)


cdef inline int64_t buffer_floats(const routing *r) noexcept nogil:
    """Floats that a thread needs: the scores, the selection scores, and the scores of groups."""
    return 3 * r.num_experts


cdef struct routing_run:
    const routing *r
    int64_t tokens


cdef void route_alone(void *job, member *m) noexcept nogil:
    cdef routing_run *run = <routing_run *>job
    route_tokens(run.r, run.tokens, m)


cdef void route_tokens(const routing *r, int64_t tokens, const member *m) noexcept nogil:
    """Route a thread's share of the tokens. Thread 0 routes a single token."""
    cdef int64_t token
    if tokens == 1:
        if m.thread == 0:
            route_token(r, 0, r.buffers)
        return
    for token in range(tokens * m.thread // m.num_threads, tokens * (m.thread + 1) // m.num_threads):
        route_token(r, token, r.buffers + m.thread * buffer_floats(r))


cdef void route_token(const routing *r, int64_t token, float *scores) noexcept nogil:
    cdef int64_t element = element_bytes(r.dtype), num_experts = r.num_experts, j, e
    cdef int32_t *ids = r.ids + token * r.top_k
    cdef float *weights = r.weights + token * r.top_k
    cdef float *choice = scores + num_experts
    cdef float total = 0
    r.table.widen(scores, r.logits + token * num_experts * element, r.dtype, num_experts)
    if not has_finite_max(scores, num_experts):
        for j in range(r.top_k):
            ids[j] = <int32_t>j
            weights[j] = NAN
        return
    if r.scoring == SOFTMAX:
        r.table.softmax(scores, num_experts)
    elif r.scoring == SIGMOID:
        r.table.sigmoid(scores, num_experts)
    elif r.scoring == SQRT_SOFTPLUS:
        for e in range(num_experts):
            scores[e] = sqrt_softplus(scores[e])
    for e in range(num_experts):
        choice[e] = scores[e] if r.bias is NULL else scores[e] + r.bias[e]
    if r.num_groups > 1:
        mask_groups(r, choice, choice + num_experts)
    for j in range(r.top_k):
        e = pop_argmax(choice, num_experts)
        ids[j] = <int32_t>e
        weights[j] = scores[e]
        total += scores[e]
    if r.scoring == SOFTMAX_TOPK:
        r.table.softmax(weights, r.top_k)
    elif r.scoring == SPARSEMIXER:
        mix_sparsely(r, scores, ids, weights)
    elif r.normalise:
        total += <float>1e-20
        for j in range(r.top_k):
            weights[j] /= total
    for j in range(r.top_k):
        weights[j] *= r.factor
        if r.scale is not NULL:
            weights[j] *= r.scale[ids[j]]


cdef float sqrt_softplus(float logit) noexcept nogil:
    """In float64, so that the result is rounded once. From 40 on, ``log(1 + exp(x))`` is x in float32."""
    return <float>sqrt(<double>logit if logit > 40 else log1p(exp(<double>logit)))


cdef void mix_sparsely(const routing *r, float *logits, const int32_t *ids, float *weights) noexcept nogil:
    """The weights of ``SPARSEMIXER``; overwrites the logits of the chosen experts."""
    cdef int64_t j, e
    cdef float most, distance
    cdef double total
    for j in range(r.top_k):
        most, total = logits[ids[j]], 0
        for e in range(r.num_experts):
            distance = most - logits[e]
            if distance <= 2 * r.jitter * fmaxf(fabsf(logits[e]), most):
                total += exp(-<double>distance)
        weights[j] = <float>(1 / total)
        logits[ids[j]] = -INFINITY


cdef void mask_groups(const routing *r, float *choice, float *group_scores) noexcept nogil:
    """Mark the experts of all groups that are not selected, so that they cannot be selected."""
    cdef int64_t size = r.num_experts // r.num_groups, g, e, _taken
    cdef float first, second
    for g in range(r.num_groups):
        first = second = -INFINITY
        for e in range(g * size, (g + 1) * size):
            if choice[e] > first:
                second = first
                first = choice[e]
            elif choice[e] > second:
                second = choice[e]
        group_scores[g] = first + second if r.top2_group_score else first
    for _taken in range(r.topk_groups):
        pop_argmax(group_scores, r.num_groups)
    for g in range(r.num_groups):
        if not isnan(group_scores[g]):
            for e in range(g * size, (g + 1) * size):
                choice[e] = NAN


cdef int64_t pop_argmax(float *values, int64_t count) noexcept nogil:
    """The index of the largest value; the smaller index for equal values. The value becomes NaN, so it is taken."""
    cdef int64_t best = 0, i
    while best < count - 1 and isnan(values[best]):
        best += 1
    for i in range(best + 1, count):
        if values[i] > values[best]:
            best = i
    values[best] = NAN
    return best


cdef bint has_finite_max(const float *logits, int64_t num_experts) noexcept nogil:
    """Whether the largest logit is finite and no logit is NaN."""
    cdef int64_t e
    cdef float largest = -INFINITY
    for e in range(num_experts):
        if isnan(logits[e]):
            return False
        largest = max(largest, logits[e])
    return isfinite(largest)
