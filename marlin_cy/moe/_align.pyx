"""Grouping of (token, choice) pairs by expert, for :func:`marlin_cy.moe.align.moe_align_block_size`."""

import numpy as np

from libc.stdint cimport int32_t, int64_t


def align_block_size(const int32_t[::1] topk_ids, int64_t block_size, int64_t num_experts,
                     int32_t[::1] sorted_ids, int32_t[::1] expert_ids):
    """Fill the arrays of ``moe_align_block_size``; returns the number of slots up to the last block's end.

    The caller has checked that each id is -1 or an expert, and no other thread may write to ``topk_ids``.
    """
    cdef int64_t count = topk_ids.shape[0], i, e, past = 0
    cdef int64_t[::1] next_slot = np.zeros(num_experts, np.int64)
    for i in range(count):
        if topk_ids[i] >= 0:
            next_slot[topk_ids[i]] += 1
    for i in range(sorted_ids.shape[0]):
        sorted_ids[i] = <int32_t>count
    for e in range(num_experts):
        i = past
        past += (next_slot[e] + block_size - 1) // block_size * block_size
        next_slot[e] = i
        while i < past:
            expert_ids[i // block_size] = <int32_t>e
            i += block_size
    for i in range(past // block_size, expert_ids.shape[0]):
        expert_ids[i] = -1
    for i in range(count):
        if topk_ids[i] >= 0:
            sorted_ids[next_slot[topk_ids[i]]] = <int32_t>i
            next_slot[topk_ids[i]] += 1
    return past
