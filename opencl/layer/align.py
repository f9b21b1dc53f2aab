"""(Token, choice) pairs grouped by expert, on the device, in one launch with what else comes before a layer's products.

A launch costs several microseconds however little it does. So rows of the first product are prepared while pairs are
aligned (``align_prepare.cl``); and few tokens are aligned by the last work-group that routes one (``route_align.cl``).
"""

from typing import NamedTuple

import numpy as np
import pyopencl as cl

from marlin_cy.opencl.buffers import Vector
from marlin_cy.opencl.checks.routing import check_align, is_right_beside
from marlin_cy.opencl.gemm.prepare import Prepared, needs_preparation, ordered_alike, preparation
from marlin_cy.opencl.gemm.work import RoutedBlocks
from marlin_cy.opencl.layer.routing import (
    ROUTE_ARGUMENTS,
    ROUTE_ITEMS,
    check_local_memory,
    route_call,
    route_local_bytes,
)

__all__ = ["Aligned", "aligns_as_it_routes", "check_experts", "enqueue_align", "enqueue_route_align"]

BUFFER, UINT, ULONG = None, np.uint32, np.uint64  # for Kernel.set_arg_types
ALIGN_ARGUMENTS = (BUFFER, ULONG, UINT, UINT, UINT, BUFFER, ULONG, BUFFER, ULONG, BUFFER, ULONG, BUFFER)
ROUTE_ALIGN_ARGUMENTS = (*ROUTE_ARGUMENTS, UINT, BUFFER, BUFFER, BUFFER, BUFFER, BUFFER)
ALIGN_ITEMS = 256  # as in align.cl
ALIGN_LOCAL_BYTES = 20 * ALIGN_ITEMS + 4  # but for what grows with the experts
# Of align_few: enough for 64 tokens with 8 of 256 experts each. One work-group goes through all marks, and with many
# more would take longer than a launch that has one for each expert.
MAX_MARK_BYTES = 20 << 10


