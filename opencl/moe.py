"""The Mixture-of-Experts layer on the device: routing, both products, combination; nothing is read back."""

from typing import NamedTuple

import numpy as np
import pyopencl as cl
from pyopencl.array import Array

from marlin_cy.opencl.buffers import (
    TYPES,
    Rows,
    Vector,
    check_contiguous,
    examined,
    float_rows,
    refuse_overlap,
    wait_list,
)
from marlin_cy.opencl.configuration import FLOAT16, FLOAT32
from marlin_cy.opencl.gemm import Routed, multiply

__all__ = ["device_topk", "forward", "route"]

BUFFER, INT, UINT, ULONG = None, np.int32, np.uint32, np.uint64  # for Kernel.set_arg_types
ROUTE_ARGUMENTS = (BUFFER, ULONG, UINT, UINT, INT, BUFFER, ULONG, BUFFER, ULONG)
ALIGN_ARGUMENTS = (BUFFER, ULONG, UINT, UINT, UINT, BUFFER, ULONG, BUFFER, ULONG, BUFFER, ULONG, BUFFER)
COMBINE_ARGUMENTS = (BUFFER, ULONG, BUFFER, ULONG, BUFFER, ULONG, UINT, UINT, BUFFER, ULONG, UINT, UINT)
ROUTE_ITEMS, ALIGN_ITEMS, COMBINE_ITEMS = 32, 256, 64  # work-items in a work-group; the first two as in moe.cl
# Tokens are taken in slices, so that what lies between the two products stays below this, or below an
# eighth of the device's memory.
SLICE_BYTES = 1 << 30
MAX_PAIRS = 2**31 - 1


class Chosen(NamedTuple):
    """Experts and weights of each token, on the device; ``offset`` counts elements of both."""

    ids: cl.Buffer
    ids_offset: int
    weights: cl.Buffer
    weights_offset: int
    top_k: int


