"""The Mixture-of-Experts layer on the device: routing, both products, combination; nothing is read back."""

from typing import NamedTuple

import numpy as np
import pyopencl as cl
from pyopencl.array import Array

from marlin_cy.opencl.buffers import TYPES, Rows, Vector, float_rows, refuse_overlap, wait_list
from marlin_cy.opencl.checks.routing import is_right_fused
from marlin_cy.opencl.gemm.multiply import multiply
from marlin_cy.opencl.gemm.work import RoutedBlocks
from marlin_cy.opencl.layer.align import aligns_as_it_routes, check_experts, enqueue_align, enqueue_route_align
from marlin_cy.opencl.layer.routing import Chosen, check_routing, enqueue_route
from marlin_cy.opencl.tiers.configuration import FLOAT16, FLOAT32

__all__ = ["forward"]

BUFFER, UINT, ULONG = None, np.uint32, np.uint64  # for Kernel.set_arg_types
WEIGH_ARGUMENTS = (BUFFER, ULONG, BUFFER, ULONG, BUFFER, UINT)
FACTOR_ARGUMENTS = (BUFFER, ULONG, BUFFER, BUFFER, UINT)
COMBINE_ARGUMENTS = (
    *(BUFFER, ULONG, BUFFER, ULONG, BUFFER, ULONG, UINT, UINT),
    *(BUFFER, BUFFER, BUFFER, ULONG, UINT, UINT),
)
WEIGH_ITEMS, FACTOR_ITEMS, COMBINE_ITEMS = 64, 256, 64  # work-items in a work-group, as in moe.cl
# Tokens are taken in slices, so that what lies between the two products stays below this, or below an
# eighth of the device's memory.
SLICE_BYTES = 1 << 30
MAX_PAIRS = 2**31 - 1


