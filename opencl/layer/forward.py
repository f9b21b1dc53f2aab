"""The Mixture-of-Experts layer on the device: routing, both products, combination. Nothing is read back.

The order of launches. A launch in brackets is fused with the previous launch if possible::

    route [align] [prepare rows]      experts and weights of each token; routing arrays; rows of the first product
    gate_up                           first product
    prepare rows                      the activation, act(gate) * up
    down                              second product
    (the same for a shared expert, with all tokens)
    combine                           weighted sum of each token's rows
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pyopencl as cl
from pyopencl.array import Array

from marlin_cy.opencl.arguments import combine_values, shared_factor_values, weigh_tokens_values
from marlin_cy.opencl.buffers import TYPES, Rows, Vector, float_rows, memory_of, refuse_overlap, wait_list
from marlin_cy.opencl.checks.combination import check_moe_kernel
from marlin_cy.opencl.checks.routing import is_fused_routing_correct
from marlin_cy.opencl.gemm.multiply import multiply
from marlin_cy.opencl.gemm.prepare import Prepared
from marlin_cy.opencl.gemm.work import RoutedBlocks
from marlin_cy.opencl.layer.align import (
    Aligned,
    aligns_as_it_routes,
    check_experts,
    enqueue_align,
    enqueue_route_align,
)
from marlin_cy.opencl.layer.routing import Chosen, check_routing, enqueue_route
from marlin_cy.opencl.tiers.configuration import FLOAT16, FLOAT32

if TYPE_CHECKING:
    from marlin_cy.interface import MoePlan
    from marlin_cy.moe.layer import SharedExpert
    from marlin_cy.opencl.context import OpenClContext
    from marlin_cy.opencl.stack import OpenClMarlinExpertStack

__all__ = ["forward"]

WEIGH_ITEMS, FACTOR_ITEMS, COMBINE_ITEMS = 64, 256, 64  # work-items in a work-group
# Tokens are computed in slices, so that the rows between the two products take less than this, and less than an eighth
# of the device's memory.
SLICE_BYTES = 1 << 30
MAX_PAIRS = 2**31 - 1


class Shared(NamedTuple):
    """The output of a shared expert.

    Attributes
    ----------
    rows : Rows
    factors : pyopencl.Buffer or None
        float32 ``[tokens]``: the factor of each row; None if all factors are 1.
    """

    rows: Rows
    factors: cl.Buffer | None


def forward(
    ctx: OpenClContext,
    layer: MoePlan,
    hidden_states: Array,
    out: Array,
    router_logits: Array | None,
    topk_ids: Any,
    topk_weights: Any,
) -> None:
    """Fill ``out`` with the layer's output.

    Either ``router_logits`` is given, or ``topk_ids`` and ``topk_weights``: int32 and float32 arrays ``[tokens,
    top_k]`` of the host or of the device, which have been checked. The others are None.
    """
    gate_up, down = stacks_of(layer)
    hidden = float_rows(hidden_states, "hidden_states", gate_up.k, ctx.cl_context)
    result = float_rows(out, "out", down.n_per_expert, ctx.cl_context, True)
    refuse_overlap(out, hidden_states, "out")
    tokens = hidden.rows
    if result.rows != tokens:
        raise ValueError(f"out: got {result.rows} rows, expected {tokens} as in hidden_states")
    used, logits = [hidden_states, out], None
    if router_logits is None:
        if topk_ids.shape[0] != tokens:
            raise ValueError(f"topk_ids: got {topk_ids.shape[0]} rows, expected {tokens} as in hidden_states")
        top_k = topk_ids.shape[1]
        if isinstance(topk_ids, Array):
            for array in (topk_ids, topk_weights):
                refuse_overlap(out, array, "out")
                used.append(array)
    else:
        logits = float_rows(router_logits, "router_logits", layer.num_experts, ctx.cl_context)
        if logits.rows != tokens:
            raise ValueError(f"router_logits: got {logits.rows} rows, expected {tokens} as in hidden_states")
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
                and is_fused_routing_correct(ctx, layer.routing, logits, gate_up, rows)
            ):
                aligned = enqueue_route_align(ctx, logits, layer.routing, chosen, gate_up, rows)
            else:
                enqueue_route(ctx, logits, layer.routing, chosen, None)
        elif isinstance(topk_ids, Array):
            chosen = Chosen(
                memory_of(topk_ids), topk_ids.offset // 4, memory_of(topk_weights), topk_weights.offset // 4, top_k
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


def stacks_of(experts: MoePlan | SharedExpert) -> tuple[OpenClMarlinExpertStack, OpenClMarlinExpertStack]:
    """``(gate_up, down)`` of a layer, or of its shared expert. ``OpenClBackend.moe_forward`` has checked their type."""
    return cast("tuple[OpenClMarlinExpertStack, OpenClMarlinExpertStack]", (experts.gate_up, experts.down))


def part(rows: Rows, begin: int, count: int) -> Rows:
    """``count`` of the rows, from row ``begin`` on."""
    return rows._replace(offset=rows.offset + begin * rows.width, rows=count)


def tokens_a_slice(ctx: OpenClContext, layer: MoePlan, tokens: int, top_k: int) -> int:
    """Tokens in a slice."""
    capabilities = ctx.backend.runtime.capabilities
    token_bytes = top_k * row_bytes(layer)
    if layer.shared_expert is not None:
        token_bytes += row_bytes(layer.shared_expert)
    if layer.apply_router_weight_on_input:
        token_bytes += 4 * layer.hidden_size
    room = min(SLICE_BYTES, capabilities.global_memory // 8)
    return min(tokens, max(1, room // token_bytes))


def row_bytes(experts: MoePlan | SharedExpert) -> int:
    """The largest number of bytes that one row takes between the products and after them.

    ``experts``: a layer, or its shared expert.
    """
    gate_up, down = stacks_of(experts)
    return 4 * (gate_up.n_per_expert + down.store.packed_k + down.n_per_expert)


def forward_slice(
    ctx: OpenClContext, layer: MoePlan, hidden: Rows, result: Rows, chosen: Chosen, aligned: Aligned | None
) -> cl.Event:
    """Enqueue a slice of tokens; returns the last event. ``aligned``: None if the tokens are not yet aligned."""
    # The products have the width of the caller's tokens: float16 for float16, else float32.
    type_code = FLOAT16 if hidden.type_code == FLOAT16 else FLOAT32
    weighed_before = layer.apply_router_weight_on_input
    rows = enqueue_weigh(ctx, hidden, chosen) if weighed_before else hidden
    work, prepared = aligned or enqueue_align(ctx, chosen, stacks_of(layer)[0], rows)
    products = enqueue_products(ctx, layer, layer.activation, rows, work, type_code, prepared=prepared)
    shared = None
    if layer.shared_expert is not None:  # its rows share the workspace of the routed experts' prepared rows
        shared = enqueue_shared(ctx, layer.shared_expert, layer.activation, hidden, type_code)
    return enqueue_combine(ctx, products, chosen, layer.num_experts, shared, result, weighted=not weighed_before)


def enqueue_products(
    ctx: OpenClContext,
    experts: MoePlan | SharedExpert,
    activation: str,
    rows: Rows,
    work: RoutedBlocks,
    type_code: int,
    prefix: str = "",
    prepared: Prepared | None = None,
) -> Rows:
    """Both products of a layer's experts, or of its shared expert: a row for each valid id of the work.

    ``prepared``: the prepared rows, if the launch that aligned has prepared them.
    """
    gate_up, down = stacks_of(experts)
    inner = workspace_rows(ctx, f"{prefix}gate_up", work.valid, gate_up.n_per_expert, type_code)
    multiply(ctx, gate_up, rows, inner, work, prepared=prepared, label=f"{prefix}gate_up")
    products = workspace_rows(ctx, f"{prefix}down", work.valid, down.n_per_expert, type_code)
    work = work._replace(top_k=1)
    multiply(ctx, down, inner, products, work, activation=activation, label=f"{prefix}down")
    return products


def workspace_rows(ctx: OpenClContext, purpose: str, rows: int, width: int, type_code: int) -> Rows:
    """Rows in the context's workspace."""
    data = ctx.reserve(purpose, rows * width * TYPES[type_code].itemsize)
    return Rows(data, 0, type_code, rows, width)