def most_blocks(pairs, num_experts, block_size):
    """Blocks that the worst routing needs."""
    return min(pairs, num_experts + max(0, pairs - num_experts) // block_size)


def route(ctx, router_logits, num_experts, top_k, normalise):
    """``(ids, weights)``, int32 and float32 arrays ``[tokens, top_k]``."""
    logits = float_rows(router_logits, "router_logits", num_experts, ctx.cl_context)
    backend = ctx.backend
    ids, weights = backend.empty((logits.rows, top_k), np.int32), backend.empty((logits.rows, top_k), np.float32)
    if logits.rows:
        with ctx:
            chosen = Chosen(ids.base_data, 0, weights.base_data, 0, top_k)
            event = enqueue_route(ctx, logits, chosen, normalise, wait_list(ctx.queue, [router_logits]))
            for array in (ids, weights):
                ctx.written(array, event)
    return ids, weights


def enqueue_route(ctx, logits, chosen, normalise, waits):
    kernel = ctx.kernel("moe", "route", {"INPUT_TYPE": logits.type_code}, ROUTE_ARGUMENTS)
    return ctx.log(
        "route",
        kernel(
            ctx.queue,
            (ROUTE_ITEMS * logits.rows,),
            (ROUTE_ITEMS,),
            logits.data,
            logits.offset,
            logits.width,
            chosen.top_k,
            int(normalise),
            chosen.ids,
            chosen.ids_offset,
            chosen.weights,
            chosen.weights_offset,
            wait_for=waits,
        ),
    )


def device_topk(topk_ids, topk_weights, cl_context):
    """Chosen experts on the device, checked but for what they are."""
    for name, array, dtype in (("topk_ids", topk_ids, np.int32), ("topk_weights", topk_weights, np.float32)):
        examined(array, name, cl_context)
        if array.dtype != dtype:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected {np.dtype(dtype)}")
        if len(array.shape) != 2:
            raise ValueError(f"{name}: got shape {array.shape}, expected [tokens, top_k]")
        check_contiguous(array, name)
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(f"topk_weights: got shape {topk_weights.shape}, expected {topk_ids.shape}, as topk_ids")
    if topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids: got shape {topk_ids.shape}, expected at least one expert a token")
    return topk_ids, topk_weights


def forward(ctx, layer, hidden_states, out, router_logits, topk_ids, topk_weights):
    """Fill ``out`` with the layer's output.

    Either ``router_logits`` is given, or ``topk_ids`` and ``topk_weights`` are: arrays of the host, or of
    the device, as :meth:`OpenClBackend._topk` returns them.
    """
    gate_up, down = layer.gate_up, layer.down
    hidden = float_rows(hidden_states, "hidden_states", gate_up.k, ctx.cl_context)
    result = float_rows(out, "out", down.n_per_expert, ctx.cl_context, True)
    refuse_overlap(out, hidden_states, "out")
    tokens = hidden.rows
    if result.rows != tokens:
        raise ValueError(f"out: got {result.rows} rows, expected {tokens}, those of hidden_states")
    used, logits = [hidden_states, out], None
    if router_logits is None:
        if topk_ids.shape[0] != tokens:
            raise ValueError(f"topk_ids: got {topk_ids.shape[0]} rows, expected {tokens}, those of hidden_states")
        top_k = topk_ids.shape[1]
        if isinstance(topk_ids, Array):
            for array in (topk_ids, topk_weights):
                refuse_overlap(out, array, "out")
                used.append(array)
    else:
        logits = float_rows(router_logits, "router_logits", layer.num_experts, ctx.cl_context)
        if logits.rows != tokens:
            raise ValueError(f"router_logits: got {logits.rows} rows, expected {tokens}, those of hidden_states")
        refuse_overlap(out, router_logits, "out")
        used.append(router_logits)
        top_k = layer.top_k
    if tokens * top_k > MAX_PAIRS:
        raise ValueError(f"hidden_states: got {tokens} rows of {top_k} experts each, expected fewer than 2**31 pairs")
    if tokens == 0:
        return
    with ctx:
        waits = wait_list(ctx.queue, used)
        if waits:
            cl.enqueue_barrier(ctx.queue, wait_for=waits)
        if logits is not None:
            ids, weights = (ctx.reserve(f"topk_{name}", 4 * tokens * top_k) for name in ("ids", "weights"))
            chosen = Chosen(ids, 0, weights, 0, top_k)
            enqueue_route(ctx, logits, chosen, layer.norm_topk_prob, None)
        elif isinstance(topk_ids, Array):
            chosen = Chosen(
                topk_ids.base_data, topk_ids.offset // 4, topk_weights.base_data, topk_weights.offset // 4, top_k
            )
        else:
            chosen = Chosen(ctx.upload("topk_ids", topk_ids), 0, ctx.upload("topk_weights", topk_weights), 0, top_k)
        begin, slice_tokens = 0, tokens_a_slice(ctx, layer, tokens, top_k)
        while begin < tokens:
            count = min(slice_tokens, tokens - begin)
            event = forward_slice(ctx, layer, part(hidden, begin, count), part(result, begin, count), chosen)
            chosen = chosen._replace(
                ids_offset=chosen.ids_offset + count * top_k, weights_offset=chosen.weights_offset + count * top_k
            )
            begin += count
        ctx.written(out, event)


def part(rows, begin, count):
    """Some of the rows."""
    return rows._replace(offset=rows.offset + begin * rows.width, rows=count)


def tokens_a_slice(ctx, layer, tokens, top_k):
    capabilities = ctx.backend.runtime.capabilities
    pair_bytes = 4 * (2 * layer.intermediate_size + layer.down.store.packed_k + layer.down.n_per_expert)
    room = min(SLICE_BYTES, capabilities.global_memory // 8)
    return min(tokens, max(1, room // (pair_bytes * top_k)))


def forward_slice(ctx, layer, hidden, result, chosen):
    """Some tokens; enqueues everything, returns the last event."""
    num_experts, top_k = layer.num_experts, chosen.top_k
    pairs = hidden.rows * top_k
    # What lies between is as wide as what the caller gave: float16 tokens make float16 products.
    type_code = FLOAT16 if hidden.type_code == FLOAT16 else FLOAT32
    work = enqueue_align(ctx, chosen, pairs, num_experts)
    inner = workspace_rows(ctx, "gate_up", pairs, layer.gate_up.n_per_expert, type_code)
    multiply(ctx, layer.gate_up, hidden, inner, work, label="gate_up")
    products = workspace_rows(ctx, "down", pairs, layer.down.n_per_expert, type_code)
    multiply(ctx, layer.down, inner, products, work._replace(top_k=1), activation=layer.activation, label="down")
    return enqueue_combine(ctx, products, chosen, num_experts, result)


def workspace_rows(ctx, purpose, rows, width, type_code):
    """Rows in the context's workspace."""
    data = ctx.reserve(purpose, rows * width * TYPES[type_code].itemsize)
    return Rows(data, 0, type_code, rows, width)


def enqueue_align(ctx, chosen, pairs, num_experts):
    """Group (token, choice) pairs by expert."""
    block_size = ctx.backend.tier.block_size(pairs / num_experts)
    blocks = most_blocks(pairs, num_experts, block_size)
    sorted_ids = ctx.reserve("sorted_token_ids", 4 * blocks * block_size)
    expert_ids = ctx.reserve("expert_ids", 4 * blocks)
    past = ctx.reserve("num_tokens_past_padded", 4)
    kernel = ctx.kernel("moe", "align", {}, ALIGN_ARGUMENTS)
    event = kernel(
        ctx.queue,
        (ALIGN_ITEMS * num_experts,),
        (ALIGN_ITEMS,),
        chosen.ids,
        chosen.ids_offset,
        pairs,
        num_experts,
        block_size,
        sorted_ids,
        0,
        expert_ids,
        0,
        past,
        0,
        cl.LocalMemory(4 * num_experts),
    )
    ctx.log("align", event)
    return Routed(
        sorted_ids=Vector(sorted_ids, 0, blocks * block_size),
        expert_ids=Vector(expert_ids, 0, blocks),
        past=Vector(past, 0, 1),
        limit=blocks * block_size,
        valid=pairs,
        block_size=block_size,
        top_k=chosen.top_k,
    )


def enqueue_combine(ctx, products, chosen, num_experts, result):
    macros = {"INPUT_TYPE": products.type_code, "OUTPUT_TYPE": result.type_code}
    kernel = ctx.kernel("moe", "combine", macros, COMBINE_ARGUMENTS)
    groups_per_token = -(-result.width // (4 * COMBINE_ITEMS))
    event = kernel(
        ctx.queue,
        (result.rows * groups_per_token * COMBINE_ITEMS,),
        (COMBINE_ITEMS,),
        products.data,
        products.offset,
        chosen.ids,
        chosen.ids_offset,
        chosen.weights,
        chosen.weights_offset,
        num_experts,
        chosen.top_k,
        result.data,
        result.offset,
        result.width,
        groups_per_token,
    )
    return ctx.log("combine", event)