def most_blocks(pairs, num_experts, block_size):
    """Blocks that the worst routing needs."""
    return min(pairs, num_experts + max(0, pairs - num_experts) // block_size)


def check_experts(ctx, num_experts):
    """Refuse more experts than there is local memory for."""
    check_local_memory(ctx, ALIGN_LOCAL_BYTES + 4 * num_experts, num_experts)


class Aligned(NamedTuple):
    """What a layer's first product needs: its routing arrays, and its rows where those were prepared beside them."""

    work: RoutedBlocks
    prepared: Prepared | None


def routed_by(ctx, chosen, pairs, num_experts):
    """The routing arrays of (token, choice) pairs, still to be filled."""
    block_size = ctx.backend.tier.block_size(pairs / num_experts)
    blocks = most_blocks(pairs, num_experts, block_size)
    return RoutedBlocks(
        sorted_ids=Vector(ctx.reserve("sorted_token_ids", 4 * blocks * block_size), 0, blocks * block_size),
        expert_ids=Vector(ctx.reserve("expert_ids", 4 * blocks), 0, blocks),
        past=Vector(ctx.reserve("num_tokens_past_padded", 4), 0, 1),
        limit=blocks * block_size,
        valid=pairs,
        block_size=block_size,
        top_k=chosen.top_k,
    )


def preparation_beside(ctx, store, rows, work):
    """The :class:`Preparation` of rows by a launch that aligns; None if they need none, or one that waits for that."""
    if needs_preparation(ctx, store, rows) and ordered_alike(store):
        return preparation(ctx, store, rows, work)
    return None


def checked_preparation_beside(ctx, gate_up, rows, work):
    """:func:`preparation_beside`, if the device does that rightly: checked at the first use in these sizes."""
    if ctx.backend.runtime.verdicts is None:
        # A check of aligning alone has no store.
        return None if gate_up.store is None else preparation_beside(ctx, gate_up.store, rows, work)
    how = preparation_beside(ctx, gate_up.store, rows, work)
    plans = ctx.plans_of(gate_up.store)
    key = "align", rows.type_code, rows.offset % 8, work.block_size, work.top_k, gate_up.num_experts, how is None
    beside = plans.get(key)
    if beside is None:
        beside = how is not None and is_right_beside(ctx, gate_up.num_experts, work, gate_up.store, rows)
        if not beside:
            check_align(ctx, gate_up.num_experts, work)
        plans[key] = beside
    return how if beside else None


def enqueue_align(ctx, chosen, gate_up, rows):
    """Group the pairs of ``rows`` by expert, and prepare the rows; returns :class:`Aligned`."""
    num_experts = gate_up.num_experts
    work = routed_by(ctx, chosen, rows.rows * chosen.top_k, num_experts)
    how = checked_preparation_beside(ctx, gate_up, rows, work)
    arguments = (
        chosen.ids,
        chosen.ids_offset,
        work.valid,
        num_experts,
        work.block_size,
        work.sorted_ids.data,
        work.sorted_ids.offset,
        work.expert_ids.data,
        work.expert_ids.offset,
        work.past.data,
        work.past.offset,
        cl.LocalMemory(4 * num_experts),
    )
    if how is None:
        kernel = ctx.kernel("align", "align", {}, ALIGN_ARGUMENTS)
        event = kernel(ctx.queue, (ALIGN_ITEMS * num_experts,), (ALIGN_ITEMS,), *arguments)
        ctx.log("align", event)
        return Aligned(work, None)
    kernel = ctx.kernel("align_prepare", "align_prepare", how.macros, ALIGN_ARGUMENTS + how.argument_types)
    groups = num_experts + how.count
    event = kernel(ctx.queue, (ALIGN_ITEMS * groups,), (ALIGN_ITEMS,), *arguments, *how.arguments)
    ctx.log("align, gate_up: prepare_rows", event)
    return Aligned(work, how.prepared)


def mark_bytes(pairs, num_experts):
    """Local memory of align_few's marks."""
    return 4 * num_experts * (-(-pairs // 32) | 1)


def aligns_as_it_routes(ctx, tokens, routing):
    """Whether :func:`enqueue_route_align` can, and is the faster way."""
    device = ctx.backend.runtime.capabilities
    marks = mark_bytes(tokens * routing.top_k, routing.num_experts)
    fits = marks <= MAX_MARK_BYTES and route_local_bytes(routing) + marks + 4 <= device.local_memory  # 4: is_last
    return fits and device.device_atomics is not None


def route_align_program(device):
    """``(macros, options)`` that ``route_align.cl`` is built with, by the device's capabilities."""
    return ({"PTX": 1}, ()) if device.device_atomics == "PTX" else ({"PTX": 0}, ("-cl-std=CL3.0",))


def enqueue_route_align(ctx, logits, routing, chosen, gate_up, rows):
    """Fill ``chosen`` by the rows of ``logits``, and do what :func:`enqueue_align` does.

    ``rows``: None where these wait for the choices.
    """
    work = routed_by(ctx, chosen, logits.rows * chosen.top_k, logits.width)
    how = None if rows is None else preparation_beside(ctx, gate_up.store, rows, work)
    macros, arguments = route_call(ctx, logits, routing, chosen)
    program, options = route_align_program(ctx.backend.runtime.capabilities)
    macros, types = {**macros, **program}, ROUTE_ALIGN_ARGUMENTS
    arguments = (
        *arguments,
        work.block_size,
        work.sorted_ids.data,
        work.expert_ids.data,
        work.past.data,
        cl.LocalMemory(mark_bytes(work.valid, logits.width)),
        ctx.reserve("arrived work-groups", 4),  # buffers begin as zeros
    )
    label, prepared = "route, align", None
    if how is not None:
        macros = {**macros, **how.macros, "PREPARES": 1}
        types, arguments = types + how.argument_types, arguments + how.arguments
        label, prepared = "route, align, gate_up: prepare_rows", how.prepared
    kernel = ctx.kernel("route_align", "route_align", macros, types, options)
    event = kernel(ctx.queue, (ROUTE_ITEMS * logits.rows,), (ROUTE_ITEMS,), *arguments)
    ctx.log(label, event)
    return Aligned(work, prepared)