def enqueue_shared(ctx: OpenClContext, expert: SharedExpert, activation: str, hidden: Rows, type_code: int) -> Shared:
    """The shared expert's output for all tokens."""
    work = all_to_one(ctx, hidden.rows)
    rows = enqueue_products(ctx, expert, activation, hidden, work, type_code, "shared ")
    if expert.gate_weight is None:
        return Shared(rows, None)
    gate = ctx.kept(expert, expert.gate_weight, "gate of a shared expert")
    return Shared(rows, enqueue_shared_factor(ctx, gate, hidden))


def enqueue_shared_factor(ctx: OpenClContext, gate: cl.Buffer, hidden: Rows) -> cl.Buffer:
    """Each token's factor of the shared expert, float32 ``[tokens]``, from the gate, float32 ``[hidden size]``."""
    factors = ctx.reserve("shared factors", 4 * hidden.rows)
    macros = {"INPUT_TYPE": hidden.type_code, "FACTOR_ITEMS": FACTOR_ITEMS}
    event = ctx.launch("moe", "shared_factor", macros, check=check_moe_kernel)(
        ctx.queue,
        (hidden.rows * FACTOR_ITEMS,),
        (FACTOR_ITEMS,),
        shared_factor_values(
            input=hidden.data,
            input_offset=hidden.offset,
            gate=gate,
            factors=factors,
            width=hidden.width,
        ),
    )
    ctx.log("shared_factor", event)
    return factors