class Shared(NamedTuple):
    """What a shared expert gave, and how much of it each token gets: a float32 buffer, or None for all of it."""

    rows: Rows
    factors: cl.Buffer | None


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
        check_routing(ctx, layer.routing)
    if tokens * top_k > MAX_PAIRS:
        raise ValueError(f"hidden_states: got {tokens} rows of {top_k} experts each, expected fewer than 2**31 pairs")
    check_experts(ctx, layer.num_experts)
    if tokens == 0:
        return
    with ctx:
        waits = wait_list(ctx.queue, used)
        if waits:
            cl.enqueue_barrier(ctx.queue, wait_for=waits)
        begin, slice_tokens = 0, tokens_a_slice(ctx, layer, tokens, top_k)
        aligned = None
        if logits is not None:
            ids, weights = (ctx.reserve(f"topk_{name}", 4 * tokens * top_k) for name in ("ids", "weights"))
            chosen = Chosen(ids, 0, weights, 0, top_k)
            rows = None if layer.apply_router_weight_on_input else hidden
            if (
                slice_tokens == tokens
                and aligns_as_it_routes(ctx, tokens, layer.routing)
                and is_right_fused(ctx, layer.routing, logits, gate_up, rows)
            ):
                aligned = enqueue_route_align(ctx, logits, layer.routing, chosen, gate_up, rows)
            else:
                enqueue_route(ctx, logits, layer.routing, chosen, None)
        elif isinstance(topk_ids, Array):
            chosen = Chosen(
                topk_ids.base_data, topk_ids.offset // 4, topk_weights.base_data, topk_weights.offset // 4, top_k
            )
        else:
            chosen = Chosen(ctx.upload("topk_ids", topk_ids), 0, ctx.upload("topk_weights", topk_weights), 0, top_k)
        while begin < tokens:
            count = min(slice_tokens, tokens - begin)
            event = forward_slice(ctx, layer, part(hidden, begin, count), part(result, begin, count), chosen, aligned)
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
    token_bytes = top_k * row_bytes(layer)
    if layer.shared_expert is not None:
        token_bytes += row_bytes(layer.shared_expert)
    if layer.apply_router_weight_on_input:
        token_bytes += 4 * layer.hidden_size
    room = min(SLICE_BYTES, capabilities.global_memory // 8)
    return min(tokens, max(1, room // token_bytes))


def row_bytes(experts):
    """What one row needs between both products and after them, at most."""
    gate_up, down = experts.gate_up, experts.down
    return 4 * (gate_up.n_per_expert + down.store.packed_k + down.n_per_expert)


def forward_slice(ctx, layer, hidden, result, chosen, aligned):
    """Some tokens; enqueues everything, returns the last event. ``aligned``: None if that is still to be done."""
    # What lies between is as wide as what the caller gave: float16 tokens make float16 products.
    type_code = FLOAT16 if hidden.type_code == FLOAT16 else FLOAT32
    weighed_before = layer.apply_router_weight_on_input
    rows = enqueue_weigh(ctx, hidden, chosen) if weighed_before else hidden
    work, prepared = aligned or enqueue_align(ctx, chosen, layer.gate_up, rows)
    products = enqueue_products(ctx, layer, layer.activation, rows, work, type_code, prepared=prepared)
    shared = None
    if layer.shared_expert is not None:  # its rows are prepared where the other experts' were
        shared = enqueue_shared(ctx, layer.shared_expert, layer.activation, hidden, type_code)
    return enqueue_combine(ctx, products, chosen, layer.num_experts, shared, result, weighted=not weighed_before)


def enqueue_products(ctx, experts, activation, rows, work, type_code, prefix="", prepared=None):
    """Both products of a layer's experts, or of a shared one: rows, one for each valid id of the work.

    ``prepared``: what aligning made of the rows beside.
    """
    gate_up, down = experts.gate_up, experts.down
    inner = workspace_rows(ctx, f"{prefix}gate_up", work.valid, gate_up.n_per_expert, type_code)
    multiply(ctx, gate_up, rows, inner, work, prepared=prepared, label=f"{prefix}gate_up")
    products = workspace_rows(ctx, f"{prefix}down", work.valid, down.n_per_expert, type_code)
    work = work._replace(top_k=1)
    multiply(ctx, down, inner, products, work, activation=activation, label=f"{prefix}down")
    return products


def workspace_rows(ctx, purpose, rows, width, type_code):
    """Rows in the context's workspace."""
    data = ctx.reserve(purpose, rows * width * TYPES[type_code].itemsize)
    return Rows(data, 0, type_code, rows, width)


def enqueue_shared(ctx, expert, activation, hidden, type_code):
    """What a shared expert gives for all tokens."""
    work = all_to_one(ctx, hidden.rows)
    rows = enqueue_products(ctx, expert, activation, hidden, work, type_code, "shared ")
    if expert.gate_weight is None:
        return Shared(rows, None)
    factors = ctx.reserve("shared factors", 4 * hidden.rows)
    kernel = ctx.kernel("moe", "shared_factor", {"INPUT_TYPE": hidden.type_code}, FACTOR_ARGUMENTS)
    event = kernel(
        ctx.queue,
        (hidden.rows * FACTOR_ITEMS,),
        (FACTOR_ITEMS,),
        hidden.data,
        hidden.offset,
        ctx.kept(expert, expert.gate_weight, "gate of a shared expert"),
        factors,
        hidden.width,
    )
    ctx.log("shared_factor", event)
    return Shared(rows, factors)


def all_to_one(ctx, tokens):
    """Routing arrays that are always the same: all tokens go to the one expert that there is."""
    block_size = ctx.backend.tier.block_size(tokens)
    blocks = -(-tokens // block_size)
    slots = blocks * block_size
    return RoutedBlocks(
        sorted_ids=Vector(ctx.counting(slots), 0, slots),
        expert_ids=Vector(ctx.reserve("zeros", 4 * blocks), 0, blocks),  # buffers begin as zeros, and none writes it
        past=None,
        limit=slots,
        valid=tokens,
        block_size=block_size,
        top_k=1,
    )


def enqueue_weigh(ctx, hidden, chosen):
    """Tokens times their weights, in float32, which holds the products of all dtypes."""
    rows = workspace_rows(ctx, "weighed tokens", hidden.rows, hidden.width, FLOAT32)
    kernel = ctx.kernel("moe", "weigh_tokens", {"INPUT_TYPE": hidden.type_code}, WEIGH_ARGUMENTS)
    event = kernel(
        ctx.queue,
        (hidden.rows * WEIGH_ITEMS,),
        (WEIGH_ITEMS,),
        hidden.data,
        hidden.offset,
        chosen.weights,
        chosen.weights_offset,
        rows.data,
        hidden.width,
    )
    ctx.log("weigh_tokens", event)
    return rows


def enqueue_combine(ctx, products, chosen, num_experts, shared, result, *, weighted):
    """Add up what experts gave for each token."""
    rows, factors = (None, None) if shared is None else (shared.rows.data, shared.factors)
    macros = {
        "INPUT_TYPE": products.type_code,
        "OUTPUT_TYPE": result.type_code,
        "WEIGHTED": int(weighted),
        "SHARED": 0 if rows is None else 1 if factors is None else 2,
    }
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
        rows,
        factors,
        result.data,
        result.offset,
        result.width,
        groups_per_token,
    )
    return ctx.log("combine", event)