def all_to_one(ctx: OpenClContext, tokens: int) -> RoutedBlocks:
    """Routing arrays that send all tokens to the only expert."""
    block_size = ctx.backend.tier.block_size(tokens)
    blocks = -(-tokens // block_size)
    slots = blocks * block_size
    return RoutedBlocks(
        sorted_ids=Vector(ctx.counting(slots), 0, slots),
        expert_ids=Vector(ctx.reserve("zeros", 4 * blocks), 0, blocks),  # a new buffer is zeros, and is never written
        past=None,
        limit=slots,
        valid=tokens,
        block_size=block_size,
        top_k=1,
    )


def enqueue_weigh(ctx: OpenClContext, hidden: Rows, chosen: Chosen) -> Rows:
    """Tokens times their weights, in float32, which holds the products for every dtype."""
    macros = {"INPUT_TYPE": hidden.type_code}
    rows = workspace_rows(ctx, "weighed tokens", hidden.rows, hidden.width, FLOAT32)
    event = ctx.launch("moe", "weigh_tokens", macros, check=check_moe_kernel)(
        ctx.queue,
        (hidden.rows * WEIGH_ITEMS,),
        (WEIGH_ITEMS,),
        weigh_tokens_values(
            input=hidden.data,
            input_offset=hidden.offset,
            weights=chosen.weights,
            weights_offset=chosen.weights_offset,
            output=rows.data,
            width=hidden.width,
        ),
    )
    ctx.log("weigh_tokens", event)
    return rows


def enqueue_combine(
    ctx: OpenClContext,
    products: Rows,
    chosen: Chosen,
    num_experts: int,
    shared: Shared | None,
    result: Rows,
    *,
    weighted: bool,
) -> cl.Event:
    """Add the experts' rows of each token. ``weighted``: whether rows are multiplied by the tokens' weights."""
    rows, factors = (None, None) if shared is None else (shared.rows.data, shared.factors)
    macros = {
        "INPUT_TYPE": products.type_code,
        "OUTPUT_TYPE": result.type_code,
        "WEIGHTED": int(weighted),
        "SHARED": 0 if rows is None else 1 if factors is None else 2,
    }
    groups_per_token = -(-result.width // (4 * COMBINE_ITEMS))
    event = ctx.launch("moe", "combine", macros, check=check_moe_kernel)(
        ctx.queue,
        (result.rows * groups_per_token * COMBINE_ITEMS,),
        (COMBINE_ITEMS,),
        combine_values(
            input=products.data,
            input_offset=products.offset,
            ids=chosen.ids,
            ids_offset=chosen.ids_offset,
            weights=chosen.weights,
            weights_offset=chosen.weights_offset,
            num_experts=num_experts,
            top_k=chosen.top_k,
            shared=rows,
            factors=factors,
            output=result.data,
            output_offset=result.offset,
            width=result.width,
            groups_per_token=groups_per_token,
        ),
    )
    return ctx.log("combine", event)
